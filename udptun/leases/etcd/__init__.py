"""Leases in etcd v3, by flannel's schema. Importing the package itself loads nothing heavy."""
