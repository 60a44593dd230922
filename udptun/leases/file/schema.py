"""The hosts file: the nodes of an overlay, written down by a person. docs/hosts.toml explains it.

Owns: its grammar, in TOML and in JSON, and what makes it unfit to be used. One wrong word refuses
the whole file, with line and field: nobody should find out later that half of it was meant. Refuses
to know where the file lies and when it changes. Pure functions of their arguments: any thread.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import pairwise
from typing import Any, TypeVar

from ...errors import FieldError
from ...model import (
    DEFAULT_PORT,
    MAX_MTU,
    MIN_MTU,
    MIN_MTU6,
    IPAddress,
    IPNetwork,
    parse_next_hop,
    parse_number,
    parse_prefix,
)
from ..advert import Advert, embed, read
from ..base import Attributes, Lease, Subnets
from ..netconf import NetConfig
from .positions import Positions

Item = TypeVar("Item", IPAddress, IPNetwork)
Kind = TypeVar("Kind")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_FILE_KEYS = ("network", "port", "mtu", "nodes")
_NODE_KEYS = ("name", "public", "subnets", "port", "mtu")
_MAX_SUBNET_LEN = {4: 30, 6: 126}  # as flannel: room for a tunnel device and a bridge


@dataclass(frozen=True, slots=True)
class Hosts:
    """What a hosts file says. The leases are keyed by the nodes' names, in the file's order."""

    network: NetConfig
    leases: tuple[Lease, ...]


def parse(data: bytes, name: str) -> Hosts:
    """FieldError says line and field.

    name  of the file: ``.json`` and ``.toml`` say what it is, else its first byte does
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise FieldError("the text", data[exc.start:exc.end], "UTF-8",
                         f"{name} line {line}") from None
    is_json = name.endswith(".json") or (not name.endswith(".toml")
                                         and text.lstrip().startswith("{"))
    try:
        content = _json(text, name) if is_json else _toml(text, name)
        try:
            return _hosts(content)
        except FieldError as exc:  # its place is a path within the content
            line_n = Positions(text).line(exc.where)
            where = name if line_n is None else f"{name} line {line_n}"
            raise FieldError(exc.field, exc.value, exc.expected, where) from None
    except RecursionError:  # from the parser, or while showing a value
        raise FieldError("the text", text[:40], "values that are not nested so deep",
                         name) from None


