"""A whole cluster as a test: ``python -m tests.e2e``, or ``make e2e``.

Real parts only: etcd, kube-apiserver, kube-controller-manager, kube-scheduler, and three nodes with
containerd, kubelet and kube-proxy. Each node is a namespace of a lab with its own processes and
mounts. udptun comes from its image, and from ``deploy/kubernetes`` or the Helm chart, as on any
other cluster.

    python -m tests.e2e --list                 the steps
    python -m tests.e2e                        all steps, and a table at the end
    python -m tests.e2e --step pods --keep     one step, after those that it needs; the cluster
                                               stays until Ctrl-C

``programs.py`` builds the server programs once, from their Go modules, into a cache outside the
repository, and the images. Needs root, Go, and Debian's etcd-server, containerd, runc, buildah,
busybox-static, iptables and containernetworking-plugins.
"""
