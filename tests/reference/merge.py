"""Merge received packets of one flow into frames that hold a super-packet for the TUN.

Owns: which packets may be merged, and the vnet header of the result. Does not depend on hop limits,
source checks or batch sizes. Pure functions.

The kernel does not verify the checksums of a merged frame, so only packets with a verified
checksum are merged. Every other packet is written unchanged, and the kernel verifies its checksum.
A host that forwards a merged packet cuts it again and must get the original packets. So the packets
of a merge must be equal in all header fields that a cut copies.
"""

import struct
from typing import NamedTuple

from .checksum import checksum, pseudo_header, transport_sum
from .cut import (
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    NEEDS_CSUM,
    TCP_ACK,
    TCP_CSUM_OFFSET,
    TCP_PSH,
    UDP_CSUM_OFFSET,
    VNET_HDR,
)
from .packet import (
    EXTENSION_HEADERS,
    IP_MAX,
    IPV4_MIN,
    PROTO_TCP,
    PROTO_UDP,
    IPHeader,
    check_packet,
    parse_header,
    with_ipv4_checksum,
)

UDP_SEGMENTS_MAX = 64  # UDP_MAX_SEGMENTS of kernels before 6.9

Flow = tuple[int, bytes, bytes, bytes]  # protocol, source, destination, both ports


class _Segment(NamedTuple):
    """A packet that can be merged."""

    packet: bytes
    header: IPHeader
    payload_at: int  # offset of the payload

    @property
    def payload(self) -> bytes:
        return self.packet[self.payload_at :]

    @property
    def transport(self) -> bytes:
        """The transport header."""
        return self.packet[self.header.header_len : self.payload_at]

    @property
    def ident(self) -> int:
        return int.from_bytes(self.packet[4:6], "big")

    @property
    def seq(self) -> int:
        return int.from_bytes(self.transport[4:8], "big")

    @property
    def pushed(self) -> bool:
        return self.header.protocol == PROTO_TCP and bool(self.transport[13] & TCP_PSH)


# Which open groups a packet closes.
_CLOSES_NONE = "none"
_CLOSES_FLOW = "flow"
_CLOSES_ALL = "all"


def merge(packets: list[bytes], tcp: bool = True, udp: bool = True) -> list[bytes]:
    """Return frames for a TUN with IFF_VNET_HDR: virtio_net_hdr, then one packet or a merged one.

    packets  in the order of arrival; each has passed check_packet
    tcp, udp whether packets of that protocol are merged
    returns  frames in the order of their first packets. The packets of a flow keep their order.
             Exception: a pure ACK may be moved behind data that arrived after the ACK. The frame of
             a packet that is not merged is ten zero bytes and the unchanged packet.
    merged   the frame of n >= 2 packets has: NEEDS_CSUM; gso_size = the first packet's payload
             length; hdr_len and csum_start computed from the headers; in the transport checksum
             field the sum of the pseudo-header, not inverted; the lengths of the merged packet; a
             correct IPv4 header checksum; the first packet's IPv4 id; the last packet's PSH. A
             merged packet has at most 65535 bytes with headers. UDP: at most 64 packets.
    drops    as check_packet; if one packet fails, nothing is returned

    A packet joins the open group of its flow if all these conditions are true ("first" is the
    first packet of the group):
    - IPv4: the header has 20 bytes and a correct checksum; the packet is not a fragment.
    - IPv6: there is no extension header.
    - The declared length is the received length. The transport checksum is present and correct.
      There is a payload.
    - TCP: the flags, including reserved bits, are exactly ACK, or ACK and PSH. The sequence number
      follows the group's last byte. The ack number, window, urgent pointer and options equal
      those of the first.
    - UDP: the UDP length is the length of the IP payload.
    - TOS or traffic class, flow label, TTL or hop limit, and IPv4's DF and reserved bit equal those
      of the first. If DF is clear, the IPv4 id is that of the group's last packet + 1.
    - The payload is not longer than that of the first.
    A packet with PSH closes the group that it joins or opens. A packet with a shorter payload than
    the first closes the group that it joins.
    A packet that can be merged but does not fit the open group of its flow closes that group and
    opens a new one. A packet that cannot be merged closes the open group of its flow. A packet
    whose ports cannot be read (a fragment, IPv6 extension headers, padding behind the declared
    length, TCP or UDP with less than a fixed header) closes all groups. A pure ACK (flags exactly
    ACK, no payload) and packets of other protocols close none.
    source   linux/virtio_net.h; linux net/ipv4/tcp_offload.c and udp_offload.c (the kernel's GRO)
    """
    groups: list[list[_Segment] | bytes] = []  # in output order; bytes: a single packet
    open_groups: dict[Flow, list[_Segment]] = {}
    for packet in packets:
        check_packet(packet)
        flow, segment, closes = _classify(packet)
        wanted = segment is not None and (tcp if flow and flow[0] == PROTO_TCP else udp)
        if flow is None or segment is None or not wanted:
            groups.append(packet)
            if closes == _CLOSES_ALL:
                open_groups.clear()
            elif closes == _CLOSES_FLOW and flow is not None:
                open_groups.pop(flow, None)
            continue
        group = open_groups.get(flow)
        if group is not None and _joins(group, segment):
            group.append(segment)
        else:
            group = [segment]
            groups.append(group)
            open_groups[flow] = group
        if segment.pushed or len(segment.payload) < len(group[0].payload):
            del open_groups[flow]
    return [_frame(group) for group in groups]


