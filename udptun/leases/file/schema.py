"""The grammar of the hosts file, a list of all nodes in TOML or JSON.

docs/hosts.toml explains the grammar.

Owns: parsing and validation. One error rejects the whole file, so a file is never applied in part.
The error names the line and the field. ``source`` reads the file and detects changes.
Pure functions; any thread.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import pairwise
from typing import Any, TypeVar

from ...errors import FieldError
from ...model import (
    ANY_PORT,
    DEFAULT_PORT,
    MAX_MTU,
    MAX_PORT,
    MIN_MTU,
    MIN_MTU6,
    IPAddress,
    IPNetwork,
    parse_next_hop,
    parse_number,
    parse_prefix,
    parse_source_port,
)
from ..advert import ECN, EXPRESS, PROBE, Advert, embed, read
from ..base import Attributes, Lease, Subnets
from ..netconf import NetConfig, refuse_reserved
from .positions import Positions

Item = TypeVar("Item", IPAddress, IPNetwork)
Wanted = TypeVar("Wanted")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_FILE_KEYS = ("network", "port", "mtu", "probe", "express", "ecn", "nodes")
_NODE_KEYS = ("name", "public", "subnets", "port", "mtu", "probe", "express", "ecn",
              "source_port")
# As in flannel: a subnet with a longer prefix has too few addresses for a tunnel device and a
# bridge.
_MAX_SUBNET_LEN = {4: 30, 6: 126}


@dataclass(frozen=True, slots=True)
class HostsFile:
    """The content of a hosts file.

    The leases are in the order of the file. The key of a lease is the node's name.
    """

    network: NetConfig
    leases: tuple[Lease, ...]


def parse(data: bytes, name: str) -> HostsFile:
    """Parse a hosts file. Raises FieldError, which names the line and the field.

    name  the file's name. If it ends with ``.json`` or ``.toml``, this ending determines the
          format. Else the text is JSON if its first character is ``{``
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
        except FieldError as exc:  # here ``exc.where`` is a path within the content
            line_n = Positions(text).line(exc.where)
            where = name if line_n is None else f"{name} line {line_n}"
            raise FieldError(exc.field, exc.value, exc.expected, where) from None
    except RecursionError:  # raised by the parser, or by the repr of a value in an error message
        raise FieldError("the text", text[:40], "values nested less deeply", name) from None


def _toml(text: str, name: str) -> Mapping[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as exc:  # TOMLDecodeError, or the error for a number with too many digits
        found = re.search(r"line (\d+)", str(exc))
        raise _syntax(text, name, int(found[1]) if found else None, f"TOML ({exc})") from None


def _json(text: str, name: str) -> Mapping[str, Any]:
    def reject_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                positions = Positions(text)
                line = positions.line(positions.repeated[0]) if positions.repeated else "?"
                raise FieldError(key, value, "each key once", f"{name} line {line}")
            content[key] = value
        return content

    try:
        content = json.loads(text, object_pairs_hook=reject_repeated)
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
    # Without a line number, something is missing at the end of the text: use the last line.
    line = min(line or len(lines), len(lines))
    return FieldError("the text", lines[line - 1].strip(), expected, f"{name} line {line}")


def _hosts(content: Mapping[str, Any]) -> HostsFile:
    """Validate the content.

    This function and the functions that it calls raise FieldErrors in which ``where`` is a path, as
    in Positions.
    """
    _refuse_unknown(content, _FILE_KEYS, "")
    networks = _per_family(content, "network", parse_prefix, "")
    for network in networks:
        refuse_reserved("network", network, "network")
    port = parse_number("port", content.get("port", DEFAULT_PORT), 1, MAX_PORT, "port")
    nodes = _required(content, "nodes", "")
    if not isinstance(nodes, list) or not nodes:
        raise FieldError("nodes", nodes, "a list of at least one node", "nodes")
    defaults = {key: content[key] for key in ("port", "mtu", PROBE, EXPRESS, ECN) if key in content}
    _features(content, "")
    if "mtu" in content:
        parse_number("mtu", content["mtu"], MIN_MTU, MAX_MTU, "mtu")
    leases = tuple(_node(node, defaults, networks, f"nodes[{i}]") for i, node in enumerate(nodes))
    _refuse_shared(leases)
    leases = _with_nat_ports(leases)
    return HostsFile(_netconf(networks, port), leases)


def _netconf(networks: Sequence[IPNetwork], port: int) -> NetConfig:
    fields: dict[str, Any] = {"EnableIPv4": False}
    for network in networks:
        prefix = "" if network.version == 4 else "IPv6"
        fields |= {f"EnableIPv{network.version}": True, f"{prefix}Network": str(network)}
    fields["Backend"] = {"Type": "udp", "Port": port}
    return NetConfig.parse(json.dumps(fields), check_subnets=False)


def _node(node: Any, defaults: Mapping[str, Any], networks: Sequence[IPNetwork],
          path: str) -> Lease:
    if not isinstance(node, dict):
        raise FieldError("nodes", node, "a table with name, public and subnets", path)
    _refuse_unknown(node, _NODE_KEYS, path)
    name = _required(node, "name", path)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise FieldError("name", name, "a name such as a hostname", f"{path}.name")
    public = _per_family(node, "public", parse_next_hop, path)
    subnets = _per_family(node, "subnets", parse_prefix, path)
    for subnet in subnets:
        if not any(_within(subnet, network) for network in networks):
            raise FieldError("subnets", str(subnet), "a prefix within "
                             + " or ".join(map(str, networks)), f"{path}.subnets")
        if subnet.prefixlen > (longest := _MAX_SUBNET_LEN[subnet.version]):
            expected = f"a prefix length of at most {longest}"
            raise FieldError("subnets", str(subnet), expected, f"{path}.subnets")
    options = {**defaults, **node}
    port = parse_number("port", options.get("port", DEFAULT_PORT), 1, MAX_PORT, f"{path}.port")
    mtu = options.get("mtu")
    if mtu is not None:
        low = MIN_MTU6 if any(subnet.version == 6 for subnet in subnets) else MIN_MTU
        mtu = parse_number("mtu", mtu, low, MAX_MTU, f"{path}.mtu")
    ports = None
    if node.get("source_port") is not None:
        ports = parse_source_port(node["source_port"], f"{path}.source_port")
    features = _features(options, f"{path}.")
    attributes = Attributes(_of_type(public, IPv4Address), _of_type(public, IPv6Address),
                            backend_data=embed(None, Advert(port, mtu, features, ports)))
    return Lease(name, Subnets(_of_type(subnets, IPv4Network), _of_type(subnets, IPv6Network)),
                 attributes, name)


def _features(options: Mapping[str, Any], path: str) -> frozenset[str]:
    """The nodes of a hosts file run udptun, unless the file says otherwise. The file also says
    whether they have --accelerate auto, and whether they copy congestion marks."""
    found = set()
    for feature, default in ((PROBE, True), (EXPRESS, False), (ECN, False)):
        value = options.get(feature, default)
        if not isinstance(value, bool):
            raise FieldError(feature, value, "true or false", f"{path}{feature}")
        if value:
            found.add(feature)
    return frozenset(found)


def _with_nat_ports(leases: Sequence[Lease]) -> tuple[Lease, ...]:
    """Let nodes that share a public address send from any port, unless the file names their ports.

    They are behind a NAT, which may change the ports.
    """
    def public(lease: Lease) -> set[IPAddress]:
        both = (lease.attributes.public_ip, lease.attributes.public_ipv6)
        return {address for address in both if address is not None}

    nodes_n = Counter(address for lease in leases for address in public(lease))
    found = []
    for lease in leases:
        advert = read(lease.attributes.backend_data)
        assert advert is not None  # ``_node`` has written it
        if advert.source_ports is None and any(nodes_n[one] > 1 for one in public(lease)):
            data = embed(None, replace(advert, source_ports=ANY_PORT))
            found.append(
                replace(lease, attributes=replace(lease.attributes, backend_data=data)))
        else:
            found.append(lease)
    return tuple(found)


def _refuse_shared(leases: Sequence[Lease]) -> None:
    """Raise FieldError if two nodes have the same name or endpoint, or overlapping subnets."""
    owners: dict[tuple[object, ...], int] = {}

    def claim(i: int, field: str, value: str, *identity: object) -> None:
        owner = owners.setdefault((field, *identity), i)
        if owner != i:
            raise FieldError(field, value, f"a value other than that of node {leases[owner].name}",
                             f"nodes[{i}].{field}")

    for i, lease in enumerate(leases):
        claim(i, "name", lease.name, lease.name)
        advert = read(lease.attributes.backend_data)
        for address in (lease.attributes.public_ip, lease.attributes.public_ipv6):
            if address is not None:
                claim(i, "public", str(address), address.packed, advert and advert.port)
    spans = [(subnet.version, int(subnet.network_address), subnet.prefixlen, i, subnet)
            for i, lease in enumerate(leases) for subnet in lease.subnets]
    spans.sort()
    # The prefixes are sorted now. So of two adjacent prefixes, either the first contains the
    # second, or the two have no address in common.
    for (*_, i, subnet), (*_, j, other) in pairwise(spans):
        if other.network_address in subnet:
            first, second = sorted((i, j))
            raise FieldError("subnets", str(subnet if second == i else other),
                             "a prefix that does not overlap the subnets of node "
                             f"{leases[first].name}",
                             f"nodes[{second}].subnets")


def _per_family(table: Mapping[str, Any], key: str, parse_one: Callable[[str, object, str], Item],
                within: str) -> list[Item]:
    """Parse the value of ``key``: one item, or a list with at most one item per family."""
    path = f"{within}.{key}".lstrip(".")
    value = _required(table, key, within)
    if not isinstance(value, list):
        return [parse_one(key, value, path)]
    items = [parse_one(key, item, f"{path}[{i}]") for i, item in enumerate(value)]
    if not items or len({item.version for item in items}) != len(items):
        raise FieldError(key, value, "one IPv4 value, one IPv6 value, or one of each", path)
    return items


def _of_type(items: Iterable[object], wanted: type[Wanted]) -> Wanted | None:
    return next((item for item in items if isinstance(item, wanted)), None)


def _within(subnet: IPNetwork, network: IPNetwork) -> bool:
    return subnet.network_address in network and subnet.prefixlen >= network.prefixlen


def _required(table: Mapping[str, Any], key: str, path: str) -> Any:
    if key not in table:
        raise FieldError(key, None, "a value (it is required)", path)
    return table[key]


def _refuse_unknown(table: Mapping[str, Any], keys: Sequence[str], within: str) -> None:
    for key in table:
        if key not in keys:
            path = f"{within}.{key}".lstrip(".")
            raise FieldError(key, table[key], "only the keys " + ", ".join(keys), path)
