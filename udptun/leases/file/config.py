"""The configuration of a hosts file source.

The command line imports this module at every start, so it imports only small modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class FileConfig:
    """The file, and the name of our node in the file.

    node_name  "": use the node that has our hostname; if there is none, use the node that has one
               of our addresses
    """

    kind: ClassVar[str] = "file"
    no_node_data: ClassVar[str] = (
        "a hosts file does not contain data of a node's backend, such as the MAC address of VXLAN"
    )

    path: Path
    node_name: str = ""

    @property
    def store_id(self) -> str:
        # With another name, the leases of the cache would give this host another node's subnet.
        return f"file {self.path} {self.node_name}".rstrip()

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)
