"""What the daemon is told at start. Frozen; what contradicts itself is refused here, by field.

Owns the defaults, which are flannel's where flannel has the option. Refuses to know how an option
is spelled on the command line (``udptun.cli.node``) and what a store or an interface is made of.
FieldError names the option. Pure data, imports nothing heavy: from any thread.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..control.protocol import DEFAULT_SOCKET
from ..errors import FieldError
from ..leases.base import SourceConfig
from ..model import IPAddress

BACKENDS = ("auto", "udp", "vxlan")
FORWARDERS = ("spawn", "external")
SUBNET_FILE = Path("/run/flannel/subnet.env")
STATE_DIR = Path("/var/lib/udptun")
ANY_ADDRESS = ipaddress.IPv4Address("0.0.0.0")


@dataclass(frozen=True, slots=True)
class InterfaceOptions:
    """Which interface leads to the other nodes. flannel's order: as the fields stand here.

    names        addresses or names of interfaces, the first that is there
    regexes      searched for in each interface's name and address, when no name was found
    can_reach    the interface of the kernel's route to this address
    public_ip    published in the place of the interface's own address; where it is local and
                 nothing above is given, it chooses the interface as well
    """

    names: tuple[str, ...] = ()
    regexes: tuple[str, ...] = ()
    can_reach: IPAddress | None = None
    public_ip: ipaddress.IPv4Address | None = None
    public_ipv6: ipaddress.IPv6Address | None = None

    def __post_init__(self) -> None:
        for regex in self.regexes:
            try:
                re.compile(regex)
            except re.error as exc:
                raise FieldError("iface-regex", regex, f"a regular expression ({exc})") from None


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """One node daemon.

    source            where leases come from
    backend           "auto", "udp", "vxlan"; None: what net-conf.json says
    advertise         say in our lease what we can do beyond flannel
    subnet_file       flannel's subnet.env
    iptables_resync   seconds between looks at the firewall rules
    tun               name of the forwarder's device
    control           the forwarder's socket
    forwarder         "spawn": start one where none answers; "external": somebody else does
    forward_file      what the forwarder shall be is written there; default: beside ``control``
    state_dir         kept over restarts: the last known leases, the forwarder's table
    healthz_port      0: no health server
    cleanup           remove all that a daemon with this configuration made, and end
    """

    source: SourceConfig
    interface: InterfaceOptions = field(default_factory=InterfaceOptions)
    backend: str | None = None
    advertise: bool = True
    subnet_file: Path = SUBNET_FILE
    ip_masq: bool = False
    iptables_forward_rules: bool = True
    iptables_resync: int = 5
    tun: str = "udptun0"
    control: Path = Path(DEFAULT_SOCKET)
    forwarder: str = "spawn"
    forward_file: Path = None  # type: ignore[assignment]  # __post_init__ completes it
    state_dir: Path = STATE_DIR
    healthz_ip: IPAddress = ANY_ADDRESS
    healthz_port: int = 0
    cleanup: bool = False

    def __post_init__(self) -> None:
        if self.backend is not None and self.backend not in BACKENDS:
            raise FieldError("backend", self.backend, "auto, udp or vxlan")
        if self.forwarder not in FORWARDERS:
            raise FieldError("forwarder", self.forwarder, "spawn or external")
        if self.iptables_resync < 1:
            raise FieldError("iptables-resync", self.iptables_resync, "at least 1 second")
        if not 0 <= self.healthz_port <= 65535:
            raise FieldError("healthz-port", self.healthz_port, "from 0 (off) to 65535")
        if self.forward_file is None:
            object.__setattr__(self, "forward_file", self.control.with_name("forward.json"))
