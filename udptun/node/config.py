"""The configuration of one node daemon. Frozen; a contradiction raises FieldError.

Owns: the defaults, which are flannel's where flannel has the option, else those of the instance.
Does not depend on the syntax of the command line (``udptun.cli.node``), stores, or interfaces. A
FieldError names the option. Pure data, imports nothing heavy; any thread.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FieldError
from ..instance import Instance
from ..leases.base import SourceConfig
from ..model import MAX_PORT, IPAddress
from .backends import MODES
from .process.launch import FORWARD_FILE

FORWARDERS = ("spawn", "external")
ANY_ADDRESS = ipaddress.IPv4Address("0.0.0.0")
_FROM_INSTANCE: Any = None  # __post_init__ sets it


@dataclass(frozen=True, slots=True)
class InterfaceOptions:
    """Which interface leads to the other nodes. The fields are in flannel's order of choice.

    names        addresses or names of interfaces, of which the first that exists is used
    regexes      searched for in each interface's name and address, if no name was found
    can_reach    the interface of the kernel's route to this address
    public_ip    published instead of the interface's own address; if it is local and nothing above
                 is given, it selects the interface too
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
    instance          the name from which all names that the daemon creates are derived
    backend           a backend's name or "auto"; None: as net-conf.json says
    advertise         publish in our lease what this node supports beyond flannel
    subnet_file       flannel's subnet.env
    iptables_resync   seconds between checks of the firewall rules
    tun               name of the forwarder's device
    control           the forwarder's socket
    forwarder         "spawn": start one if none answers; "external": another program starts it
    forward_file      the forwarder's options, for its --wait-for; default: in the directory of
                      ``control``
    state_dir         kept over restarts: the cached leases, the forwarder's table
    healthz_port      0: no health server
    cleanup           remove everything that a daemon with this configuration created, and end
    """

    source: SourceConfig
    interface: InterfaceOptions = field(default_factory=InterfaceOptions)
    instance: Instance = field(default_factory=Instance)
    backend: str | None = None
    advertise: bool = True
    subnet_file: Path = _FROM_INSTANCE
    ip_masq: bool = False
    iptables_forward_rules: bool = True
    iptables_resync: int = 5
    tun: str = _FROM_INSTANCE
    control: Path = _FROM_INSTANCE
    forwarder: str = "spawn"
    forward_file: Path = _FROM_INSTANCE
    state_dir: Path = _FROM_INSTANCE
    healthz_ip: IPAddress = ANY_ADDRESS
    healthz_port: int = 0
    cleanup: bool = False

    def __post_init__(self) -> None:
        if self.backend is not None and self.backend not in MODES:
            raise FieldError("backend", self.backend, " or ".join(MODES))
        if self.forwarder not in FORWARDERS:
            raise FieldError("forwarder", self.forwarder, " or ".join(FORWARDERS))
        if self.iptables_resync < 1:
            raise FieldError("iptables-resync", self.iptables_resync, "at least 1 second")
        if not 0 <= self.healthz_port <= MAX_PORT:
            raise FieldError("healthz-port", self.healthz_port, f"from 0 (off) to {MAX_PORT}")
        for name, default in (
            ("subnet_file", self.instance.subnet_file), ("tun", self.instance.tun),
            ("control", self.instance.control_socket()), ("state_dir", self.instance.state_dir),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.forward_file is None:
            object.__setattr__(self, "forward_file", self.control.with_name(FORWARD_FILE))
