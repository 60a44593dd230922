"""Leases in Kubernetes: flannel's annotations on Node objects.

This ``__init__`` module imports nothing. ``config`` imports only small modules; ``source`` imports
aiohttp.
"""
