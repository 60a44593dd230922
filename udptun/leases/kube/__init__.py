"""Leases in Kubernetes: flannel's annotations on Node objects.

Nothing is imported here: ``config`` is light, ``source`` brings lightkube.
"""
