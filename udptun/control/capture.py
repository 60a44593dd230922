"""The request and the answer of a capture: ``POST /v1/capture`` (docs/control.md).

Owns the parsing of a filter, and the parts of the answer that are not packets. The records of the
packets pass through unchanged: src_ext/path/capture.pxd has their format. Pure functions, any
thread.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import FieldError
from ..model import (
    MAX_PORT,
    MAX_SAMPLE,
    MAX_SNAPLEN,
    CaptureFilter,
    IPAddress,
    parse_address,
    parse_destination,
    parse_number,
)

DIRECTIONS = ("both", "out", "in")  # the default first
MAX_SECONDS = 7 * 86400
FIELDS = ("direction", "dropped", "peers", "routes", "hosts", "ports", "protocol", "snaplen",
          "sample", "seconds")
PROTOCOLS = {"tcp": (6,), "udp": (17,), "icmp": (1, 58), "sctp": (132,)}
# how many values a part of a filter may have; those of src_ext/path/capture.pxd
PEERS, NETWORKS, ENDS = 8, 8, 2
COUNTS, END = 2, 3  # kinds of records, after RECORD_PACKET
_HEAD = struct.Struct("<II28xB27x")  # capture_record_t: size, captured, kind

Value = TypeVar("Value")


def parse_filter(values: Mapping[str, Any]) -> tuple[CaptureFilter, float | None]:
    """Return the filter of a request, and after how many seconds the capture ends. Raises
    FieldError."""
    for name in values:
        if name not in FIELDS:
            raise FieldError("field", name, f"one of {', '.join(FIELDS)}")
    direction = values.get("direction", DIRECTIONS[0])
    if direction not in DIRECTIONS:
        raise FieldError("direction", direction, " or ".join(DIRECTIONS))
    dropped = values.get("dropped", False)
    if not isinstance(dropped, bool):
        raise FieldError("dropped", dropped, "true or false")
    protocol, seconds = values.get("protocol"), values.get("seconds")
    return CaptureFilter(
        direction=direction, dropped=dropped,
        peers=_list(values, "peers", PEERS, parse_peer),
        networks=_list(values, "routes", NETWORKS, parse_destination),
        hosts=_list(values, "hosts", ENDS, parse_address),
        ports=_list(values, "ports", ENDS, lambda field, value: parse_number(
            field, value, 0, MAX_PORT)),
        protocols=() if protocol is None else parse_protocol("protocol", protocol),
        snaplen=parse_number("snaplen", values.get("snaplen", MAX_SNAPLEN), 1, MAX_SNAPLEN),
        sample=parse_number("sample", values.get("sample", 1), 1, MAX_SAMPLE),
    ), None if seconds is None else parse_number("seconds", seconds, 1, MAX_SECONDS)


def parse_peer(field: str, value: object) -> tuple[IPAddress, int]:
    """Parse an outer address, or an endpoint: ``192.0.2.2``, ``192.0.2.2:8285``,
    ``[2001:db8::2]:8285``. The port of an address is 0."""
    try:
        return parse_address(field, value), 0
    except FieldError:
        host, colon, port = str(value).rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if not isinstance(value, str) or not colon or (":" in host) != bracketed:
            raise
        return parse_address(field, host.strip("[]")), parse_number(field, port, 1, MAX_PORT)


def parse_protocol(field: str, value: object) -> tuple[int, ...]:
    if isinstance(value, str) and value in PROTOCOLS:
        return PROTOCOLS[value]
    try:
        return (parse_number(field, value, 0, 255),)
    except FieldError:
        expected = f"{', '.join(PROTOCOLS)}, or a number from 0 to 255"
        raise FieldError(field, value, expected) from None


def _list(
    values: Mapping[str, Any], field: str, most: int, parse: Callable[[str, object], Value]
) -> tuple[Value, ...]:
    given = values.get(field, [])
    if not isinstance(given, list) or len(given) > most:
        raise FieldError(field, given, f"a list of at most {most} values")
    return tuple(parse(field, value) for value in given)


def counts_record(matched: int, lost: int) -> bytes:
    """Return the record with the number of packets that matched so far, and of those lost."""
    return _record(COUNTS, struct.pack("<QQ", matched, lost))


def end_record(reason: str) -> bytes:
    """Return the last record of an answer: why the forwarder ends the capture."""
    return _record(END, reason.encode())


def _record(kind: int, content: bytes) -> bytes:
    padding = -len(content) % 8
    return _HEAD.pack(_HEAD.size + len(content) + padding, len(content), kind) \
        + content + bytes(padding)
