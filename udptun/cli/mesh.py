"""The peers by name: what the node daemon and the forwarder report about each, in one row.

Owns the combination of the two answers (``GET /v1/node`` and ``GET /v1/status``), and the look-up
of a peer by what a person types. A row always has the same keys. A value that was not measured is
None. Opens no connection. Pure functions: any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..model import IPAddress

Row = dict[str, Any]

NOT_PROBED = "not probed"
# The values of ``state``, the worst first. A peer with several subnets has its worst state.
STATES = ("no path", "refused", "unreachable", "limited", "unknown", NOT_PROBED, "reachable")
MEASURED = ("rtt_us", "loss", "last_answer", "largest_size")


def mesh(node: Mapping[str, Any] | None, peers: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return one row per peer, sorted by name.

    node   the answer of the node daemon; None: there is none
    peers  the peers of the forwarder; empty: there is none
    """
    peers = [*peers]
    by_subnet = {subnet: peer for peer in peers for subnet in peer["subnets"]}
    rows: dict[str, Row] = {}
    known: set[str] = set()  # endpoints of the peers that have a name
    for pair in [] if node is None else node["peers"]:
        peer = by_subnet.get(pair["subnet"])
        if peer is not None:
            known.add(peer["endpoint"])
        row = _of_pair(pair, peer)
        former = rows.get(row["name"])
        rows[row["name"]] = row if former is None else _joined(former, row)
    for state, key in (("no path", "no_path"), ("refused", "refused")):
        for name, reason in ({} if node is None else node[key]).items():
            row = rows.setdefault(name, _row(name, []))
            row |= {"state": state, "reason": reason, "path": "none" if key == "no_path"
                    else row["path"]}
    for peer in peers:
        if peer["endpoint"] not in known:
            rows[peer["endpoint"]] = _of_peer(peer)
    return sorted(rows.values(), key=lambda row: natural(row["name"]))


