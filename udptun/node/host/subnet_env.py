"""subnet.env: this node's subnet and MTU, for the CNI plugin that attaches pods.

Owns: what is written. The format is flannel's, because the CNI plugin (udptun/cni/node.py reads the
file), shell scripts that source the file, and systemd's EnvironmentFile read it. Does not depend on
the source of a lease.
The calls block, but the file has only a few hundred bytes. Any thread.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from dataclasses import dataclass
from pathlib import Path

from ...env_file import assignments, network4, network6
from ...errors import FieldError
from ...files import make_directory, replace_file
from ...leases.base import Subnets

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
        values = assignments(path.read_bytes().decode(errors="replace"))
    except FileNotFoundError:
        return Subnets()
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
