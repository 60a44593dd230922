"""flannel's keys and values in etcd, byte for byte as its Go code writes them.

Owns: encoding and decoding of keys and values. No I/O; any thread.

Values are decoded as in Go: field names may have any case, and unknown fields are ignored. Unlike
in flannel, a lease that cannot be used is an error. Such a lease has no public address, or has host
bits in its key.
"""

from __future__ import annotations

import ipaddress
import json
import re
import sys
from typing import Any, NoReturn

from ...errors import FieldError
from ...model import parse_next_hop
from ..base import Attributes, Subnets

# Go's encoder escapes these characters, because they have a meaning in HTML or JavaScript. In JSON
# they occur only in strings.
_GO_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
_KEY = re.compile(r"([0-9.]+)-([0-9]{1,2})(?:&([0-9a-f:]+)-([0-9]{1,3}))?")
_KEY_EXPECTED = "a key such as 10.5.52.0-24 or 10.5.52.0-24&fc00:0:0:1::-64"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


# One decoder for all leases. json.loads with parse_constant would create a decoder at each call.
_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def config_key(root: str) -> bytes:
    return f"{root}/config".encode()


def subnets_prefix(root: str) -> bytes:
    """Return the common prefix of the keys of all leases.

    flannel lists the keys without the final slash in the prefix. With the final slash, a key such
    as <root>/subnets.old/... is not taken for a lease, and the etcd user needs permission for fewer
    keys.
    """
    return f"{root}/subnets/".encode()


def write_key(subnets: Subnets) -> str:
    """Return the part of the key after ``subnets_prefix``.

    Examples: 10.5.52.0-24 and 10.5.52.0-24&fc00:0:0:1::-64.
    """
    return "&".join(f"{subnet.network_address}-{subnet.prefixlen}" for subnet in subnets)


def read_key(key: str) -> Subnets:
    """Parse the part of a key after ``subnets_prefix``. Raises FieldError if the key is invalid.

    A key without an IPv4 subnet, for a /0, or for a single address is invalid, because flannel has
    no such keys.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        raise FieldError("key", key, _KEY_EXPECTED)
    base4, length4, base6, length6 = match.groups()
    try:
        v4 = ipaddress.IPv4Network(f"{base4}/{length4}")
        v6 = None if base6 is None else ipaddress.IPv6Network(f"{base6}/{length6}")
    except ValueError as error:
        raise FieldError("key", key, f"{_KEY_EXPECTED} ({error})") from None
    if not 0 < v4.prefixlen < 32 or (v6 is not None and not 0 < v6.prefixlen < 128):
        raise FieldError("key", key, _KEY_EXPECTED)
    return Subnets(v4, v6)


def write_value(attributes: Attributes) -> bytes:
    """Encode flannel's LeaseAttrs.

    An absent IPv4 address is encoded as 0.0.0.0, and an absent IPv6 address as null. Other absent
    fields are omitted.
    """
    value: dict[str, Any] = {
        "PublicIP": str(attributes.public_ip or "0.0.0.0"),
        "PublicIPv6": None if attributes.public_ipv6 is None else str(attributes.public_ipv6),
    }
    if attributes.backend_type:
        value["BackendType"] = attributes.backend_type
    if attributes.backend_data is not None:
        value["BackendData"] = attributes.backend_data
    if attributes.backend_v6_data is not None:
        value["BackendV6Data"] = attributes.backend_v6_data
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.translate(_GO_ESCAPES).encode()


def read_value(value: bytes) -> Attributes:
    """Decode a value.

    Raises FieldError if the value is not JSON or is truncated, if a field has a wrong type, or if
    there is no public address.
    """
    try:
        fields = _DECODER.decode(value.decode())
    except (ValueError, RecursionError) as error:
        raise FieldError("value", _beginning(value), f"JSON ({error})") from None
    if not isinstance(fields, dict):
        raise FieldError("value", _beginning(value), "a JSON object")
    fields = {name.lower(): field for name, field in fields.items()}
    v4 = _address("PublicIP", fields.get("publicip"), ipaddress.IPv4Address)
    v6 = _address("PublicIPv6", fields.get("publicipv6"), ipaddress.IPv6Address)
    if v4 is None and v6 is None:
        raise FieldError("PublicIP", fields.get("publicip"), "the public address of a node")
    backend_type = fields.get("backendtype")
    if backend_type is None:
        backend_type = ""
    if not isinstance(backend_type, str):
        raise FieldError("BackendType", backend_type, "a string")
    return Attributes(
        v4, v6, sys.intern(backend_type), fields.get("backenddata"), fields.get("backendv6data")
    )


def _address(field: str, value: object, family: type) -> Any:
    if value is None or value in ("", "0.0.0.0", "::"):  # Go's encodings of an absent address
        return None
    address = parse_next_hop(field, value)
    if not isinstance(address, family):
        raise FieldError(field, value, f"an {family.__name__.removesuffix('Address')} address")
    return address


def _beginning(value: bytes) -> str:
    text = value[:61].decode(errors="replace")
    return text if len(value) <= 60 else f"{text[:60]}..."
