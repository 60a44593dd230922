"""Lease sources: a hosts file, etcd, Kubernetes. Each implements the contract in ``base``.

Does not depend on forwarding, devices or routes: the node daemon turns leases into routes.
"""
