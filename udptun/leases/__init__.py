"""Where leases come from: a file, etcd, Kubernetes. Each source keeps the contract of ``base``.

Knows nothing of forwarding, devices or routes: those who read leases decide what follows from them.
"""
