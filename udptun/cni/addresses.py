"""The addresses that the IPAM plugin host-local has given away.

Owns: the format of its files: one directory for each network, with one file for each address. Such
a file has two lines, the container's ID and the interface. GC reads the files, because an address
without a saved configuration would never become free again. Does not change them.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # see udptun/cni/__init__.py
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

DATA_DIR = "/var/lib/cni/networks"
_MAX_LEN = 600


def leased(network: str, ipam: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Return the containers and interfaces that have an address of this network.

    ipam  the configuration of the IPAM plugin
    """
    if ipam.get("type") != "host-local":
        return set()
    directory = f"{ipam.get('dataDir') or DATA_DIR}/{network}"
    try:
        names = os.listdir(directory)
    except OSError:
        return set()
    return {pair for name in names if (pair := _holder(directory, name)) is not None}


def _holder(directory: str, name: str) -> tuple[str, str] | None:
    if "." not in name and ":" not in name:  # other files: "lock"
        return None
    if name.startswith("last_reserved_ip"):
        return None
    try:
        with open(f"{directory}/{name}", errors="replace") as file:
            lines = file.read(_MAX_LEN).split()
    except OSError:
        return None
    if len(lines) != 2 or not all(map(str.isprintable, lines)):
        return None
    return lines[0], lines[1]
