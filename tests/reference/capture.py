"""Captures: which packets match a filter, and the format of a record.

Owns: the layout of a record. Pure functions. All fields of a record are little-endian; the packet
is as it was.
"""

import ipaddress
import struct
from collections.abc import Iterator
from typing import NamedTuple

from udptun.drops import DROP_REASONS
from udptun.model import CaptureFilter

from .packet import (
    AUTHENTICATION,
    ESP,
    EXTENSION_HEADERS,
    EXTENSION_HEADERS_MAX,
    FRAGMENT,
    IPV4_OFFSET,
    Dropped,
    parse_header,
)

# size, captured, time_ns, lost, length, packets, segment, port, kind, direction, reason, flags,
# writer, addr_len, addr
LAYOUT = struct.Struct("<IIQQIIHHBBBBBB6x16s")
PACKET = 1
IN, OUT = 1, 2
GENERATED = 1
PORTS = (6, 17, 132)


class Record(NamedTuple):
    time_ns: int
    lost: int
    length: int
    packets: int
    segment: int
    port: int
    direction: int
    reason: str  # "": not dropped
    generated: bool
    writer: int
    address: bytes
    data: bytes


def build_record(record: Record) -> bytes:
    reasons = ["", *(reason.name for reason in DROP_REASONS)]
    padding = -len(record.data) % 8
    return LAYOUT.pack(
        LAYOUT.size + len(record.data) + padding, len(record.data), record.time_ns, record.lost,
        record.length, record.packets, record.segment, record.port, PACKET, record.direction,
        reasons.index(record.reason), GENERATED if record.generated else 0, record.writer,
        len(record.address), record.address,
    ) + record.data + bytes(padding)


def parse_records(block: bytes) -> Iterator[Record]:
    """Yield the records of a block that the core returned. Raise ValueError if a rule is broken."""
    reasons = ["", *(reason.name for reason in DROP_REASONS)]
    while block:
        (size, captured, time_ns, lost, length, packets, segment, port, kind, direction, reason,
         flags, writer, addr_len, addr) = LAYOUT.unpack_from(block)
        if size != LAYOUT.size + captured + -captured % 8 or len(block) < size or kind != PACKET:
            raise ValueError(f"a record of {size} bytes, {captured} captured, of kind {kind}")
        yield Record(
            time_ns, lost, length, packets, segment, port, direction, reasons[reason],
            flags == GENERATED, writer, addr[:addr_len],
            block[LAYOUT.size : LAYOUT.size + captured],
        )
        block = block[size:]


class Flow(NamedTuple):
    source: ipaddress.IPv4Address | ipaddress.IPv6Address
    destination: ipaddress.IPv4Address | ipaddress.IPv6Address
    protocol: int
    ports: tuple[int, ...]  # source and destination; empty if the packet does not show them


def flow_of(packet: bytes) -> Flow | None:
    """Return the flow of a packet; None if it does not begin with a valid IP header."""
    try:
        header = parse_header(packet)
    except Dropped:
        return None
    protocol, at = header.protocol, header.header_len
    visible = not header.fragment_word & IPV4_OFFSET if header.version == 4 else False
    if header.version == 6:
        for _ in range(EXTENSION_HEADERS_MAX):
            if protocol not in EXTENSION_HEADERS or protocol == ESP:
                visible = True
                break
            if at + 8 > len(packet):
                break
            kind, protocol = protocol, packet[at]
            if kind == FRAGMENT and int.from_bytes(packet[at + 2 : at + 4], "big") >> 3:
                break
            at += 8 + {FRAGMENT: 0, AUTHENTICATION: 4}.get(kind, 8) * packet[at + 1]
    ports: tuple[int, ...] = ()
    if visible and protocol in PORTS and at + 4 <= len(packet):
        ports = struct.unpack_from("!HH", packet, at)
    return Flow(ipaddress.ip_address(header.source), ipaddress.ip_address(header.destination),
                protocol, ports)


def wants(wanted: CaptureFilter, record: Record) -> bool:
    """Return whether a packet matches. ``record.data`` is the whole packet."""
    if record.direction not in {"both": (IN, OUT), "in": (IN,), "out": (OUT,)}[wanted.direction]:
        return False
    if wanted.dropped and not record.reason:
        return False
    if wanted.peers and not any(
        record.address == address.packed and port in (0, record.port)
        for address, port in wanted.peers
    ):
        return False
    if not (wanted.networks or wanted.hosts or wanted.ports or wanted.protocols):
        return True
    flow = flow_of(record.data)
    if flow is None:
        return False
    far = flow.destination if record.direction == OUT else flow.source
    return (
        (not wanted.networks or any(far in network for network in wanted.networks))
        and all(host in (flow.source, flow.destination) for host in wanted.hosts)
        and all(port in flow.ports for port in wanted.ports)
        and (not wanted.protocols or flow.protocol in wanted.protocols)
    )
