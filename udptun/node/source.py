"""Make the lease source that the daemon was told to use, and load no other."""

from __future__ import annotations

from ..leases.base import LeaseSource
from ..net.netlink import Netlink
from .config import NodeConfig


def make_source(config: NodeConfig, netlink: Netlink) -> LeaseSource:
    """FieldError; ImportError: what the store needs is not installed."""
    if config.etcd is not None:
        from ..leases.etcd.source import EtcdSource

        return EtcdSource(config.etcd)
    if config.kube is not None:
        from ..leases.kube.source import KubeSource

        return KubeSource(config.kube)
    from ..leases.file import FileSource

    assert config.hosts is not None
    return FileSource(
        config.hosts, node_name=config.node_name, addresses=netlink.local_addresses
    )


def store_name(config: NodeConfig) -> str:
    """Which store this is: what one says holds for no other. Of etcd the key alone counts, since
    its members come and go."""
    if config.etcd is not None:
        return f"etcd {config.etcd.root}"
    if config.kube is not None:
        return f"kubernetes {config.kube.node_name}".strip()
    return f"file {config.hosts}"
