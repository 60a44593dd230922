"""The list of lease sources, and the one function that opens a source from its configuration.

Each source is a package with two modules: ``config``, which the command line imports at every
start, and ``source``, which is imported only if this source is selected. Only ``udptun.cli.node``,
which selects the source, names a single one. CONTRIBUTING.md has the steps to add a source.
Any thread.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

from ..errors import UdptunError
from .base import LeaseSource, LocalAddresses, SourceConfig


class SourceType(NamedTuple):
    """One entry of the list.

    kind    the ``kind`` of the source's configuration class
    module  relative to this package; has ``open_source(config, local_addresses)``
    extra   the optional dependency group in pyproject.toml, "" if it needs none
    """

    kind: str
    module: str
    extra: str = ""


SOURCES = (
    SourceType("file", ".file.source"),
    SourceType("etcd", ".etcd.source", extra="etcd"),
    SourceType("kubernetes", ".kube.source", extra="kube"),
)


class NotInstalled(UdptunError):
    """A Python package that the selected source needs is not installed."""

    def __init__(self, error: ImportError, extra: str) -> None:
        super().__init__(f"{error}: pip install 'udptun[{extra}]'")


def make_source(config: SourceConfig, local_addresses: LocalAddresses) -> LeaseSource:
    """Return the source for ``config``. Raises NotInstalled, FieldError."""
    source_type = next(entry for entry in SOURCES if entry.kind == config.kind)
    try:
        module = import_module(source_type.module, __package__)
    except ImportError as error:
        if not source_type.extra:
            raise
        raise NotInstalled(error, source_type.extra) from error
    source: LeaseSource = module.open_source(config, local_addresses)
    return source
