"""The network's configuration, flannel's net-conf.json. It is parsed as in flannel.

Owns: the names, defaults and rules of flannel's ``subnet.Config``, and the options of flannel's udp
and vxlan backends. All fields are validated when the text is parsed. Everything that flannel
accepts is accepted: names in any case, unknown fields, host bits in a network. The exceptions are a
network that has a large part of all addresses, and one with reserved addresses, such as loopback
and multicast addresses. Does not depend on where the text comes from, or on the backend of a node.
Pure functions; any thread.

source  flannel's pkg/subnet/config.go and Documentation/configuration.md
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..errors import FieldError
from ..model import (
    DEFAULT_PORT,
    MAX_MTU,
    MAX_PORT,
    MIN_MTU,
    RESERVED,
    IPAddress,
    IPNetwork,
    parse_number,
)

MAX_VNI = (1 << 24) - 1

# Options are checked only if Backend.Type is in this list, which has the backends in node.backends.
# flannel's other backends may have options with the same names, but with other values.
CHECKED_TYPES = ("auto", "udp", "vxlan")


@dataclass(frozen=True, slots=True)
class NetConfig:
    """One overlay network. The network of a disabled family is None.

    subnet_len    prefix length of a node's subnet; 0 if the store assigns the subnets
    subnet_min    base address of the first subnet that a node may get
    subnet_max    base address of the last subnet that a node may get
    nftables      flannel's EnableNFTables; true: firewall rules only in nftables
    backend_type  the field Type of Backend, in lower case; "udp" if there is no Backend (as in
                  flannel), "" if Backend has no Type. Not checked here, because the command line
                  can select another backend
    backend       the fields of Backend, with names in lower case
    text          the original text

    The fields with a 6 in their names are those of IPv6.
    """

    text: str
    network: ipaddress.IPv4Network | None
    network6: ipaddress.IPv6Network | None
    subnet_len: int
    subnet_min: ipaddress.IPv4Address | None
    subnet_max: ipaddress.IPv4Address | None
    subnet6_len: int
    subnet6_min: ipaddress.IPv6Address | None
    subnet6_max: ipaddress.IPv6Address | None
    nftables: bool
    backend_type: str
    backend: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str, *, check_subnets: bool = True, where: str = "") -> NetConfig:
        """Parse net-conf.json. Raises FieldError, which names the invalid field.

        check_subnets  False if the store assigns the subnet of each node. Then SubnetLen, SubnetMin
                       and SubnetMax are ignored, even if they are invalid, as in flannel
        where          the name of the text in error messages
        """
        try:
            return cls._of(_decode(text, where), text, check_subnets, where)
        except RecursionError:  # raised by the parser, or by the repr of a value in a message
            raise FieldError("the configuration", text[:40], "values nested less deeply",
                             where) from None

    @classmethod
    def _of(cls, fields: Mapping[str, Any], text: str, check_subnets: bool,
            where: str) -> NetConfig:
        v4 = v6 = _OFF
        if _flag(fields, "EnableIPv4", where, default=True):
            v4 = _family(fields, _V4, check_subnets, where)
        if _flag(fields, "EnableIPv6", where):
            v6 = _family(fields, _V6, check_subnets, where)
        if v4.network is None and v6.network is None:
            raise FieldError("EnableIPv4", False, "true for at least one family", where)
        backend_type, backend = _backend(fields, where)
        config = cls(
            text, v4.network, v6.network, v4.length, v4.first, v4.last, v6.length, v6.first,
            v6.last, _flag(fields, "EnableNFTables", where), backend_type, backend,
        )
        if backend_type in CHECKED_TYPES:
            config._check_options(where)
        return config

    @property
    def networks(self) -> tuple[IPNetwork, ...]:
        """The networks of the enabled families, IPv4 first."""
        return tuple(net for net in (self.network, self.network6) if net is not None)

    def without_ipv6(self) -> NetConfig:
        """Return this configuration with IPv6 disabled. IPv4 must be enabled."""
        assert self.network is not None
        return replace(self, network6=None, subnet6_len=0, subnet6_min=None, subnet6_max=None)

    @property
    def subnets_checked(self) -> bool:
        """True if the text was parsed with ``check_subnets``."""
        return bool(self.subnet_len or self.subnet6_len)

    # Port is the port of the backend that Type names. With Type "auto", Port is the port of the UDP
    # backend, because every node has the UDP backend.
    # The option --backend can select other backends for a node, instead of the one in Type or in
    # addition to it. For these backends, the node and its peers use the backend's default port.

    @property
    def udp_port(self) -> int:
        """The UDP port of each node that does not advertise another port."""
        if self.backend_type in ("auto", "udp"):
            return self._number("Port", DEFAULT_PORT, 1, MAX_PORT)
        return DEFAULT_PORT

    @property
    def vxlan_port(self) -> int:
        """The UDP port of VXLAN; 0: the kernel's default, 8472."""
        return self._number("Port", 0, 0, MAX_PORT) if self.backend_type == "vxlan" else 0

    @property
    def vni(self) -> int:
        if self.backend.get("vni") == 0:  # as in flannel, 0 is not the default
            return 0
        return self._number("VNI", 1, 0, MAX_VNI)

    @property
    def mtu(self) -> int | None:
        """The underlay's MTU in bytes; None: use the MTU of the underlay's interface."""
        return self._number("MTU", 0, MIN_MTU, MAX_MTU) or None

    @property
    def direct_routing(self) -> bool:
        return _flag(self.backend, "DirectRouting", within="Backend.")

    @property
    def learning(self) -> bool:
        return _flag(self.backend, "Learning", within="Backend.")

    @property
    def gbp(self) -> bool:
        return _flag(self.backend, "GBP", within="Backend.")

    def _number(self, name: str, default: int, low: int, high: int, where: str = "") -> int:
        return _number(self.backend, name, default, low, high, where, "Backend.")

    def _check_options(self, where: str) -> None:
        """Validate all options of Backend now, not when a node first uses an option."""
        self._number("Port", 0, 0, MAX_PORT, where)
        self._number("VNI", 1, 0, MAX_VNI, where)
        self._number("MTU", 0, MIN_MTU, MAX_MTU, where)
        for name in ("DirectRouting", "Learning", "GBP"):
            _flag(self.backend, name, where, within="Backend.")


