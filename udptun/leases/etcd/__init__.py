"""Leases in etcd v3, in flannel's schema. This package itself imports nothing."""