def _toml(text: str, name: str) -> Mapping[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as exc:  # TOMLDecodeError, or a number that is too long
        said = re.search(r"line (\d+)", str(exc))
        raise _syntax(text, name, int(said[1]) if said else None, f"TOML ({exc})") from None


def _json(text: str, name: str) -> Mapping[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                places = Positions(text)
                line = places.line(places.repeated[0]) if places.repeated else "?"
                raise FieldError(key, value, "each key once", f"{name} line {line}")
            content[key] = value
        return content

    try:
        content = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as exc:
        raise _syntax(text, name, exc.lineno, f"JSON ({exc.msg})") from None
    except FieldError:
        raise
    except ValueError as exc:
        raise _syntax(text, name, None, f"JSON ({exc})") from None
    if not isinstance(content, dict):
        raise FieldError("the file", content, "an object with network and nodes", name)
    return content


def _syntax(text: str, name: str, line: int | None, expected: str) -> FieldError:
    lines = text.splitlines() or [""]
    line = min(line or len(lines), len(lines))  # what has no line is missing at the end
    return FieldError("the text", lines[line - 1].strip(), expected, f"{name} line {line}")


def _hosts(content: Mapping[str, Any]) -> Hosts:
    """From here on an error's ``where`` is a path, as in Positions."""
    _only(content, _FILE_KEYS, "")
    networks = _both(content, "network", parse_prefix, "")
    port = parse_number("port", content.get("port", DEFAULT_PORT), 1, 65535, "port")
    nodes = _required(content, "nodes", "")
    if not isinstance(nodes, list) or not nodes:
        raise FieldError("nodes", nodes, "a list of at least one node", "nodes")
    defaults = {key: content[key] for key in ("port", "mtu") if key in content}
    if "mtu" in content:
        parse_number("mtu", content["mtu"], MIN_MTU, MAX_MTU, "mtu")
    leases = tuple(_node(node, defaults, networks, f"nodes[{i}]") for i, node in enumerate(nodes))
    _refuse_shared(leases)
    return Hosts(_netconf(networks, port), leases)


def _netconf(networks: Sequence[IPNetwork], port: int) -> NetConfig:
    fields: dict[str, Any] = {"EnableIPv4": False}
    for network in networks:
        prefix = "" if network.version == 4 else "IPv6"
        fields |= {f"EnableIPv{network.version}": True, f"{prefix}Network": str(network)}
    fields["Backend"] = {"Type": "udp", "Port": port}
    return NetConfig.parse(json.dumps(fields), check_subnets=False)


def _node(node: Any, defaults: Mapping[str, Any], networks: Sequence[IPNetwork],
          at: str) -> Lease:
    if not isinstance(node, dict):
        raise FieldError("nodes", node, "a table with name, public and subnets", at)
    _only(node, _NODE_KEYS, at)
    name = _required(node, "name", at)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise FieldError("name", name, "a name such as a hostname", f"{at}.name")
    public = _both(node, "public", parse_next_hop, at)
    subnets = _both(node, "subnets", parse_prefix, at)
    for subnet in subnets:
        if not any(_within(subnet, network) for network in networks):
            raise FieldError("subnets", str(subnet), "a prefix within "
                             + " or ".join(map(str, networks)), f"{at}.subnets")
        if subnet.prefixlen > (longest := _MAX_SUBNET_LEN[subnet.version]):
            raise FieldError("subnets", str(subnet), f"a /{longest} or larger", f"{at}.subnets")
    said = {**defaults, **node}
    port = parse_number("port", said.get("port", DEFAULT_PORT), 1, 65535, f"{at}.port")
    mtu = said.get("mtu")
    if mtu is not None:
        low = MIN_MTU6 if any(subnet.version == 6 for subnet in subnets) else MIN_MTU
        mtu = parse_number("mtu", mtu, low, MAX_MTU, f"{at}.mtu")
    attributes = Attributes(_one(public, IPv4Address), _one(public, IPv6Address),
                            backend_data=embed(None, Advert(port, mtu)))
    own = Subnets(_one(subnets, IPv4Network), _one(subnets, IPv6Network))
    return Lease(name, own, attributes, name)


def _refuse_shared(leases: Sequence[Lease]) -> None:
    """What two nodes cannot both have: a name, an endpoint, addresses inside."""
    holders: dict[tuple[object, ...], int] = {}

    def claim(i: int, field: str, value: str, *thing: object) -> None:
        holder = holders.setdefault((field, *thing), i)
        if holder != i:
            raise FieldError(field, value, f"another than node {leases[holder].name} has",
                             f"nodes[{i}].{field}")

    for i, lease in enumerate(leases):
        claim(i, "name", lease.name, lease.name)
        advert = read(lease.attributes)
        for address in (lease.attributes.public_ip, lease.attributes.public_ipv6):
            if address is not None:
                claim(i, "public", str(address), address.packed, advert and advert.port)
    held = [(subnet.version, int(subnet.network_address), subnet.prefixlen, i, subnet)
            for i, lease in enumerate(leases) for subnet in lease.subnets]
    held.sort()
    # In this order prefixes are disjoint, or one holds the next.
    for (*_, i, subnet), (*_, j, other) in pairwise(held):
        if other.network_address in subnet:
            first, second = sorted((i, j))
            raise FieldError("subnets", str(subnet if second == i else other),
                             f"no address that node {leases[first].name} has",
                             f"nodes[{second}].subnets")


def _both(table: Mapping[str, Any], key: str, parse_one: Callable[[str, object, str], Item],
          at: str) -> list[Item]:
    """One value, or a list with at most one of each family."""
    path = f"{at}.{key}".lstrip(".")
    value = _required(table, key, at)
    if not isinstance(value, list):
        return [parse_one(key, value, path)]
    items = [parse_one(key, item, f"{path}[{i}]") for i, item in enumerate(value)]
    if not items or len({item.version for item in items}) != len(items):
        raise FieldError(key, value, "one of IPv4, one of IPv6, or one of each", path)
    return items


def _one(items: Iterable[object], kind: type[Kind]) -> Kind | None:
    return next((item for item in items if isinstance(item, kind)), None)


def _within(subnet: IPNetwork, network: IPNetwork) -> bool:
    return subnet.network_address in network and subnet.prefixlen >= network.prefixlen


def _required(table: Mapping[str, Any], key: str, at: str) -> Any:
    if key not in table:
        raise FieldError(key, None, "a value (it is required)", at)
    return table[key]


def _only(table: Mapping[str, Any], keys: Sequence[str], at: str) -> None:
    for key in table:
        if key not in keys:
            path = f"{at}.{key}".lstrip(".")
            raise FieldError(key, table[key], "no such key: there are " + ", ".join(keys), path)