class _Names(NamedTuple):
    """The field names of one family, and flannel's limits for it."""

    version: int
    network: str
    length: str
    first: str
    last: str
    usual_len: int  # default length of a node's subnet, if four such subnets fit in the network
    max_len: int  # with a longer prefix, a subnet is too small for a tunnel device and a bridge
    max_network_len: int
    min_network_len: int


_V4 = _Names(4, "Network", "SubnetLen", "SubnetMin", "SubnetMax", 24, 30, 28, 8)
_V6 = _Names(6, "IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax", 64, 126, 124, 16)
_UNIQUE_LOCAL = ipaddress.ip_network("fc00::/7")  # none of them is on the internet
_UNIQUE_LOCAL_LEN = 8  # shortest prefix of a network within them


def refuse_reserved(field: str, network: IPNetwork, where: str = "") -> None:
    """Raise FieldError if the network has addresses that an overlay cannot have."""
    for reserved, name in RESERVED:
        if network.version == reserved.version and network.overlaps(reserved):
            raise FieldError(field, str(network),
                             f"a network without addresses of {reserved} ({name})", where)


class _Family(NamedTuple):
    network: Any = None  # a network and addresses of the same family, IPv4 or IPv6
    length: int = 0
    first: Any = None
    last: Any = None


_OFF = _Family()


def _family(fields: Mapping[str, Any], names: _Names, check_subnets: bool, where: str) -> _Family:
    network = _network(fields, names, where)
    # The firewall accepts all packets of the network. With a shorter prefix, such as 0.0.0.0/0, it
    # would accept packets of a large part of the internet. flannel has no such limit.
    local = network.network_address in _UNIQUE_LOCAL
    low = _UNIQUE_LOCAL_LEN if local else names.min_network_len
    if network.prefixlen < low:
        raise FieldError(names.network, str(network), f"a prefix length of at least {low}", where)
    refuse_reserved(names.network, network, where)
    if not check_subnets:
        return _Family(network)
    if network.prefixlen > names.max_network_len:
        raise FieldError(names.network, str(network),
                         f"a prefix length of at most {names.max_network_len}", where)
    shortest = network.prefixlen + 2  # at least four subnets must fit in the network
    length = _number(fields, names.length, max(names.usual_len, shortest), shortest,
                     names.max_len, where)
    size = 1 << (network.max_prefixlen - length)
    # The first subnet is not used, because its base address is the network's own address.
    lowest = int(network.network_address)
    first = _base(fields, names.first, network, lowest + size, size, where)
    highest = int(network.broadcast_address) + 1 - size
    last = _base(fields, names.last, network, highest, size, where)
    if int(first) > int(last):
        raise FieldError(names.last, str(last), f"an address from {names.first} on", where)
    return _Family(network, length, first, last)


