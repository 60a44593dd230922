"""subnet.env: this node's subnet and MTU, for the CNI plugin that attaches pods.

Owns: the file's format. The format is flannel's, because the CNI plugin, shell scripts that source
the file, and systemd's EnvironmentFile read the file. Does not depend on the source of a lease.
The calls block, but the file has only a few hundred bytes. Any thread.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

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
        values = _values(text)
        has_v6 = bool({"FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET"} & values.keys())
        has_v4 = not has_v6 or bool({"FLANNEL_NETWORK", "FLANNEL_SUBNET"} & values.keys())
        masq = values.get("FLANNEL_IPMASQ")
        if masq not in ("true", "false"):
            raise FieldError("FLANNEL_IPMASQ", masq, "true or false", where)
        return cls(
            _network4("FLANNEL_NETWORK", values, where) if has_v4 else None,
            _network4("FLANNEL_SUBNET", values, where) if has_v4 else None,
            _network6("FLANNEL_IPV6_NETWORK", values, where) if has_v6 else None,
            _network6("FLANNEL_IPV6_SUBNET", values, where) if has_v6 else None,
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
        values = _values(_read(path) or "")
    except OSError as error:
        log.warning("the former subnet is not known: %s cannot be read: %s", path, error)
        return Subnets()
    v4, v6 = None, None
    try:
        if "FLANNEL_SUBNET" in values:
            v4 = _network4("FLANNEL_SUBNET", values, str(path))
    except FieldError as error:
        log.warning("the former subnet is not known: %s", error)
    try:
        if "FLANNEL_IPV6_SUBNET" in values:
            v6 = _network6("FLANNEL_IPV6_SUBNET", values, str(path))
    except FieldError as error:
        log.warning("the former IPv6 subnet is not known: %s", error)
    return Subnets(v4, v6)


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return None


def _values(text: str) -> dict[str, str]:
    """Return the assignments of a file that a shell could source.

    Comments, quotes and ``export`` are handled like in a shell. If a name is assigned several
    times, the last assignment is used.
    """
    values = {}
    for line in text.splitlines():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and not name.startswith("#"):
            values[name.strip()] = value.strip().strip("\"'")
    return values


def _network4(field: str, values: Mapping[str, str], where: str) -> ipaddress.IPv4Network:
    try:
        return ipaddress.IPv4Interface(values.get(field, "")).network
    except ValueError:
        expected = "an IPv4 prefix such as 10.42.1.1/24"
        raise FieldError(field, values.get(field), expected, where) from None


def _network6(field: str, values: Mapping[str, str], where: str) -> ipaddress.IPv6Network:
    try:
        return ipaddress.IPv6Interface(values.get(field, "")).network
    except ValueError:
        expected = "an IPv6 prefix such as fc00:0:0:1::1/64"
        raise FieldError(field, values.get(field), expected, where) from None
