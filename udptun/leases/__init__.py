"""Lease sources: a hosts file, etcd, Kubernetes. Each implements the contract in ``base``.

Does not know: forwarding, devices, routes. The node daemon decides what follows from a lease.
"""