def _classify(packet: bytes) -> tuple[Flow | None, _Segment | None, str]:
    """Return the packet's flow (None if unknown), the segment if the packet can be merged (else
    None), and which groups the packet closes."""
    header = parse_header(packet)
    transport = packet[header.header_len :]
    hidden = header.version == 6 and header.protocol in EXTENSION_HEADERS
    if header.is_fragment or header.total_len != len(packet) or hidden:
        return None, None, _CLOSES_ALL
    if header.protocol not in (PROTO_TCP, PROTO_UDP):
        return None, None, _CLOSES_NONE
    if len(transport) < (20 if header.protocol == PROTO_TCP else 8):
        return None, None, _CLOSES_ALL
    flow = (header.protocol, header.source, header.destination, transport[:4])

    transport_len, closes = _judge_transport(header.protocol, transport)
    mergeable = (
        transport_len > 0
        and len(transport) > transport_len
        and (header.version == 6 or _plain_ipv4(packet, header))
        and transport_sum(header.source, header.destination, header.protocol, transport) == 0xFFFF
    )
    if not mergeable:
        return flow, None, closes
    return flow, _Segment(packet, header, header.header_len + transport_len), closes


def _judge_transport(protocol: int, transport: bytes) -> tuple[int, str]:
    """Return the length of the transport header, or 0 if the header does not allow merging. Also
    return which groups the packet closes if it is not merged."""
    if protocol == PROTO_UDP:
        whole = int.from_bytes(transport[4:6], "big") == len(transport)
        return 8 if whole and transport[6:8] != b"\0\0" else 0, _CLOSES_FLOW
    length, reserved, flags = (transport[12] >> 4) * 4, transport[12] & 0x0F, transport[13]
    if not 20 <= length <= len(transport):
        return 0, _CLOSES_FLOW
    if flags == TCP_ACK and len(transport) == length:
        return 0, _CLOSES_NONE
    mergeable = reserved == 0 and flags in (TCP_ACK, TCP_ACK | TCP_PSH)
    return length if mergeable else 0, _CLOSES_FLOW


def _plain_ipv4(packet: bytes, header: IPHeader) -> bool:
    return header.header_len == IPV4_MIN and checksum(packet[:IPV4_MIN]) == 0xFFFF


def _joins(group: list[_Segment], segment: _Segment) -> bool:
    first = group[0]
    merged_len = sum(len(member.payload) for member in group)
    if len(segment.payload) > len(first.payload):
        return False
    if first.payload_at + merged_len + len(segment.payload) > IP_MAX:
        return False
    if not _continues_ip(first, segment, len(group)):
        return False
    if segment.header.protocol == PROTO_UDP:
        return len(group) < UDP_SEGMENTS_MAX
    return _continues_tcp(first, segment, merged_len)


def _continues_ip(first: _Segment, segment: _Segment, index: int) -> bool:
    if segment.header.hop_limit != first.header.hop_limit:
        return False
    if segment.header.version == 6:
        return segment.packet[:4] == first.packet[:4]  # traffic class, flow label
    return (
        segment.packet[1] == first.packet[1]  # TOS
        and segment.header.fragment_word == first.header.fragment_word  # DF, reserved bit
        and (first.header.dont_fragment or segment.ident == (first.ident + index) % 2**16)
    )


def _continues_tcp(first: _Segment, segment: _Segment, merged_len: int) -> bool:
    this, other = segment.transport, first.transport
    return (
        segment.seq == (first.seq + merged_len) % 2**32
        and this[8:12] == other[8:12]  # ack number
        and this[12] == other[12]  # header length
        and this[14:16] == other[14:16]  # window
        and this[18:] == other[18:]  # urgent pointer, options
    )


def _frame(group: list[_Segment] | bytes) -> bytes:
    if isinstance(group, bytes):
        return bytes(VNET_HDR.size) + group
    first, last = group[0], group[-1]
    if len(group) == 1:
        return bytes(VNET_HDR.size) + first.packet
    header = first.header
    payload = b"".join(member.payload for member in group)
    transport_len = len(first.transport) + len(payload)
    pseudo_sum = checksum(
        pseudo_header(header.source, header.destination, header.protocol, transport_len)
    ).to_bytes(2, "big")
    if header.protocol == PROTO_TCP:
        gso_type = GSO_TCPV4 if header.version == 4 else GSO_TCPV6
        csum_offset = TCP_CSUM_OFFSET
        flags = first.transport[13] | last.transport[13]
        transport = first.transport[:13] + bytes([flags]) + first.transport[14:16]
        transport += pseudo_sum + first.transport[18:]
    else:
        gso_type = GSO_UDP_L4
        csum_offset = UDP_CSUM_OFFSET
        transport = first.transport[:4] + struct.pack("!H", transport_len) + pseudo_sum
    if header.version == 4:
        total_len = struct.pack("!H", header.header_len + transport_len)
        ip = with_ipv4_checksum(first.packet[:2] + total_len + first.packet[4:20])
    else:
        ip = first.packet[:4] + struct.pack("!H", transport_len) + first.packet[6:40]
    vnet = VNET_HDR.pack(
        NEEDS_CSUM, gso_type, first.payload_at, len(first.payload), header.header_len, csum_offset
    )
    return vnet + ip + transport + payload
