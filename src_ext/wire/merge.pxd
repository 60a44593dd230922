"""Merge received packets into super-packets, so that one write to the TUN carries many packets.

Owns merge_t: the packets since the last ``merge_reset`` in arrival order, grouped into outputs. An
output is one packet, or consecutive segments of one flow. Payloads stay where they were received
until ``merge_frame`` copies them into one frame.

The outputs are written in the arrival order of their first packets. This preserves the order of a
flow's data. A packet that cannot join closes its flow's output: later packets of the flow start a
new output. A pure ACK closes no output, so data that arrives after it can be written before it. A
packet whose ports are hidden (a fragment) closes the outputs of all flows. A merged frame declares
to the kernel that the checksums are valid, so only verified packets are merged. The first packet
of an output is verified only when a second packet can join.

Source: the rules of Linux's tcp_gro_receive and udp_gro_receive (net/ipv4/tcp_offload.c,
udp_offload.c), RFC 9293, RFC 768, RFC 6864 (IPv4 ids without DF).
Threading: one merge_t per worker.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from wire.checksum cimport csum_add, csum_fold, csum_pseudo, ip4_set_csum
from wire.headers cimport (
    GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, IP4_FRAG, IP4_ID, IP4_LEN, IP4_MIN, IP4_SRC, IP4_TOS,
    IP6_LEN, IP6_PAYLOAD, IP6_SRC, IP_MAX, PROTO_TCP, PROTO_UDP, TCP_ACK, TCP_CSUM, TCP_F_ACK,
    TCP_F_PSH, TCP_FLAGS, TCP_MIN, TCP_OFF, TCP_SEQ, TCP_URGENT, TCP_WINDOW, UDP_CSUM, UDP_LEN,
    UDP_LENGTH, VNET_CSUM_OFFSET, VNET_CSUM_START, VNET_F_NEEDS_CSUM, VNET_FLAGS, VNET_GSO_SIZE,
    VNET_GSO_TYPE, VNET_HDR_LEN, VNET_LEN, load_be16, load_be32, load_u16, store_be16, store_u16,
)
from wire.packet cimport ip_t, is_extension


cdef enum:
    MERGE_PACKETS = 2048        # maximum packets between two calls of merge_reset
    MERGE_FLOWS = 256           # slots of the flow table; a power of two
    MERGE_UDP_MAX = 64          # datagrams of a UDP super-packet: the kernel's UDP_MAX_SEGMENTS
    MERGE_FRAME = VNET_LEN + IP_MAX  # the longest merged frame


cdef struct merge_packet_t:
    uint8_t* data
    uint32_t len
    int32_t next                # index of the next packet of the same output; -1 = last


cdef struct output_t:
    int32_t first               # index of the first packet; the others follow by ``next``
    int32_t last
    uint32_t n
    uint32_t total_len          # of the merged IP packet
    uint16_t hdr_len            # IP and transport header
    uint16_t ip_hdr_len
    uint32_t gso_size           # payload bytes of the first packet
    uint32_t next_seq           # TCP, host order
    uint16_t next_id            # IPv4, host order
    bint tcp
    bint verified               # the first packet's checksums are correct
    # No packet can join: the last one had PSH or was shorter, or the first one has a bad checksum.
    bint closed
    uint8_t flags               # TCP: of the last packet


cdef struct flow_t:
    uint64_t epoch              # the slot is valid while this equals merge_t.epoch
    int32_t output              # the flow's last output


cdef struct merge_t:
    bint tcp                    # switches: which protocols to merge
    bint udp
    int32_t packets_n
    int32_t outputs_n
    uint64_t epoch              # incremented to invalidate all flow slots
    merge_packet_t packets[MERGE_PACKETS]
    output_t outputs[MERGE_PACKETS]
    flow_t flows[MERGE_FLOWS]


cdef enum merge_class_t:        # how a packet is written, and which outputs it closes
    MERGE_CANDIDATE             # joins its flow's output, or starts one that others may join
    MERGE_ALONE                 # is an output by itself; closes no other output
    MERGE_CLOSES_FLOW           # is an output by itself; closes its flow's output
    MERGE_CLOSES_ALL            # is an output by itself; closes the outputs of all flows


cdef struct candidate_t:        # a packet, and its header fields that decide about merging
    uint8_t* p
    uint32_t n
    uint8_t version
    uint8_t addr_len
    uint8_t proto
    bint tcp
    bint dont_fragment
    uint8_t flags               # TCP; 0 for UDP
    uint16_t id                 # IPv4, host order
    uint32_t addr_off
    uint32_t ip_hdr_len
    uint32_t hdr_len
    uint32_t payload_len
    uint32_t seq                # TCP, host order


cdef inline void merge_reset(merge_t* m) noexcept nogil:
    """Remove all packets, outputs and flows."""
    m.packets_n = 0
    m.outputs_n = 0
    m.epoch += 1


# Classify


cdef inline merge_class_t merge_classify_tcp(
    const merge_t* m, const uint8_t* tcp, candidate_t* c
) noexcept nogil:
    """Read the TCP header of a candidate. Only segments with data, and with no flags except ACK and
    PSH, can be merged."""
    c.hdr_len = c.ip_hdr_len + (tcp[TCP_OFF] >> 4) * 4
    c.flags = tcp[TCP_FLAGS]
    if c.hdr_len < c.ip_hdr_len + TCP_MIN or c.hdr_len > c.n:
        return MERGE_CLOSES_FLOW
    if c.hdr_len == c.n:
        return MERGE_ALONE if c.flags == TCP_F_ACK else MERGE_CLOSES_FLOW
    if not m.tcp or c.flags & ~TCP_F_PSH != TCP_F_ACK or tcp[TCP_OFF] & 15 != 0:
        return MERGE_CLOSES_FLOW
    c.seq = load_be32(tcp + TCP_SEQ)
    return MERGE_CANDIDATE


cdef inline merge_class_t merge_classify_udp(
    const merge_t* m, const uint8_t* udp, candidate_t* c
) noexcept nogil:
    """Read the UDP header of a candidate. Only datagrams that have data and a checksum can be
    merged."""
    c.hdr_len = c.ip_hdr_len + UDP_LEN
    c.flags = 0
    if (
        not m.udp or load_be16(udp + UDP_LENGTH) != c.n - c.ip_hdr_len or c.hdr_len == c.n
        or load_u16(udp + UDP_CSUM) == 0
    ):
        return MERGE_CLOSES_FLOW
    return MERGE_CANDIDATE


cdef inline merge_class_t merge_classify(
    const merge_t* m, uint8_t* p, size_t n, const ip_t* ip, candidate_t* c
) noexcept nogil:
    """Classify packet p[0:n]. If the class is MERGE_CANDIDATE or MERGE_CLOSES_FLOW, the
    ports can be read. Packets of the other classes may have no ports."""
    cdef merge_class_t kind
    c.p = p
    c.n = <uint32_t>n
    c.version = ip.version
    c.addr_len = ip.addr_len
    c.proto = ip.proto
    c.tcp = ip.proto == PROTO_TCP
    c.dont_fragment = ip.dont_fragment
    c.addr_off = IP4_SRC if ip.version == 4 else IP6_SRC
    c.ip_hdr_len = ip.hdr_len
    c.id = 0
    c.payload_len = 0
    c.seq = 0
    if ip.fragment or ip.total_len != n or (ip.version == 6 and is_extension(ip.proto)):
        return MERGE_CLOSES_ALL
    if not c.tcp and ip.proto != PROTO_UDP:
        return MERGE_ALONE
    if n < ip.hdr_len + <size_t>(TCP_MIN if c.tcp else UDP_LEN):
        return MERGE_CLOSES_ALL
    if c.tcp:
        kind = merge_classify_tcp(m, p + ip.hdr_len, c)
    else:
        kind = merge_classify_udp(m, p + ip.hdr_len, c)
    if kind != MERGE_CANDIDATE:
        return kind
    if ip.version == 4:
        if ip.hdr_len != IP4_MIN:
            return MERGE_CLOSES_FLOW
        c.id = load_be16(p + IP4_ID)
    c.payload_len = c.n - c.hdr_len
    return MERGE_CANDIDATE


cdef inline flow_t* merge_flow(merge_t* m, const candidate_t* c) noexcept nogil:
    """Return the flow table's slot for these addresses and ports. Two flows may share a slot. Then
    a packet of one flow closes the output of the other. This prevents a merge, but does not change
    the order of packets."""
    cdef const uint8_t* addrs = c.p + c.addr_off
    cdef uint64_t h = csum_add(c.p + c.ip_hdr_len, 4, c.proto)
    cdef size_t i
    for i in range(0, 2 * c.addr_len, 4):
        h = (h ^ load_be32(addrs + i)) * <uint64_t>0x9E3779B97F4A7C15
    return &m.flows[(h >> 40) & (MERGE_FLOWS - 1)]


# Join


cdef inline bint same_headers(
    const uint8_t* a, const uint8_t* b, const output_t* out, uint8_t version
) noexcept nogil:
    """Return whether two packets of equal header lengths are equal in the fields of which a merge
    keeps only one value. These are the addresses, ports, TOS (IPv6: traffic class and flow label),
    hop limit and DF; for TCP also acknowledgment, window, urgent pointer and options."""
    cdef const uint8_t* ta = a + out.ip_hdr_len
    cdef const uint8_t* tb = b + out.ip_hdr_len
    if version == 4:
        if a[0] != b[0] or a[IP4_TOS] != b[IP4_TOS] or memcmp(a + IP4_FRAG, b + IP4_FRAG, 4) != 0:
            return False
        if memcmp(a + IP4_SRC, b + IP4_SRC, 8) != 0:
            return False
    elif memcmp(a, b, 4) != 0 or memcmp(a + 6, b + 6, 34) != 0:
        return False
    if memcmp(ta, tb, 4) != 0:
        return False
    if not out.tcp:
        return True
    return (
        memcmp(ta + TCP_ACK, tb + TCP_ACK, 5) == 0
        and memcmp(ta + TCP_WINDOW, tb + TCP_WINDOW, 2) == 0
        and memcmp(ta + TCP_URGENT, tb + TCP_URGENT, 2) == 0
        and memcmp(
            ta + TCP_MIN, tb + TCP_MIN, out.hdr_len - out.ip_hdr_len - <uint32_t>TCP_MIN
        ) == 0
    )


cdef inline bint checksums_valid(const candidate_t* c, const uint8_t* p, size_t n) noexcept nogil:
    """Return whether the transport checksum of p[0:n] and, for IPv4, the header checksum are
    correct. The packet has the same addresses, protocol and IP header length as the candidate."""
    cdef uint64_t acc
    if c.addr_len == 4 and csum_fold(csum_add(p, c.ip_hdr_len, 0)) != 0xFFFF:
        return False
    acc = csum_pseudo(p + c.addr_off, c.addr_len, c.proto, <uint32_t>(n - c.ip_hdr_len))
    return csum_fold(csum_add(p + c.ip_hdr_len, n - c.ip_hdr_len, acc)) == 0xFFFF


cdef inline bint merge_fits(
    const merge_t* m, const output_t* out, const candidate_t* c
) noexcept nogil:
    """Return whether the candidate's headers allow it to join the output. Checksums are not
    verified here."""
    return (
        not out.closed and out.tcp == c.tcp and out.hdr_len == c.hdr_len
        and out.ip_hdr_len == c.ip_hdr_len
        and c.payload_len <= out.gso_size and out.total_len + c.payload_len <= IP_MAX
        and (c.tcp or out.n < MERGE_UDP_MAX)
        and (not c.tcp or c.seq == out.next_seq)
        and (c.version == 6 or c.dont_fragment or c.id == out.next_id)
        and same_headers(m.packets[out.first].data, c.p, out, c.version)
    )


cdef inline bint verify_first(merge_t* m, output_t* out, const candidate_t* c) noexcept nogil:
    """Return whether the checksums of the output's first packet are correct. If not, close the
    output. The candidate has the same addresses and protocol."""
    if not out.verified:
        out.verified = checksums_valid(c, m.packets[out.first].data, m.packets[out.first].len)
        out.closed = not out.verified
    return out.verified


cdef inline int32_t append_packet(merge_t* m, uint8_t* p, size_t n) noexcept nogil:
    """Record the packet p[0:n] as the last packet of its output. Return the packet's index."""
    cdef int32_t i = m.packets_n
    m.packets_n += 1
    m.packets[i].data = p
    m.packets[i].len = <uint32_t>n
    m.packets[i].next = -1
    return i


