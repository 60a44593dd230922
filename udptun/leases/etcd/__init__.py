"""Leases in etcd v3, in flannel's schema. This ``__init__`` module imports nothing."""
