"""The fuzz targets in Python: each takes bytes, and fails by any exception that is not allowed.

The first group compares a compiled step with the slow reference (tests/reference): the results are
equal, or both drop the packet for the same reason. The second group parses what a store, a file, a
peer, a client or another forwarder sends: a parser accepts it, or raises FieldError (the control
API and the take-over: an error of their own). What was accepted is the same after it is written and
parsed again.

Owns no state. Does not depend on the fuzzer (tests/fuzz/guided.py).
"""

import functools
import ipaddress
import json
from collections.abc import Callable
from typing import Any

from tests import reference
from tests.reference import Dropped
from udptun import _core
from udptun.control import flannel, protocol
from udptun.errors import FieldError
from udptun.leases import advert
from udptun.leases.base import Attributes
from udptun.leases.etcd import schema as etcd
from udptun.leases.file import schema as hosts_file
from udptun.leases.kube import schema as kube
from udptun.leases.netconf import NetConfig
from udptun.model import Endpoint, Route
from udptun.probe import message
from udptun.takeover import document
from udptun.takeover import message as takeover_message
from udptun.takeover.message import TakeOverError

Target = Callable[[bytes], None]


def outcome(function: Callable[..., Any], *args: Any) -> Any:
    """Return the result, or the reason of a drop."""
    try:
        return function(*args)
    except Dropped as drop:
        return f"dropped: {drop.reason}"


def same(name: str, *args: Any) -> Any:
    """Compare a compiled step with the reference. Return the result."""
    from tests import steps  # compiled; the import of this module must not need it

    got, want = (outcome(getattr(module, name), *args) for module in (steps, reference))
    assert got == want, (name, args, got, want)
    return want


def number(data: bytes, at: int, n: int) -> int:
    return int.from_bytes(data[at : at + n], "big")


# The compiled core and the reference


def cut(data: bytes) -> None:
    """A frame from the TUN: a vnet header, then a packet, which zeros fill up to a length."""
    total = number(data, 0, 2)
    same("cut", data[2:] + bytes(max(0, total - len(data))))


def packet(data: bytes) -> None:
    same("check_packet", data)
    same("decrement_hop_limit", data)


def fragment(data: bytes) -> None:
    packet_ = data[2:]
    pieces = same("fragment", packet_, number(data, 0, 2))
    if isinstance(pieces, list):
        for piece in pieces:
            reference.check_packet(piece)


def icmp(data: bytes) -> None:
    kind = ("no_route", "ttl_exceeded", "too_big")[number(data, 0, 1) % 3]
    packet_ = data[21:]
    family = 4 if packet_[:1] < b"\x50" else 16
    same("icmp_error", packet_, kind, data[1:17].ljust(16, b"\0")[:family], number(data, 17, 4))


def merge(data: bytes) -> None:
    """Packets, each after its length (2 bytes). The compiled step may merge less: two flows with
    one hash close each other's output."""
    from tests import steps

    packets, at = [], 1
    while at + 2 <= len(data) and len(packets) < 64:
        n = number(data, at, 2) % 256
        packets.append(data[at + 2 : at + 2 + n])
        at += 2 + n
    switches = (bool(number(data, 0, 1) & 1), bool(number(data, 0, 1) & 2))
    got, want = (outcome(module.merge, packets, *switches) for module in (steps, reference))
    if isinstance(got, str) or isinstance(want, str):
        assert got == want
    else:
        assert sum(map(len, got)) >= sum(map(len, want))


def probe(data: bytes) -> None:
    """A probe: both parsers of the core's format, and the node daemon's."""
    parsed = same("parse_probe", data)
    decoded = message.decode(data)
    if decoded is not None:
        assert message.decode(decoded.encode()) == decoded
        if decoded.path == message.UDP_PATH:
            assert isinstance(parsed, reference.Probe), parsed
            assert parsed.token == decoded.token


# Route tables


def _lines(table: _core.RouteTable) -> set[str]:
    return set(table.text_slice(0, len(table)).decode().splitlines())


def _slow_text(data: bytes) -> list[Route]:
    routes = []
    for line in data.split(b"\n"):
        words = line.split(b"#")[0].split()
        if words:
            routes.append(Route.from_words([w.decode("utf-8", "replace") for w in words], ""))
    if len({r.dst for r in routes}) != len(routes):
        raise FieldError("dst", "", "each prefix once")
    return routes


def route_text(data: bytes) -> None:
    """Compare the compiled parser of a route file with the grammar of model.Route."""
    try:
        table = _lines(_core.RouteTable.parse_text(data))
    except FieldError:
        table = None
    try:
        routes = {str(route) for route in _slow_text(data)}
    except FieldError:
        routes = None
    assert table == routes


def _slow_json(data: bytes) -> list[Route]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise FieldError("key", "", "each key once")
        return dict(pairs)

    body = json.loads(data, object_pairs_hook=once)
    if not isinstance(body, dict) or not isinstance(body.get("routes"), list):
        raise FieldError("body", "", "an object with routes")
    routes = [Route.from_json(route, "") for route in body["routes"]]
    if len({route.dst for route in routes}) != len(routes):
        raise FieldError("dst", "", "each prefix once")
    return routes


def route_json(data: bytes) -> None:
    """Here the compiled parser may refuse more: text that is deep or not strictly JSON."""
    try:
        table = _lines(_core.RouteTable.parse_json(data))
    except FieldError:
        table = None
    try:
        routes = {str(route) for route in _slow_json(data)}
    except (ValueError, RecursionError):
        routes = None
    if table is not None:
        assert table == routes, (table, routes)
    else:
        plain = data.isascii() and json.loads(data).keys() == {"routes"} if routes else False
        assert not plain, routes


# Parsers of what others send