cdef inline void merge_join(merge_t* m, output_t* out, const candidate_t* c) noexcept nogil:
    """Append a candidate to the output. The candidate is verified, and ``merge_fits`` is true."""
    cdef int32_t i = append_packet(m, c.p, c.n)
    m.packets[out.last].next = i
    out.last = i
    out.n += 1
    out.total_len += c.payload_len
    out.next_seq = c.seq + c.payload_len
    out.next_id = <uint16_t>(c.id + 1)
    out.flags = c.flags
    out.closed = c.payload_len < out.gso_size or c.flags & TCP_F_PSH != 0


# Open


cdef inline output_t* merge_alone(merge_t* m, uint8_t* p, size_t n) noexcept nogil:
    """Start an output with this one packet."""
    cdef output_t* out = &m.outputs[m.outputs_n]
    m.outputs_n += 1
    out.first = out.last = append_packet(m, p, n)
    out.n = 1
    out.total_len = <uint32_t>n
    return out


cdef inline void merge_open(merge_t* m, flow_t* flow, const candidate_t* c) noexcept nogil:
    """Start an output with this candidate, which later packets of its flow may join."""
    cdef output_t* out
    flow.epoch = m.epoch
    flow.output = m.outputs_n
    out = merge_alone(m, c.p, c.n)
    out.hdr_len = <uint16_t>c.hdr_len
    out.ip_hdr_len = <uint16_t>c.ip_hdr_len
    out.gso_size = c.payload_len
    out.next_seq = c.seq + c.payload_len
    out.next_id = <uint16_t>(c.id + 1)
    out.tcp = c.tcp
    out.verified = False
    out.closed = c.flags & TCP_F_PSH != 0
    out.flags = c.flags


