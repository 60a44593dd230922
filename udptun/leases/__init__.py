"""Lease sources: a hosts file, etcd, Kubernetes. Each source implements the contract in ``base``.

Does not depend on forwarding, devices or routes. The node daemon creates routes from the leases.
"""
