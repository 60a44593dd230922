"""Describe what the underlay reported about a datagram to a peer: a sentence, and its JSON form.

Owns the wording. The core keeps the errors. Pure functions, any thread.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import time
from typing import Any

from ..model import Endpoint, PeerError

# The ICMP errors by type and code (RFC 792, RFC 1812 5.2.7.1; RFC 4443 3): name, and what it says
# of the peer.
_UNREACHABLE, _UNREACHABLE6, _TIME_EXCEEDED, _TIME_EXCEEDED6 = 3, 1, 11, 3
_ICMP = {
    0: ("net unreachable", "there is no route to {address}"),
    1: ("host unreachable", "{address} does not answer on its link"),
    2: ("protocol unreachable", "{address} accepts no UDP"),
    3: ("port unreachable", "nothing listens on {endpoint}"),
    9: ("net administratively prohibited", "a filter rejects datagrams to {endpoint}"),
    10: ("host administratively prohibited", "a filter rejects datagrams to {endpoint}"),
    13: ("communication administratively prohibited", "a filter rejects datagrams to {endpoint}"),
}
_ICMP6 = {
    0: ("no route to destination", "there is no route to {address}"),
    1: ("administratively prohibited", "a filter rejects datagrams to {endpoint}"),
    3: ("address unreachable", "{address} does not answer on its link"),
    4: ("port unreachable", "nothing listens on {endpoint}"),
    5: ("source address failed policy", "a filter rejects datagrams to {endpoint}"),
    6: ("reject route to destination", "a route rejects datagrams to {endpoint}"),
}
_SEND = {
    errno.EPERM: "a filter on this host rejects datagrams to {endpoint}",
    errno.EACCES: "a rule or route on this host prohibits datagrams to {endpoint}",
    errno.ENETUNREACH: "this host has no route to {address}",
    errno.EHOSTUNREACH: "this host has no route to {address}",
    errno.EINVAL: "this host cannot send to {endpoint}",
    errno.ENETDOWN: "the interface towards {address} is down",
    errno.ENOBUFS: "this host has no memory for datagrams to {endpoint}",
    errno.ENOMEM: "this host has no memory for datagrams to {endpoint}",
}


def to_json(error: PeerError | None, endpoint: Endpoint) -> dict[str, Any] | None:
    """Return the error as docs/control.md describes it; None if there was none."""
    if error is None:
        return None
    is_icmp = error.origin in ("icmp", "icmp6")
    return {
        "errno": errno.errorcode.get(error.errno, str(error.errno)),
        "origin": error.origin,
        "type": error.type if is_icmp else None,
        "code": error.code if is_icmp else None,
        "reporter": str(ipaddress.ip_address(error.reporter)) if error.reporter else None,
        "seconds_ago": round(max(0, time.monotonic_ns() - error.time_ns) / 1e9, 3),
        "text": describe(error, endpoint),
    }


def describe(error: PeerError, endpoint: Endpoint) -> str:
    """Return a sentence: what happened, what it says of the peer, and who said it."""
    name, cause = _cause(error)
    words = os.strerror(error.errno).lower()
    if cause:
        words += f": {cause.format(endpoint=endpoint, address=endpoint.address)}"
    source = name
    if error.reporter:
        source += f" from {ipaddress.ip_address(error.reporter)}"
    return f"{words} ({source})"


def _cause(error: PeerError) -> tuple[str, str]:
    """Return who reported the error, and what it says of the peer, or an empty string."""
    if error.origin not in ("icmp", "icmp6"):
        return "the kernel refused the datagram", _SEND.get(error.errno, "")
    table, unreachable, exceeded = (
        (_ICMP, _UNREACHABLE, _TIME_EXCEEDED) if error.origin == "icmp"
        else (_ICMP6, _UNREACHABLE6, _TIME_EXCEEDED6)
    )
    if error.type == exceeded:
        return "ICMP time exceeded", "the path to {address} is a loop, or too long"
    if error.type == unreachable and error.code in table:
        name, cause = table[error.code]
        return f"ICMP {name}", cause
    return f"ICMP type {error.type}, code {error.code}", ""