# Add and write


cdef inline void merge_add(
    merge_t* m, uint8_t* p, size_t n, const ip_t* ip
) noexcept nogil:
    """Take one packet p[0:n], borrowed until the outputs are written.

    m   m.packets_n must be less than MERGE_PACKETS
    ip  from ``parse_ip``
    """
    cdef candidate_t c
    cdef flow_t* flow
    cdef output_t* out
    cdef merge_class_t kind = merge_classify(m, p, n, ip, &c)
    if kind == MERGE_CLOSES_ALL:
        m.epoch += 1
    if kind == MERGE_CLOSES_ALL or kind == MERGE_ALONE:
        merge_alone(m, p, n)
        return
    flow = merge_flow(m, &c)
    if kind == MERGE_CANDIDATE and flow.epoch == m.epoch:
        out = &m.outputs[flow.output]
        if merge_fits(m, out, &c) and verify_first(m, out, &c):
            if checksums_valid(&c, p, n):
                merge_join(m, out, &c)
                return
            kind = MERGE_CLOSES_FLOW
    if kind == MERGE_CANDIDATE:
        merge_open(m, flow, &c)
    else:
        flow.epoch = 0
        merge_alone(m, p, n)


cdef inline size_t merge_frame(
    const merge_t* m, const output_t* out, uint8_t* frame
) noexcept nogil:
    """Write one merged output (n > 1) as a frame for the TUN, vnet header first.

    frame    room for MERGE_FRAME bytes
    returns  bytes written
    """
    cdef const merge_packet_t* packet = &m.packets[out.first]
    cdef uint8_t* ip = frame + VNET_LEN
    cdef uint8_t* l4 = ip + out.ip_hdr_len
    cdef uint8_t* end = ip + out.hdr_len
    cdef bint v4 = out.ip_hdr_len != IP6_LEN
    cdef uint32_t l4_len = out.total_len - out.ip_hdr_len
    cdef uint32_t proto = PROTO_TCP if out.tcp else PROTO_UDP
    cdef uint32_t len_
    cdef uint16_t csum
    frame[VNET_FLAGS] = VNET_F_NEEDS_CSUM
    if not out.tcp:
        frame[VNET_GSO_TYPE] = GSO_UDP_L4
    else:
        frame[VNET_GSO_TYPE] = GSO_TCPV4 if v4 else GSO_TCPV6
    store_u16(frame + VNET_HDR_LEN, out.hdr_len)
    store_u16(frame + VNET_GSO_SIZE, <uint16_t>out.gso_size)
    store_u16(frame + VNET_CSUM_START, out.ip_hdr_len)
    store_u16(frame + VNET_CSUM_OFFSET, TCP_CSUM if out.tcp else UDP_CSUM)
    memcpy(ip, packet.data, out.hdr_len)
    if v4:
        store_be16(ip + IP4_LEN, out.total_len)
        ip4_set_csum(ip, out.ip_hdr_len)
        csum = csum_fold(csum_pseudo(ip + IP4_SRC, 4, proto, l4_len))
    else:
        store_be16(ip + IP6_PAYLOAD, l4_len)
        csum = csum_fold(csum_pseudo(ip + IP6_SRC, 16, proto, l4_len))
    if out.tcp:
        l4[TCP_FLAGS] = out.flags
        store_u16(l4 + TCP_CSUM, csum)
    else:
        store_be16(l4 + UDP_LENGTH, l4_len)
        store_u16(l4 + UDP_CSUM, csum)
    while True:
        len_ = packet.len - out.hdr_len
        memcpy(end, packet.data + out.hdr_len, len_)
        end += len_
        if packet.next < 0:
            return end - frame
        packet = &m.packets[packet.next]
