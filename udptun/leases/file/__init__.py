"""Leases from a hosts file, which lists all nodes. This package itself imports nothing."""