def _network(fields: Mapping[str, Any], names: _Names, where: str) -> IPNetwork:
    value = fields.get(names.network.lower())
    try:
        address, _, length = value.partition("/")  # type: ignore[union-attr]
        if not (length.isascii() and length.isdigit()) or "%" in address:
            raise ValueError  # Go accepts neither a netmask nor a missing length
        network = ipaddress.ip_network(value, strict=False)  # type: ignore[arg-type]
        if network.version != names.version:
            raise ValueError
    except (ValueError, AttributeError):
        example = "10.244.0.0/16" if names.version == 4 else "fd00:10:244::/56"
        raise FieldError(names.network, value, f"an IPv{names.version} network such as {example}",
                         where) from None
    return network


def _base(fields: Mapping[str, Any], name: str, network: IPNetwork, default: int, size: int,
          where: str) -> IPAddress:
    """Return the base address in field ``name``; ``default`` if it is absent or all zeros."""
    family = type(network.network_address)
    value = fields.get(name.lower())
    try:
        if value is not None and (not isinstance(value, str) or "%" in value):
            raise ValueError
        address = family(value) if value else family(0)
    except ValueError:
        raise FieldError(name, value, f"an IPv{network.version} address", where) from None
    address = address if int(address) else family(default)
    if address not in network:
        raise FieldError(name, value, f"an address within {network}", where)
    if int(address) % size:
        length = network.max_prefixlen - size.bit_length() + 1
        raise FieldError(name, value, f"an address where a /{length} begins", where)
    return address


def _backend(fields: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    if "backend" not in fields:
        return "udp", {}
    backend = fields["backend"] if fields["backend"] is not None else {}
    if not isinstance(backend, dict):
        raise FieldError("Backend", backend, "an object", where)
    kind = backend.get("type")
    if kind is not None and not isinstance(kind, str):
        raise FieldError("Backend.Type", kind, "a word such as udp or vxlan", where)
    return (kind or "").lower(), backend


def _decode(text: str, where: str) -> Mapping[str, Any]:
    """Return the fields by their names in lower case, because Go ignores the case of names.

    If two fields have the same name in lower case, the last one is used.
    """
    try:
        value = json.loads(text, object_pairs_hook=_lower, parse_constant=_refuse)
    except json.JSONDecodeError as exc:
        line = text.split("\n")[exc.lineno - 1].strip()
        place = ", ".join(filter(None, (where, f"line {exc.lineno}")))
        raise FieldError("the configuration", line, f"JSON ({exc.msg})", place) from None
    except ValueError as exc:
        raise FieldError("the configuration", text[:40], f"JSON ({exc})", where) from None
    if not isinstance(value, dict):
        raise FieldError("the configuration", value, "an object with Network in it", where)
    return value


def _lower(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name.lower(): value for name, value in pairs}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON value")


def _flag(fields: Mapping[str, Any], name: str, where: str = "", *, default: bool = False,
          within: str = "") -> bool:
    value = fields.get(name.lower())
    if value is None:
        return default
    if not isinstance(value, bool):
        raise FieldError(within + name, value, "true or false", where)
    return value


def _number(fields: Mapping[str, Any], name: str, default: int, low: int, high: int, where: str,
            within: str = "") -> int:
    """Return the number in field ``name``.

    Return ``default`` if the field is absent, null or 0, because Go does not distinguish these.
    """
    value = fields.get(name.lower())
    if value is None or (value == 0 and not isinstance(value, bool)):
        return default
    if isinstance(value, str):  # refused here, because parse_number accepts a number in quotes
        raise FieldError(within + name, value, f"a whole number from {low} to {high}", where)
    return parse_number(within + name, value, low, high, where)
