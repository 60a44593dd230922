"""The configuration of a forwarder. Frozen, except for the options that ``adopt`` names.

Values that contradict each other raise a FieldError here, with the name of the field.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union

from ..control.listen import check_peers
from ..device.offload import OffloadRequest
from ..errors import FieldError
from ..instance import Instance
from ..model import (
    ACCELERATES,
    ADMITS,
    MAX_MTU,
    MIN_MTU6,
    MIN_TUN_MTU,
    RESERVED,
    SOURCE_CHECKS,
    Endpoint,
    IPAddress,
    IPNetwork,
    Mark,
    as_endpoint,
    parse_address,
    parse_dscp,
    parse_prefix,
)

_T = TypeVar("_T")
_Some = Union[_T, str, Iterable[Union[_T, str]]]  # noqa: UP007 - X | Y does not take a TypeVar

MAX_WORKERS = 64
IFNAMSIZ = 16  # linux/if.h
MAX_SUBNETS = 6  # the core has space for these and for the addresses of the TUN


@dataclass(frozen=True, slots=True)
class ForwarderConfig:
    """The configuration of one forwarder.

    Text is accepted for each value, and one value where several are possible:
    ``ForwarderConfig("192.0.2.1", addresses="10.244.1.0", networks=["10.244.0.0/16"])``.

    listen        endpoints on the underlay: at least one, at most one per family
    addresses     addresses of the TUN, at most one per family; each is set as a /32 or /128
    networks      overlay prefixes that are routed through the TUN
    subnets       this node's own prefixes of the overlay, for ``admit``. A route to one of them, or
                  to a part of one, is reported as an error
    admit         "any": deliver packets to any inner destination; "own": only to ``addresses`` and
                  ``subnets``
    mark          mark of all datagrams that the forwarder sends; None: no mark
    dscp          DSCP of the datagrams, 0 to 63; None or "inherit": that of the packet
    mtu           MTU of the TUN in bytes; None: the underlay's MTU minus the outer headers, with
                  IPv6 inside at least 1280
    workers       number of worker threads; None: chosen from the number of cores
    control       Unix socket of the control API; None: no control API
    routes_file   file that is read at start and on ``reload``. Each line is a route:
                  ``DST via IP [port P] [mtu M] [source-port P] [probe] [express] [ecn]``
    state_file    copy of the active table. At start, a valid state_file is loaded instead of
                  routes_file
    accelerate    "auto": packets to and from the peers whose routes have ``express`` may pass in
                  the kernel; "off": none
    takeover      Unix socket at which another forwarder can take over from this one; None: none can
    take_over     take over from the forwarder that answers at ``takeover``, if there is one
    metrics       address and port at which /metrics is served over TCP; None: not served
    metrics_peers number of peers with metrics of their own
    flannel_*     Unix socket or inherited descriptor for flannel's 20-byte control messages
    """

    listen: tuple[Endpoint, ...]
    tun: str = Instance().tun
    addresses: tuple[IPAddress, ...] = ()
    networks: tuple[IPNetwork, ...] = ()
    control: Path | None = None
    routes_file: Path | None = None
    state_file: Path | None = None
    mtu: int | None = None
    workers: int | None = 1
    offload: OffloadRequest = field(default_factory=OffloadRequest)
    source_check: str = SOURCE_CHECKS[0]
    subnets: tuple[IPNetwork, ...] = ()
    admit: str = ADMITS[0]
    mark: Mark | None = None
    dscp: int | None = 0
    accelerate: str = ACCELERATES[0]
    takeover: Path | None = None
    take_over: bool = False
    metrics: Endpoint | None = None
    metrics_peers: int = 0
    flannel_control: Path | None = None
    flannel_control_fd: int | None = None

    @property
    def has_ipv6(self) -> bool:
        """Whether the tunnel carries IPv6."""
        return any(item.version == 6 for item in (*self.addresses, *self.networks))

    if TYPE_CHECKING:

        def __init__(  # as the generated one, but with the types that are accepted
            self, listen: _Some[Endpoint], tun: str = ..., addresses: _Some[IPAddress] = ...,
            networks: _Some[IPNetwork] = ..., control: Path | str | None = ...,
            routes_file: Path | str | None = ..., state_file: Path | str | None = ...,
            mtu: int | None = ..., workers: int | None = ..., offload: OffloadRequest | str = ...,
            source_check: str = ..., subnets: _Some[IPNetwork] = ..., admit: str = ...,
            mark: Mark | str | None = ..., dscp: int | str | None = ...,
            accelerate: str = ..., takeover: Path | str | None = ..., take_over: bool = ...,
            metrics: Endpoint | None = ..., metrics_peers: int = ...,
            flannel_control: Path | str | None = ..., flannel_control_fd: int | None = ...,
        ) -> None: ...

    def _convert(self) -> None:
        """Replace text by the values that it stands for."""
        converted: dict[str, object] = {
            "listen": _each(self.listen, partial(as_endpoint, field="listen")),
            "addresses": _each(self.addresses, partial(parse_address, "addresses")),
            "dscp": parse_dscp(self.dscp),
        }
        for name in ("networks", "subnets"):
            converted[name] = _each(getattr(self, name), partial(parse_prefix, name))
        for name in ("control", "routes_file", "state_file", "takeover", "flannel_control"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str | os.PathLike):
                raise FieldError(name, value, "a path")
            converted[name] = None if value is None else Path(value)
        if not isinstance(self.offload, OffloadRequest):
            if not isinstance(self.offload, str):
                raise FieldError("offload", self.offload, "auto, off or a list of offloads")
            converted["offload"] = OffloadRequest.parse(self.offload)
        if not isinstance(self.tun, str) or not 0 < len(self.tun) < IFNAMSIZ:
            raise FieldError("tun", self.tun, f"a name of 1 to {IFNAMSIZ - 1} characters")
        if self.mark is not None and not isinstance(self.mark, Mark):
            converted["mark"] = Mark.parse(self.mark)
        for name, (low, high) in {
            "mtu": (MIN_TUN_MTU, MAX_MTU), "workers": (1, MAX_WORKERS),
        }.items():
            if (number := getattr(self, name)) is not None and not isinstance(number, int):
                raise FieldError(name, number, f"None, or a whole number from {low} to {high}")
        for name, value in converted.items():
            object.__setattr__(self, name, value)

    def __post_init__(self) -> None:
        self._convert()
        if not self.listen:
            raise FieldError("listen", None, "at least one ADDRESS:PORT")
        _one_per_family("listen", [endpoint.address for endpoint in self.listen])
        _one_per_family("address", self.addresses)
        for endpoint in self.listen:
            if endpoint.address.is_unspecified or endpoint.address.is_multicast:
                expected = "the address of an interface, not a wildcard or multicast address"
                raise FieldError("listen", str(endpoint), expected)
        for address in self.addresses:
            if address.is_unspecified or address.is_multicast or address.is_loopback:
                raise FieldError("address", str(address), "an address of the overlay")
        for network in self.networks:
            _refuse_network(network)
        _check_word("source-check", self.source_check, SOURCE_CHECKS)
        _check_word("admit", self.admit, ADMITS)
        _check_word("accelerate", self.accelerate, ACCELERATES)
        if len(self.subnets) > MAX_SUBNETS:
            raise FieldError("subnet", len(self.subnets), f"at most {MAX_SUBNETS} prefixes")
        if self.mtu is not None and not MIN_TUN_MTU <= self.mtu <= MAX_MTU:
            raise FieldError("mtu", self.mtu, f"auto, or from {MIN_TUN_MTU} to {MAX_MTU}")
        if self.mtu is not None and self.mtu < MIN_MTU6 and self.has_ipv6:
            raise FieldError("mtu", self.mtu, f"at least {MIN_MTU6} for IPv6 inside the tunnel")
        if self.control is not None and self.control == self.flannel_control:
            raise FieldError(
                "flannel-control", str(self.flannel_control), "another path than --control"
            )
        check_peers("metrics-peers", self.metrics_peers)
        if self.workers is not None and not 1 <= self.workers <= MAX_WORKERS:
            raise FieldError("workers", self.workers, f"auto, or from 1 to {MAX_WORKERS}")

    def change(self, mtu: int | None, listen: tuple[Endpoint, ...] | None) -> ForwarderConfig:
        """Return these options with another MTU or other endpoints; None: as now.

        Raises FieldError. ``adopt`` applies the result.
        """
        wanted = replace(
            self, mtu=self.mtu if mtu is None else mtu,
            listen=self.listen if listen is None else listen)
        now, then = ([one.address.version for one in config.listen] for config in (self, wanted))
        if sorted(now) != sorted(then):
            raise FieldError("listen", " ".join(map(str, wanted.listen)),
                             "the IP versions of the present endpoints")
        return wanted

    def adopt(self, wanted: ForwarderConfig) -> None:
        """Take over the two options that can change while the forwarder runs. All parts have this
        object, and read the options when they need them."""
        for name in ("mtu", "listen"):
            object.__setattr__(self, name, getattr(wanted, name))

    def agreed_options(self) -> dict[str, Any]:
        """Return the options in which two forwarders agree if one takes over from the other."""
        return {
            "tun": self.tun, "workers": self.workers_n, "offload": str(self.offload),
            "listen": [str(endpoint) for endpoint in self.listen],
            "address": [str(address) for address in self.addresses],
            "network": [str(network) for network in self.networks],
        }

    @property
    def fingerprint(self) -> str:
        """A text that differs if one of the agreed options differs. Kept descriptors have it in
        their names, because a device with other addresses must not be used again."""
        text = json.dumps(self.agreed_options(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def workers_n(self) -> int:
        """The number of workers. For auto this is at most half of the cores, because the kernel's
        network code needs the other half."""
        if self.workers is not None:
            return self.workers
        return max(1, min(4, len(os.sched_getaffinity(0)) // 2))


def _refuse_network(network: IPNetwork) -> None:
    """Raise FieldError if the route to the network would cut off this host."""
    if network.prefixlen == 0:
        raise FieldError(
            "network", str(network),
            "a prefix length of at least 1, because a route with the length 0 would replace the"
            " host's default route")
    for reserved, name in RESERVED:
        if network.version == reserved.version and network.prefixlen >= reserved.prefixlen and \
                network.network_address in reserved:
            raise FieldError("network", str(network), f"a network outside {reserved} ({name})")


def _each(values: object, convert: Callable[[Any], object]) -> tuple[object, ...]:
    """Convert one value, or each of several."""
    if isinstance(values, Iterable) and not isinstance(values, str | IPNetwork):
        return tuple(map(convert, values))
    return (convert(values),)


def _check_word(name: str, value: str, words: Sequence[str]) -> None:
    if value not in words:
        raise FieldError(name, value, f"{', '.join(words[:-1])} or {words[-1]}")


def _one_per_family(name: str, addresses: Iterable[IPAddress]) -> None:
    seen: set[int] = set()
    for address in addresses:
        if address.version in seen:
            raise FieldError(name, str(address), "at most one IPv4 and one IPv6 address")
        seen.add(address.version)
