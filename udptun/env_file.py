"""Files of shell assignments such as subnet.env: the lines, and the networks in them. A leaf.

The node daemon and the CNI plugin use it. Imports nothing slow, because the plugin must start fast.
The functions have no side effects. Any thread.
"""

from __future__ import annotations

import ipaddress

from .errors import FieldError

TYPE_CHECKING = False  # importing typing takes too long: see udptun/cni/__init__.py
if TYPE_CHECKING:
    from collections.abc import Mapping


def assignments(text: str) -> dict[str, str]:
    """Return the assignments of a file that a shell could source.

    Comments, quotes and ``export`` are handled like in a shell. If a name is assigned several
    times, the last assignment is used.
    """
    values = {}
    for line in text.splitlines():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and not name.startswith("#"):
            values[name.strip()] = value.strip().strip("\"'")
    return values


def network4(field: str, values: Mapping[str, str], where: str) -> ipaddress.IPv4Network:
    try:
        return ipaddress.IPv4Interface(values.get(field, "")).network
    except ValueError:
        expected = "an IPv4 prefix such as 10.42.1.1/24"
        raise FieldError(field, values.get(field), expected, where) from None


def network6(field: str, values: Mapping[str, str], where: str) -> ipaddress.IPv6Network:
    try:
        return ipaddress.IPv6Interface(values.get(field, "")).network
    except ValueError:
        expected = "an IPv6 prefix such as fc00:0:0:1::1/64"
        raise FieldError(field, values.get(field), expected, where) from None
