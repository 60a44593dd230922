"""What a forwarder is told at start. Frozen; what contradicts itself is refused here, by field."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..device.offload import OffloadRequest
from ..errors import FieldError
from ..model import MIN_MTU6, Endpoint, IPAddress, IPNetwork

SOURCE_CHECKS = ("strict", "peer", "off")
MIN_TUN_MTU = 576  # RFC 791: every host takes datagrams of 576 octets
MAX_TUN_MTU = 65535
MAX_WORKERS = 64


@dataclass(frozen=True, slots=True)
class ForwarderConfig:
    """One forwarder.

    listen        underlay endpoints, one per family at most, at least one
    addresses     of the TUN, one per family at most; each becomes a /32 or /128
    networks      overlay prefixes that get a route through the TUN
    mtu           of the TUN in bytes; None: the underlay's less the outer headers
    workers       threads; None: as many as help on this machine
    control       the Unix socket of the control API; None: no such socket
    routes_file   read at start and on ``reload``; ``DST via IP [port P] [mtu M]`` a line
    state_file    the table in force is kept here, and read in preference to routes_file
    flannel_*     where flannel's 20-byte control messages come from
    """

    listen: tuple[Endpoint, ...]
    tun: str = "udptun0"
    addresses: tuple[IPAddress, ...] = ()
    networks: tuple[IPNetwork, ...] = ()
    control: Path | None = None
    routes_file: Path | None = None
    state_file: Path | None = None
    mtu: int | None = None
    workers: int | None = 1
    offload: OffloadRequest = field(default_factory=OffloadRequest)
    source_check: str = "strict"
    flannel_control: Path | None = None
    flannel_control_fd: int | None = None

    def __post_init__(self) -> None:
        if not self.listen:
            raise FieldError("listen", None, "at least one ADDRESS:PORT")
        _one_per_family("listen", [endpoint.address for endpoint in self.listen])
        _one_per_family("address", self.addresses)
        for endpoint in self.listen:
            if endpoint.address.is_unspecified or endpoint.address.is_multicast:
                raise FieldError("listen", str(endpoint), "the address of one interface")
        for address in self.addresses:
            if address.is_unspecified or address.is_multicast or address.is_loopback:
                raise FieldError("address", str(address), "an address of the overlay")
        if self.source_check not in SOURCE_CHECKS:
            raise FieldError("source-check", self.source_check, "strict, peer or off")
        if self.mtu is not None and not MIN_TUN_MTU <= self.mtu <= MAX_TUN_MTU:
            raise FieldError("mtu", self.mtu, f"auto, or from {MIN_TUN_MTU} to {MAX_TUN_MTU}")
        if self.mtu is not None and self.mtu < MIN_MTU6 and any(
            item.version == 6 for item in (*self.addresses, *self.networks)
        ):
            raise FieldError("mtu", self.mtu, f"at least {MIN_MTU6} for IPv6 inside the tunnel")
        if self.control is not None and self.control == self.flannel_control:
            raise FieldError(
                "flannel-control", str(self.flannel_control), "another path than --control"
            )
        if self.workers is not None and not 1 <= self.workers <= MAX_WORKERS:
            raise FieldError("workers", self.workers, f"auto, or from 1 to {MAX_WORKERS}")

    @property
    def workers_n(self) -> int:
        """Half of the cores at most: the other half runs the kernel's side of the work."""
        if self.workers is not None:
            return self.workers
        return max(1, min(4, len(os.sched_getaffinity(0)) // 2))


def _one_per_family(name: str, addresses: Iterable[IPAddress]) -> None:
    seen: set[int] = set()
    for address in addresses:
        if address.version in seen:
            raise FieldError(name, str(address), "one IPv4 and one IPv6 at most")
        seen.add(address.version)
