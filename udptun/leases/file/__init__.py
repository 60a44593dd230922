"""Leases from a hosts file, which lists all nodes. This ``__init__`` module imports nothing."""