def control(data: bytes) -> None:
    """The parsers of the control API: the path, the headers, and the body of one route."""
    text = data.decode("latin-1")
    protocol.parse_route_path(f"{protocol.ROUTES}/{text}")
    protocol.parse_error(500, data)
    for parse in (protocol.parse_if_match, protocol.parse_if_none_match,
                  functools.partial(protocol.parse_flag, "follow")):
        try:
            parse(text)
        except protocol.ControlError as error:
            assert error.code == "bad_request"
    for parse in (Endpoint.parse, lambda t: Route.from_words(t.split(), "")):
        try:
            value = parse(text)
        except FieldError:
            continue
        assert parse(str(value)) == value
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return
    try:
        route = Route.from_json(body, "")
    except FieldError:
        return
    assert Route.from_words(str(route).split(), "") == route


def flannel_message(data: bytes) -> None:
    try:
        parsed = flannel.parse_message(data)
    except FieldError:
        return
    if isinstance(parsed, flannel.SetRoute):
        net, hop = parsed.route.dst, parsed.route.via
        again = flannel.MESSAGE.pack(
            flannel.SET_ROUTE, net.network_address.packed, net.prefixlen, hop.packed,
            parsed.route.port,
        )
        assert flannel.parse_message(again) == parsed


def lease(data: bytes) -> None:
    """A key and a value of etcd, separated by a newline, and their advert."""
    key, _, value = data.partition(b"\n")
    try:
        subnets = etcd.read_key(key.decode("utf-8", "surrogateescape"))
        assert etcd.read_key(etcd.write_key(subnets)) == subnets
        assert all(0 < subnet.prefixlen < subnet.max_prefixlen for subnet in subnets)
    except FieldError:
        pass
    try:
        attributes = etcd.read_value(value)
    except FieldError:
        return
    if "\\u" not in value.decode():  # a lone surrogate can be read, but not written
        assert etcd.read_value(etcd.write_value(attributes)) == attributes
    for part in (attributes.backend_data, attributes.backend_v6_data):
        advert.read(part)


def node_annotations(data: bytes) -> None:
    """A Kubernetes node with flannel's annotations: lines of name and value, and podCIDRs."""
    names = kube.Annotations("flannel.alpha.coreos.com/")
    keys = [name for name in vars(names).values() if isinstance(name, str)]
    lines = data.decode("utf-8", "replace").split("\n")
    annotations = {keys[i % len(keys)]: line for i, line in enumerate(lines[2:])}
    annotations[names.managed] = "true"
    node = kube.Node(
        kube.Metadata(name="n", annotations=annotations), kube.NodeSpec(pod_cidrs=lines[:2])
    )
    try:
        lease_ = names.lease(node)
        names.published(node, Attributes(ipaddress.IPv4Address("192.0.2.1"), None))
        names.node_public(node)
    except FieldError:
        return
    assert lease_ is not None
    texts = [text for text in lines[:2] if "." in text]
    assert len(texts) < 2, "two IPv4 prefixes"


def advert_data(data: bytes) -> None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = data.decode("utf-8", "replace")
    found = advert.read(value)
    if found is not None:
        assert 0 < found.port <= 65535
        assert advert.read(advert.embed(None, found)) == found


def hosts(data: bytes) -> None:
    for name in ("hosts.toml", "hosts.json"):
        try:
            found = hosts_file.parse(data, name)
        except FieldError:
            continue
        assert len({lease_.key for lease_ in found.leases}) == len(found.leases)
        assert all(tuple(lease_.subnets) for lease_ in found.leases)


def net_conf(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    for check in (True, False):
        try:
            found = NetConfig.parse(text, check_subnets=check)
        except FieldError:
            continue
        assert found.networks
        if check and found.network is not None:
            assert found.subnet_min in found.network
            assert found.subnet_max in found.network
        assert 0 < found.udp_port <= 65535


def takeover(data: bytes) -> None:
    """A message and the documents of a take-over, as the forwarder reads them."""
    try:
        decoded = takeover_message.decode(data)
    except TakeOverError:
        decoded = None
    if decoded is not None:
        assert takeover_message.decode(takeover_message.encode(decoded)) == decoded
    for read in (_having, _counted):
        try:
            read(data)
        except TakeOverError:
            continue


def _having(data: bytes) -> None:
    having = document.load(document.StateDocument, data)
    assert document.load(document.StateDocument, document.dump(having)) == having
    having.routes.encode()
    takeover_message.from_json(document.Device, having.device)
    for values in having.sockets:
        takeover_message.from_json(document.Socket, values)
    _peers(having.peers)


def _counted(data: bytes) -> None:
    counted = document.load(document.CountersDocument, data)
    packets = document.packets_of(counted, {"encap": {"read": 0}, "decap": {"read": 0}})
    numbers = [n for counts in packets.values() for n in counts.values()]
    assert all(0 <= n < 1 << 64 for n in (*numbers, *(n for *_, n in document.drops_of(counted))))
    _peers(counted.peers)


def _peers(rows: list[dict[str, Any]]) -> None:
    for values in rows:
        peer = document.peer_from_json(values)
        assert len(peer.address) in (4, 16)
        assert peer.last_error is None or len(peer.last_error.reporter) in (0, 4, 16)
        assert document.peer_from_json(document.peer_to_json(peer)) == peer


TARGETS: dict[str, Target] = {
    "step-cut": cut, "step-packet": packet, "step-fragment": fragment, "step-icmp": icmp,
    "step-merge": merge, "probe": probe, "route-text": route_text, "route-json": route_json,
    "control": control, "flannel": flannel_message, "lease": lease, "node": node_annotations,
    "advert": advert_data, "hosts": hosts, "net-conf": net_conf, "takeover": takeover,
}
