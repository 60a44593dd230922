"""The two documents of a take-over: what a forwarder has, and what it has counted.

Owns their content and its form as JSON. As in the messages, unknown fields are ignored, and missing
ones have their defaults. Times are nanoseconds or seconds of the monotonic clock, which all
processes of a host share. Does no input or output. Threading: pure functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from ..drops import DECAP, ENCAP
from ..model import Peer, PeerError
from .message import NUMBER_MAX, TakeOverError, from_json, has_type, read_object

_32_BITS = 0xFFFF_FFFF
ENDPOINT_BYTES = 20  # in the maps of the express path


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
class StateDocument:
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
class CountersDocument:
    """The last values of everything that the running forwarder counts and measures.

    packets, drops, peer_errors  as Core returns them
    workers  the counters of each worker
    peers    counters, path MTUs and errors by peer, see ``peer_to_json``
    probes   the paths that are probed, by endpoint
    probe_counts  numbers of probes
    events   the latest events
    gone     by direction: packets and bytes of the peers that have left
    send_errors  refused sends by the name of the errno
    takeovers_n  number of take-overs so far
    express      what the express path has counted in the maps that are handed over, by total.
                 ``packets`` and ``drops`` contain it
    express_before  the same in the maps of earlier forwarders
    express_peers   sent packets and bytes, received packets and bytes in the map that is handed
                 over, by endpoint as there. ``peers`` and ``gone`` contain them
    """

    packets: dict[str, dict[str, int]] = field(default_factory=dict)
    drops: list[list[Any]] = field(default_factory=list)
    peer_errors: dict[str, int] = field(default_factory=dict)
    workers: list[dict[str, Any]] = field(default_factory=list)
    peers: list[dict[str, Any]] = field(default_factory=list)
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    probe_counts: dict[str, int] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    gone: dict[str, dict[str, int]] = field(default_factory=dict)
    send_errors: dict[str, int] = field(default_factory=dict)
    takeovers_n: int = 0
    express: dict[str, int] = field(default_factory=dict)
    express_before: dict[str, int] = field(default_factory=dict)
    express_peers: dict[str, list[int]] = field(default_factory=dict)


D = TypeVar("D", StateDocument, CountersDocument)


def dump(document: StateDocument | CountersDocument) -> bytes:
    return json.dumps(asdict(document)).encode()


def load(kind: type[D], text: bytes) -> D:
    """Raises TakeOverError."""
    return from_json(kind, read_object(text, "the document"))


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
    error = values.get("last_error")
    return Peer(
        address=_address(values, "address", (4, 16)), port=_number(values, "port", 0xFFFF),
        path_mtu=_number(values, "path_mtu", _32_BITS), path_mtu_ns=_number(values, "path_mtu_ns"),
        df_mtu=_number(values, "df_mtu", _32_BITS),
        encap_packets=_number(values, "encap_packets"), encap_bytes=_number(values, "encap_bytes"),
        decap_packets=_number(values, "decap_packets"), decap_bytes=_number(values, "decap_bytes"),
        last_seen=None, probe=False, last_rx_ns=_number(values, "last_rx_ns"),
        errors_n=_number(values, "errors_n"), last_error=None if error is None else _error(error),
    )


def _error(values: Any) -> PeerError:
    if not isinstance(values, dict):
        raise _wrong("last_error", values, "an object or null")
    origin = values.get("origin", "send")
    if not isinstance(origin, str):
        raise _wrong("origin", origin, "a text")
    return PeerError(
        errno=_number(values, "errno", _32_BITS), origin=origin,
        type=_number(values, "type", 0xFF), code=_number(values, "code", 0xFF),
        reporter=_address(values, "reporter", (0, 4, 16)), time_ns=_number(values, "time_ns"),
    )


def _number(values: dict[str, Any], name: str, highest: int = NUMBER_MAX) -> int:
    value = values.get(name, 0)
    if type(value) is not int or not 0 <= value <= highest:
        raise _wrong(name, value, f"a number from 0 to {highest}")
    return value


def _address(values: dict[str, Any], name: str, sizes: tuple[int, ...]) -> bytes:
    """Return an address in packed form. The core relies on its size."""
    text = values.get(name, "")
    try:
        address = bytes.fromhex(text)
    except (TypeError, ValueError):
        address = None
    if address is None or len(address) not in sizes:
        raise _wrong(name, text, f"hexadecimal digits of {' or '.join(map(str, sizes))} bytes")
    return address


def _wrong(name: str, value: Any, expected: str) -> TakeOverError:
    text = type(value).__name__ if isinstance(value, dict | list) else f"{value!r:.60}"
    return TakeOverError(f"the document: {name}: {text}: expected {expected}")


def drops_of(counted: CountersDocument) -> list[tuple[str, str, int]]:
    """Return the rows of ``drops``: reason, direction, number. Raises TakeOverError."""
    for row in counted.drops:
        if len(row) < 3 or not has_type(row[:2], list[str]) or not has_type(row[2], int):
            raise _wrong("drops", row, "rows of a reason, a direction and a number")
    return [(row[0], row[1], row[2]) for row in counted.drops]


def express_peers_of(counted: CountersDocument) -> dict[bytes, tuple[int, ...]]:
    """Return ``express_peers`` by endpoint. Raises TakeOverError."""
    found = {}
    for endpoint, numbers in counted.express_peers.items():
        try:
            key = bytes.fromhex(endpoint)
        except ValueError:
            key = b""
        if len(key) != ENDPOINT_BYTES or len(numbers) != 4:
            raise _wrong("express_peers", endpoint, "endpoints, each with 4 numbers")
        found[key] = tuple(numbers)
    return found


def packets_of(
    counted: CountersDocument, directions: dict[str, dict[str, int]]
) -> dict[str, dict[str, int]]:
    """Return the packet counters of the directions and kinds that both versions have."""
    return {
        direction: {name: n for name, n in counts.items() if name in directions[direction]}
        for direction, counts in counted.packets.items() if direction in directions
    }


def gone_of(counted: CountersDocument) -> dict[str, dict[str, int]]:
    """Return packets and bytes of the peers that have left, by direction. An earlier version does
    not send them. Raises TakeOverError."""
    found = {direction: {"packets": 0, "bytes": 0} for direction in (ENCAP, DECAP)}
    for direction, counts in found.items():
        had = counted.gone.get(direction, {})
        for name in counts:
            counts[name] = _number(had, name)
    return found


def gone(
    transferred: dict[str, dict[str, int]], peers: Iterable[Peer]
) -> dict[str, dict[str, int]]:
    """Subtract the counts of these peers from the sums: the rest is from peers that have left."""
    found = {direction: dict(counts) for direction, counts in transferred.items()}
    for peer in peers:
        found[ENCAP]["packets"] -= peer.encap_packets
        found[ENCAP]["bytes"] -= peer.encap_bytes
        found[DECAP]["packets"] -= peer.decap_packets
        found[DECAP]["bytes"] -= peer.decap_bytes
    return found