def natural(text: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts ``n2`` before ``n10``."""
    parts: list[tuple[int, int, str]] = []
    digits = ""
    for char in f"{text}\0":  # the last character ends a number
        if char.isascii() and char.isdigit():
            digits += char
            continue
        if digits:
            parts.append((0, int(digits), ""))
            digits = ""
        parts.append((1, 0, char))
    return parts[:-1]


def find(rows: Iterable[Row], target: str) -> Row | None:
    """Return the peer with this name, subnet, endpoint or public address; None: there is none.

    An address may have any spelling.
    """
    names = (target, spelled(target))
    for row in rows:
        if target == row["name"] or any(
                name in row["subnets"] or _endpoint(row, name) for name in names):
            return row
    return None


def find_behind(rows: Iterable[Row], address: IPAddress) -> Row | None:
    """Return the peer whose subnet contains this address, for example of a pod.

    If there are several such subnets, the one with the longest prefix counts.
    """
    from ipaddress import ip_network

    found = [(subnet.prefixlen, row) for row in rows
             for subnet in map(ip_network, row["subnets"]) if address in subnet]
    return max(found, key=lambda one: one[0])[1] if found else None


def endpoint_of(row: Row, target: str) -> str | None:
    """Return the endpoint that ``target`` names: by itself, by its address or by a subnet behind
    it. Any other target of ``find`` names the first endpoint. None: the peer has none."""
    target = spelled(target)
    return _endpoint(row, target) or next(
        (endpoint for endpoint, subnets in row["endpoints"].items() if target in subnets),
        row["endpoint"])


def spelled(target: str) -> str:
    """Return an address, a subnet or an endpoint in its usual spelling: ``2001:DB8::2`` and
    ``[2001:db8:0::2]`` are ``2001:db8::2``. Other text is returned unchanged."""
    from ipaddress import ip_address, ip_network

    host, _, port = target.rpartition(":")
    with suppress(ValueError):
        return str(ip_address(_bare(target)))
    with suppress(ValueError):
        return str(ip_network(target, strict=False))
    with suppress(ValueError):
        address = ip_address(_bare(host))
        if port.isdecimal():
            return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
    return target


def _bare(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _endpoint(row: Row, target: str) -> str | None:
    return next((one for one in row["endpoints"] if target in (one, host_of(one))), None)


def host_of(endpoint: str) -> str:
    """Return the address of an endpoint: ``[2001:db8::1]:8285`` -> ``2001:db8::1``."""
    return endpoint.rpartition(":")[0].strip("[]")


def words(row: Row) -> str:
    """Return the text in which a filter is searched, in lower case."""
    return " ".join([row["name"], row["state"], *row["subnets"], *row["endpoints"]]).lower()


def why(row: Row) -> str:
    """Return the reasons of the state and of the path."""
    return "; ".join(filter(None, (row["reason"], row["path_reason"])))


def _row(name: str, subnets: list[str]) -> Row:
    return {
        "name": name, "subnets": subnets, "endpoint": None, "endpoints": {}, "path": None,
        "path_since": None, "path_reason": "", "state": "unknown", "since": None, "reason": "",
        **dict.fromkeys(MEASURED), "path_mtu": None, "last_seen_seconds": None, "sent": None,
        "received": None, "errors": None, "last_error": None, "probed": False, "paths": {},
    }


def _of_pair(pair: Mapping[str, Any], peer: Mapping[str, Any] | None) -> Row:
    row = _row(pair["key"], [pair["subnet"]]) | {
        key: pair[key] for key in ("path", "path_since", "path_reason", "state", "since", "reason")}
    row["paths"] = pair["paths"]
    measured = pair["paths"].get(pair["path"]) or {}
    row |= {name: measured.get(name) for name in MEASURED}
    row["endpoint"] = (pair["paths"].get("udp") or {}).get("endpoint")
    if peer is not None:
        row |= _counted(peer)
    if row["endpoint"] is not None:
        row["endpoints"] = {row["endpoint"]: row["subnets"]}
    return row


def _of_peer(peer: Mapping[str, Any]) -> Row:
    row = _row(peer["endpoint"], peer["subnets"]) | _counted(peer)
    row["endpoints"] = {peer["endpoint"]: peer["subnets"]}
    probe = peer.get("probe")
    row |= {"path": "udp", "state": NOT_PROBED}
    if probe is not None:
        limited = probe["state"] == "reachable" and probe["full_size_passes"] is False
        row |= {name: probe[name] for name in ("since", "reason", *MEASURED)}
        row["state"] = "limited" if limited else probe["state"]
        row["paths"] = {"udp": probe}
    return row


def _counted(peer: Mapping[str, Any]) -> Row:
    return {
        "endpoint": peer["endpoint"], "path_mtu": peer["path_mtu"], "sent": peer["encap"],
        "received": peer["decap"], "last_seen_seconds": peer["last_seen_seconds"],
        "errors": peer["errors"], "last_error": peer["last_error"],
        "probed": peer.get("probe") is not None,
    }


def _joined(one: Row, other: Row) -> Row:
    """Return the row of a peer with one more subnet, ``other``: the worse state, and the sum of the
    packets. Subnets behind the same endpoint share its counters."""
    worse = min(one, other, key=lambda row: STATES.index(row["state"]))
    endpoints = dict(one["endpoints"])
    for endpoint, subnets in other["endpoints"].items():
        endpoints[endpoint] = endpoints.get(endpoint, []) + subnets
    joined = worse | {"subnets": one["subnets"] + other["subnets"], "endpoints": endpoints}
    joined["endpoint"] = next(iter(endpoints), None)
    if endpoints.keys() != one["endpoints"].keys():
        joined |= {side: _sum(one[side], other[side]) for side in ("sent", "received")}
    else:
        joined |= {side: one[side] or other[side] for side in ("sent", "received")}
    return joined


def _sum(one: Mapping[str, int] | None, other: Mapping[str, int] | None) -> dict[str, int] | None:
    if one is None or other is None:
        found = one or other
        return None if found is None else dict(found)
    return {name: one[name] + other[name] for name in one}
