"""The configuration of one node daemon.

Owns: the defaults. If flannel has the option, the default is flannel's; else the default comes from
the instance. Does not depend on the syntax of the command line (``udptun.cli.node``), on stores, or
on interfaces. An invalid value raises FieldError, which names the option. The objects are frozen
and contain only data. The module imports nothing that is slow to import. Any thread.
"""

from __future__ import annotations

import ipaddress
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..control.listen import check_peers
from ..errors import FieldError
from ..instance import Instance
from ..leases.base import SourceConfig
from ..model import ACCELERATES, ADMITS, MAX_PORT, Endpoint, IPAddress, Mark
from .backends import MODES
from .process.launch import FORWARD_FILE

FORWARDERS = ("spawn", "external")
MAX_GRACE = 3600
FIREWALLS = ("auto", "nftables", "iptables")
LOOPBACK = ipaddress.IPv4Address("127.0.0.1")
# A bit that kube-proxy (0x4000, 0x8000), the CNI plugin portmap (0x2000), Tailscale (0xff0000) and
# Calico (0xffff0000) do not use by default.
DEFAULT_MARK = Mark(0x1000, 0x1000)
_FROM_INSTANCE: Any = None  # __post_init__ replaces this value by the instance's default


@dataclass(frozen=True, slots=True)
class InterfaceOptions:
    """The options that select the interface for the overlay, in the order in which flannel tries
    them.

    names        addresses or names of interfaces; the first one that exists is used
    regexes      used if no entry of ``names`` exists; each is searched for in the addresses and in
                 the name of each interface
    can_reach    selects the interface of the kernel's route to this address
    public_ip    the address to publish instead of the interface's own address. A local address also
                 selects the interface, if none of the fields above is given.
    public_ipv6  the same for IPv6
    """

    names: tuple[str, ...] = ()
    regexes: tuple[str, ...] = ()
    can_reach: IPAddress | None = None
    public_ip: ipaddress.IPv4Address | None = None
    public_ipv6: ipaddress.IPv6Address | None = None

    def __post_init__(self) -> None:
        for regex in self.regexes:
            interface_pattern(regex)


# The parts of a pattern in which the two rules below look: an escaped character, a character class,
# and a repetition without a lower bound.
_PATTERN_PART = re.compile(r"""
    \\. | \[\^?\]?(?: \\. | \[:\^?\w*:\] | [^]\\] )*\] | \{,\d*\}
""", re.VERBOSE | re.DOTALL)
_CLASS_PART = re.compile(r"\\.|\[:\^?\w*:\]", re.DOTALL)


