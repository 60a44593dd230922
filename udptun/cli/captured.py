"""The records of a capture, as the forwarder sends them.

Owns the parsing of ``capture_record_t`` (src_ext/path/capture.pxd) and of the two further kinds of
records. Does not depend on what is done with a packet. Pure functions, any thread.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ..errors import UdptunError

PACKET, COUNTS, END = 1, 2, 3
DIRECTIONS = {1: "in", 2: "out"}
GENERATED = 1
SIZE_MAX = 1 << 20
_RECORD = struct.Struct("<IIQQIIHHBBBBBB6x16s")


class Packet(NamedTuple):
    """A captured packet.

    time_ns    since 1970
    direction  "out": from this host to a peer; "in": the opposite
    reason     why it was dropped; "": it was not
    length     of the packet in bytes
    packets    segments of the super-packet; packets that were dropped together
    segment    payload bytes of each segment; 0: it is not a super-packet
    generated  whether it is an ICMP error that the forwarder has made
    endpoint   the outer address and port of the other end; "": not known
    lost       matching packets before this one that were not recorded, for lack of space
    data       the packet, or its first bytes; it may be no IP packet
    """

    time_ns: int
    direction: str
    reason: str
    length: int
    packets: int
    segment: int
    generated: bool
    endpoint: str
    lost: int
    data: bytes


class Counts(NamedTuple):
    """How many packets have matched so far, and how many of them were lost for lack of space."""

    matched: int
    lost: int


class End(NamedTuple):
    """The forwarder ends the capture."""

    reason: str


Record = Packet | Counts | End


def records(head: Mapping[str, Any], pieces: Iterable[bytes]) -> Iterator[list[Record]]:
    """Yield the records of each piece. Records of kinds that are not known are left out.

    head    of the answer
    pieces  of the rest of the answer; a record may continue in the next piece
    """
    reasons, offset, rest = ["", *map(str, head["reasons"])], int(head["clock_offset_ns"]), b""
    for piece in pieces:
        rest += piece
        at, found = 0, []
        while len(rest) - at >= _RECORD.size:
            size, captured = struct.unpack_from("<II", rest, at)
            if not _RECORD.size + captured <= size <= SIZE_MAX:
                raise UdptunError(f"the forwarder sent an invalid record of {size} bytes")
            if len(rest) - at < size:
                break
            record = _record(rest[at : at + size], reasons, offset)
            if record is not None:
                found.append(record)
            at += size
        rest = rest[at:]
        if found:
            yield found


def _record(text: bytes, reasons: list[str], offset: int) -> Record | None:
    (_, captured, time_ns, lost, length, packets, segment, port, kind, direction, reason, flags, _,
     addr_len, addr) = _RECORD.unpack_from(text)
    data = text[_RECORD.size : _RECORD.size + captured]
    if kind == COUNTS:
        return Counts(*struct.unpack_from("<QQ", data)) if len(data) >= 16 else None
    if kind == END:
        return End(data.decode(errors="replace"))
    if kind != PACKET:
        return None
    return Packet(
        time_ns=time_ns + offset, direction=DIRECTIONS.get(direction, "in"),
        reason=reasons[reason] if reason < len(reasons) else f"reason {reason}", length=length,
        packets=packets, segment=segment, generated=flags & GENERATED != 0,
        endpoint=_endpoint(addr[:addr_len], port) if addr_len else "", lost=lost, data=data,
    )


@lru_cache(4096)
def _endpoint(packed: bytes, port: int) -> str:
    host = str(ipaddress.ip_address(packed))
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
