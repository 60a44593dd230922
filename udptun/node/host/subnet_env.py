"""subnet.env: this node's subnet and MTU, for the CNI plugin that attaches pods.

Owns: the file's format. The format is flannel's, because the CNI plugin, shell scripts that source
the file, and systemd's EnvironmentFile read the file. Does not depend on the source of a lease.
The calls block, but the file has only a few hundred bytes. Any thread.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ...env_file import assignments, network4, network6
from ...errors import FieldError
from ...files import make_directory, replace_file
from ...leases.base import Subnets
from ...model import MAX_MTU, MIN_MTU, parse_number

log = logging.getLogger(__name__)

MODE, DIRECTORY_MODE = 0o644, 0o755  # every program on the host may read the file


@dataclass(frozen=True, slots=True)
class SubnetEnv:
    """The content of one subnet.env.

    ``network`` and ``subnet`` are both set or both None. ``network6`` and ``subnet6`` are both set
    or both None.

    subnet   the lease's prefix, for example 10.42.1.0/24. The file contains the first host address
             of the prefix, 10.42.1.1/24.
    mtu      the largest inner packet, in bytes
    ip_masq  True: udptun masquerades, so the CNI plugin does not need to
    """

    network: ipaddress.IPv4Network | None
    subnet: ipaddress.IPv4Network | None
    network6: ipaddress.IPv6Network | None
    subnet6: ipaddress.IPv6Network | None
    mtu: int
    ip_masq: bool

    def text(self) -> str:
        """Return the text of the file. The text is byte for byte the text that flannel writes."""
        lines = []
        if self.network and self.subnet:
            lines += [f"FLANNEL_NETWORK={self.network}",
                      f"FLANNEL_SUBNET={self.subnet[1]}/{self.subnet.prefixlen}"]
        if self.network6 and self.subnet6:
            lines += [f"FLANNEL_IPV6_NETWORK={self.network6}",
                      f"FLANNEL_IPV6_SUBNET={self.subnet6[1]}/{self.subnet6.prefixlen}"]
        lines += [f"FLANNEL_MTU={self.mtu}", f"FLANNEL_IPMASQ={str(self.ip_masq).lower()}"]
        return "".join(f"{line}\n" for line in lines)

    @classmethod
    def parse(cls, text: str, where: str = "") -> Self:
        """Parse the text of the file. Unknown variables are ignored.

        where  the file's name for the error
        Raises FieldError if a variable is missing or invalid.
        """
        values = assignments(text)
        has_v6 = bool({"FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET"} & values.keys())
        has_v4 = not has_v6 or bool({"FLANNEL_NETWORK", "FLANNEL_SUBNET"} & values.keys())
        masq = values.get("FLANNEL_IPMASQ")
        if masq not in ("true", "false"):
            raise FieldError("FLANNEL_IPMASQ", masq, "true or false", where)
        return cls(
            network4("FLANNEL_NETWORK", values, where) if has_v4 else None,
            network4("FLANNEL_SUBNET", values, where) if has_v4 else None,
            network6("FLANNEL_IPV6_NETWORK", values, where) if has_v6 else None,
            network6("FLANNEL_IPV6_SUBNET", values, where) if has_v6 else None,
            parse_number("FLANNEL_MTU", values.get("FLANNEL_MTU"), MIN_MTU, MAX_MTU, where),
            masq == "true",
        )

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read the file. Return None if the file does not exist. Raises FieldError, OSError."""
        text = _read(path)
        return None if text is None else cls.parse(text, str(path))

    def write(self, path: Path) -> bool:
        """Replace the file atomically. Raises OSError.

        Return False, and do not write, if the file already has this content and mode.
        """
        text = self.text().encode()
        with contextlib.suppress(OSError):
            if path.read_bytes() == text and path.stat().st_mode & 0o777 == MODE:
                return False
        make_directory(path.parent, DIRECTORY_MODE)
        replace_file(path, [text], MODE)
        return True


def former_subnets(path: Path) -> Subnets:
    """Return the subnets in the file, which this node had last.

    An invalid value is only logged, because the node can still request the subnet of the other IP
    version.
    """
    try:
        values = assignments(_read(path) or "")
    except OSError as error:
        log.warning("the former subnet is not known: %s cannot be read: %s", path, error)
        return Subnets()
    v4, v6 = None, None
    try:
        if "FLANNEL_SUBNET" in values:
            v4 = network4("FLANNEL_SUBNET", values, str(path))
    except FieldError as error:
        log.warning("the former subnet is not known: %s", error)
    try:
        if "FLANNEL_IPV6_SUBNET" in values:
            v6 = network6("FLANNEL_IPV6_SUBNET", values, str(path))
    except FieldError as error:
        log.warning("the former IPv6 subnet is not known: %s", error)
    return Subnets(v4, v6)


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return None
