"""The two documents of a take-over: what a forwarder has, and what it has counted.

Owns their content and its form as JSON. As in the messages, unknown fields are ignored, and missing
ones have their defaults. Times are nanoseconds or seconds of the monotonic clock, which all
processes of a host share. Does no input or output. Threading: pure functions.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from ..model import Peer, PeerError
from .message import TakeOverError, from_json


@dataclass(frozen=True, slots=True)
class Device:
    """The TUN device, with the results of its probes (``device.tun``)."""

    name: str = ""
    vnet_hdr: bool = False
    features: list[str] = field(default_factory=list)
    off: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Socket:
    """One UDP socket, with the results of its probes (``net.udp``). Sockets are in the order of the
    workers, and for each worker in the order of its endpoints."""

    endpoint: str = ""
    features: list[str] = field(default_factory=list)
    off: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Having:
    """What the running forwarder has, apart from its descriptors and the route table.

    mtu     MTU of the TUN
    off     offloads that workers have lost at run time, with the cause
    routes  the route table, in the grammar of a route file
    peers   path MTUs by peer, see ``peer_to_json``
    paths   the files of the listening sockets and locks among the descriptors, by name
    """

    generation: int = 0
    mtu: int = 0
    off: dict[str, str] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)
    sockets: list[dict[str, Any]] = field(default_factory=list)
    routes: str = ""
    peers: list[dict[str, Any]] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Counted:
    """The last values of everything that the running forwarder counts and measures.

    packets, drops, peer_errors  as Core returns them
    workers  the counters of each worker
    peers    counters, path MTUs and errors by peer, see ``peer_to_json``
    probes   the paths that are probed, by endpoint
    probe_counts  numbers of probes
    events   the latest events
    """

    packets: dict[str, dict[str, int]] = field(default_factory=dict)
    drops: list[list[Any]] = field(default_factory=list)
    peer_errors: dict[str, int] = field(default_factory=dict)
    workers: list[dict[str, Any]] = field(default_factory=list)
    peers: list[dict[str, Any]] = field(default_factory=list)
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    probe_counts: dict[str, int] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)


D = TypeVar("D", Having, Counted)


def dump(document: Having | Counted) -> bytes:
    return json.dumps(asdict(document)).encode()


def load(kind: type[D], text: bytes) -> D:
    """Raises TakeOverError."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise TakeOverError(f"the document is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise TakeOverError("the document is not a JSON object")
    return from_json(kind, values)


def peer_to_json(peer: Peer) -> dict[str, Any]:
    error = peer.last_error
    return {
        "address": peer.address.hex(), "port": peer.port, "path_mtu": peer.path_mtu,
        "path_mtu_ns": peer.path_mtu_ns, "df_mtu": peer.df_mtu, "encap_packets": peer.encap_packets,
        "encap_bytes": peer.encap_bytes, "decap_packets": peer.decap_packets,
        "decap_bytes": peer.decap_bytes, "last_rx_ns": peer.last_rx_ns, "errors_n": peer.errors_n,
        "last_error": None if error is None else
        error._asdict() | {"reporter": error.reporter.hex()},
    }


def peer_from_json(values: dict[str, Any]) -> Peer:
    """Raises TakeOverError."""
    def number(name: str) -> int:
        return int(values.get(name, 0))

    try:
        error = values.get("last_error")
        return Peer(
            address=bytes.fromhex(values["address"]), port=number("port"),
            path_mtu=number("path_mtu"), path_mtu_ns=number("path_mtu_ns"), df_mtu=number("df_mtu"),
            encap_packets=number("encap_packets"), encap_bytes=number("encap_bytes"),
            decap_packets=number("decap_packets"), decap_bytes=number("decap_bytes"),
            last_seen=None, probe=False, last_rx_ns=number("last_rx_ns"),
            errors_n=number("errors_n"), last_error=None if error is None else _error(error),
        )
    except (ValueError, KeyError, TypeError) as wrong:
        raise TakeOverError(f"a peer of the document is not valid: {wrong!r}") from None


def _error(values: dict[str, Any]) -> PeerError:
    return PeerError(
        errno=int(values.get("errno", 0)), origin=str(values.get("origin", "send")),
        type=int(values.get("type", 0)), code=int(values.get("code", 0)),
        reporter=bytes.fromhex(values.get("reporter", "")),
        time_ns=int(values.get("time_ns", 0)),
    )


def packets_of(
    counted: Counted, directions: dict[str, dict[str, int]]
) -> dict[str, dict[str, int]]:
    """Return the packet counters of the directions and kinds that both versions have."""
    return {
        direction: {name: int(n) for name, n in counts.items() if name in directions[direction]}
        for direction, counts in counted.packets.items() if direction in directions
    }
