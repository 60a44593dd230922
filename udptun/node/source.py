"""Make the lease source that the daemon was told to use, and load no other."""

from __future__ import annotations

from ..leases.base import LeaseSource
from .config import NodeConfig


def make_source(config: NodeConfig) -> LeaseSource:
    """FieldError, ImportError: what the store needs is not installed."""
    if config.etcd is not None:
        from ..leases.etcd.source import EtcdSource

        return EtcdSource(config.etcd)
    if config.kube is not None:
        from ..leases.kube.source import KubeSource

        return KubeSource(config.kube)
    from ..leases.file import FileSource

    assert config.hosts is not None
    return FileSource(config.hosts, config.node_name)
