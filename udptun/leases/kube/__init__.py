"""Leases in Kubernetes: flannel's annotations on Node objects.

This package itself imports nothing: ``config`` is light, ``source`` imports lightkube.
"""
