"""The list of lease sources, and the one function that opens a source from its configuration.

Each source is a package with at least two modules. The command line imports ``config`` at every
start. ``source`` is imported only if the source is selected. ``udptun.cli.node`` selects the
source; it is the only other module that names single sources. CONTRIBUTING.md has the steps to add
a source.
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
    module  the name of the source's module, relative to this package. The module has the function
            ``open_source(config, local_addresses)``
    extra   the optional dependency group in pyproject.toml; "" if the source needs no such group
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
    """Create the source that ``config`` describes. Raises NotInstalled, FieldError."""
    source_type = next(entry for entry in SOURCES if entry.kind == config.kind)
    try:
        module = import_module(source_type.module, __package__)
    except ImportError as error:
        if not source_type.extra:
            raise
        raise NotInstalled(error, source_type.extra) from error
    source: LeaseSource = module.open_source(config, local_addresses)
    return source