def interface_pattern(text: str) -> re.Pattern[str]:
    """Compile a value of --iface-regex. Raises FieldError.

    flannel's syntax is RE2. Python refuses most of the syntax that only RE2 has. Two forms have
    another meaning in Python and are refused here: [[:digit:]] and a{,3}. re.ASCII gives the
    escapes for digits and words the meaning that they have in RE2. The library google-re2 is not
    used: it has no wheels for musl, and each node would need a compiled package for one option.
    """
    for part in _PATTERN_PART.findall(text):
        if part.startswith("{"):
            raise FieldError("iface-regex", text, f"{{0{part[1:]} instead of {part}, which RE2 "
                             "does not read as a repetition")
        for inner in _CLASS_PART.findall(part[1:]):
            if inner.startswith("["):
                raise FieldError("iface-regex", text, f"characters such as 0-9 or a-z instead of "
                                 f"{inner}, which only RE2 reads as the name of a class")
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            return re.compile(text, re.ASCII)
    except re.error as exc:
        raise FieldError("iface-regex", text, f"a regular expression ({exc})") from None


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """The options of one node daemon.

    source            the configuration of the store of leases
    instance          the instance; the names of all things that the daemon creates depend on it
    address_grace     seconds to wait before another address is published, after the published one
                      is gone from this host
    backend           a backend's name or "auto"; None: use Backend.Type of net-conf.json
    advertise         publish in our lease the features that this node has in addition to flannel's
    subnet_file       the path of flannel's subnet.env
    firewall          one of FIREWALLS; None: "nftables" if net-conf.json has EnableNFTables, else
                      "auto"
    keep_flannel      do not remove what a former flannel has left on this host. With ``cleanup``,
                      do not remove what a flannel that runs now has taken over
    iptables_resync   seconds between two checks of the firewall rules
    source_port       first and last of the further ports from which our datagrams arrive at
                      other nodes; (): none; None: all if we publish an address that this host
                      does not have, else none
    admit             which inner destinations the forwarder accepts: one of ADMITS
    mark              the mark of the forwarder's datagrams; None: no mark
    dscp              the DSCP of the forwarder's datagrams; None: that of the packet
    accelerate        whether packets may pass in the kernel: one of ACCELERATES
    tun               the name of the forwarder's device
    control           the forwarder's control socket
    forwarder         "spawn": start a forwarder if no forwarder answers; "external": another
                      program starts the forwarder
    forwarder_standby  keep a standby process for the case that the forwarder dies; with "external",
                      it forwards until a forwarder of the other program takes over. None: only with
                      "spawn"
    forward_file      the file with the forwarder's options, which the forwarder reads because of
                      its option --wait-for; default: in the directory of ``control``
    state_dir         the directory of files that must survive a restart: the cached leases and the
                      forwarder's table
    healthz_port      the port of the health server; 0: no health server
    metrics           the address and port at which /metrics is served; None: not served there
    metrics_peers     the number of peers with metrics of their own
    log_format        the format of the logs, also of the forwarder's: "text" or "json"
    take_over         let the daemon of this instance that runs hand over the node
    cleanup           remove everything that a daemon with this configuration created, then exit
    """

    source: SourceConfig
    interface: InterfaceOptions = field(default_factory=InterfaceOptions)
    instance: Instance = field(default_factory=Instance)
    address_grace: float = 10.0
    backend: str | None = None
    advertise: bool = True
    subnet_file: Path = _FROM_INSTANCE
    ip_masq: bool = False
    iptables_forward_rules: bool = True
    firewall: str | None = None
    keep_flannel: bool = False
    iptables_resync: int = 5
    source_port: tuple[int, int] | tuple[()] | None = None
    admit: str = ADMITS[0]
    mark: Mark | None = DEFAULT_MARK
    dscp: int | None = 0
    accelerate: str = ACCELERATES[0]
    tun: str = _FROM_INSTANCE
    control: Path = _FROM_INSTANCE
    forwarder: str = "spawn"
    forwarder_standby: bool | None = None
    forward_file: Path = _FROM_INSTANCE
    state_dir: Path = _FROM_INSTANCE
    healthz_ip: IPAddress = LOOPBACK  # not flannel's 0.0.0.0: the answers name peers and errors
    healthz_port: int = 0
    metrics: Endpoint | None = None
    metrics_peers: int = 0
    log_format: str = "text"
    take_over: bool = False
    cleanup: bool = False

    def __post_init__(self) -> None:
        if self.backend is not None and self.backend not in MODES:
            raise FieldError("backend", self.backend, " or ".join(MODES))
        if self.admit not in ADMITS:
            raise FieldError("admit", self.admit, " or ".join(ADMITS))
        if self.accelerate not in ACCELERATES:
            raise FieldError("accelerate", self.accelerate, " or ".join(ACCELERATES))
        if self.forwarder not in FORWARDERS:
            raise FieldError("forwarder", self.forwarder, " or ".join(FORWARDERS))
        if not 0 <= self.address_grace <= MAX_GRACE:
            raise FieldError("address-grace", self.address_grace, f"from 0 to {MAX_GRACE} s")
        if self.firewall not in (None, *FIREWALLS):
            raise FieldError("firewall", self.firewall, " or ".join(FIREWALLS))
        if self.iptables_resync < 1:
            raise FieldError("iptables-resync", self.iptables_resync, "at least 1 second")
        if not 0 <= self.healthz_port <= MAX_PORT:
            raise FieldError("healthz-port", self.healthz_port, f"from 0 (off) to {MAX_PORT}")
        check_peers("metrics-peers", self.metrics_peers)
        if self.metrics == Endpoint(self.healthz_ip, self.healthz_port or MAX_PORT + 1):
            raise FieldError("metrics", str(self.metrics), "another address than that of the "
                             "health checks, which serve the same metrics")
        for name, default in (
            ("subnet_file", self.instance.subnet_file), ("tun", self.instance.tun),
            ("control", self.instance.control_socket()), ("state_dir", self.instance.state_dir),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.forward_file is None:
            object.__setattr__(self, "forward_file", self.control.with_name(FORWARD_FILE))

    @property
    def wants_standby(self) -> bool:
        if self.forwarder_standby is None:
            return self.forwarder == "spawn"
        return self.forwarder_standby

    @property
    def leaves_to_flannel(self) -> bool:
        """``cleanup`` keeps the VXLAN devices and subnet.env. Only the default instance gives them
        flannel's names."""
        return self.keep_flannel and self.instance.is_default
