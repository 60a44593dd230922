"""Merge received packets into super-packets for one write to the TUN.

Owns the coalescer: the packets of one turn in arrival order, gathered into outputs; an output is
one packet, or a run of segments of one flow. Payloads stay where they were received until
``merge_frame`` puts them together.

An output is placed where its first packet came, so the order within a flow is kept. A packet that
its flow cannot take seals the flow: nothing later joins what came before it. A pure ACK does not
seal; what hides its ports (a fragment) seals all flows. Nothing is merged whose checksums were not
verified: the write tells the kernel not to look again. The first packet of a flow is verified only
when a second one wants to join it.

Source: the rules of Linux's tcp_gro_receive and udp_gro_receive (net/ipv4/tcp_offload.c,
udp_offload.c), RFC 9293, RFC 768, RFC 6864 (IPv4 ids without DF).
Threading: one coalescer a worker.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from wire.checksum cimport csum_add, csum_fold, csum_pseudo, ip4_set_csum
from wire.packet cimport ip_t, is_extension
from wire.headers cimport (
    GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, IP4_FRAG, IP4_ID, IP4_LEN, IP4_MIN, IP4_SRC, IP4_TOS,
    IP6_LEN, IP6_PAYLOAD, IP6_SRC, IP_MAX, PROTO_TCP, PROTO_UDP, TCP_ACK, TCP_CSUM, TCP_F_ACK,
    TCP_F_PSH, TCP_FLAGS, TCP_MIN, TCP_OFF, TCP_SEQ, TCP_URGENT, TCP_WINDOW, UDP_CSUM, UDP_LEN,
    UDP_LENGTH, VNET_CSUM_OFFSET, VNET_CSUM_START, VNET_F_NEEDS_CSUM, VNET_FLAGS, VNET_GSO_SIZE,
    VNET_GSO_TYPE, VNET_HDR_LEN, VNET_LEN, load_be16, load_be32, load_u16, store_be16, store_u16,
)


cdef enum:
    MERGE_PACKETS = 2048        # in one turn
    MERGE_FLOWS = 256           # remembered at once; a power of two
    MERGE_UDP_MAX = 64          # segments of a UDP super-packet: the kernel's UDP_MAX_SEGMENTS
    MERGE_FRAME = VNET_LEN + IP_MAX  # the longest merged frame


cdef struct merge_packet_t:
    uint8_t* data
    uint32_t len
    int32_t next                # of the same output; -1 = last


cdef struct output_t:
    int32_t first               # packets, linked by next
    int32_t last
    uint32_t n
    uint32_t total_len          # of the merged IP packet
    uint16_t hdr_len            # IP and transport header; 0 = never merges
    uint16_t ip_hdr_len
    uint32_t gso_size           # payload of the first segment
    uint32_t next_seq           # TCP, host order
    uint16_t next_id            # IPv4, host order
    bint tcp
    bint verified               # the first packet's checksums
    bint closed                 # PSH, or a shorter segment, ended it
    uint8_t flags               # TCP: of the last segment


cdef struct flow_t:
    uint64_t seal               # valid while equal to merge_t.seal
    int32_t output


cdef struct merge_t:
    bint tcp                    # switches
    bint udp
    int32_t packets_n
    int32_t outputs_n
    uint64_t seal               # raised to forget all flows at once
    merge_packet_t packets[MERGE_PACKETS]
    output_t outputs[MERGE_PACKETS]
    flow_t flows[MERGE_FLOWS]


cdef inline void merge_reset(merge_t* m) noexcept nogil:
    """Start a turn: no packets, no flows."""
    m.packets_n = 0
    m.outputs_n = 0
    m.seal += 1


cdef inline flow_t* merge_flow(
    merge_t* m, const uint8_t* addrs, size_t addrs_len, const uint8_t* ports, uint32_t proto
) noexcept nogil:
    """Where the flow of these addresses and ports is remembered. Two flows may share the place:
    the later one then seals the earlier one, which costs a merge and never the order."""
    cdef uint64_t h = csum_add(ports, 4, proto)
    cdef size_t i
    for i in range(0, addrs_len, 4):
        h = (h ^ load_be32(addrs + i)) * <uint64_t>0x9E3779B97F4A7C15
    return &m.flows[(h >> 40) & (MERGE_FLOWS - 1)]


cdef inline bint l4_verifies(
    const uint8_t* p, size_t addr_off, size_t addr_len, size_t ip_hdr_len, size_t n, uint32_t proto
) noexcept nogil:
    """Whether the transport checksum of the packet p[0:n] is right, and IPv4's of the header."""
    cdef uint64_t acc
    if addr_len == 4 and csum_fold(csum_add(p, ip_hdr_len, 0)) != 0xFFFF:
        return False
    acc = csum_pseudo(p + addr_off, addr_len, proto, <uint32_t>(n - ip_hdr_len))
    return csum_fold(csum_add(p + ip_hdr_len, n - ip_hdr_len, acc)) == 0xFFFF


cdef inline int32_t merge_append(merge_t* m, uint8_t* p, size_t n) noexcept nogil:
    """A new output of this one packet; returns its index."""
    cdef int32_t i = m.packets_n
    cdef output_t* out = &m.outputs[m.outputs_n]
    m.packets_n += 1
    m.packets[i].data = p
    m.packets[i].len = <uint32_t>n
    m.packets[i].next = -1
    out.first = out.last = i
    out.n = 1
    out.total_len = <uint32_t>n
    out.hdr_len = 0
    m.outputs_n += 1
    return m.outputs_n - 1


cdef inline bint same_headers(
    const uint8_t* a, const uint8_t* b, const output_t* out, uint8_t version
) noexcept nogil:
    """Whether two packets of equal header lengths agree in all that a merge must keep: addresses,
    ports, TOS or traffic class and flow label, hop limit, DF, and TCP's ack, window, urgent
    pointer and options."""
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


cdef inline void merge_add(
    merge_t* m, uint8_t* p, size_t n, const ip_t* ip
) noexcept nogil:
    """Take one packet, n bytes at p, borrowed until the outputs are written.

    ip  from ``parse_ip``; the caller keeps packets_n under MERGE_PACKETS
    """
    cdef size_t addr_off = IP4_SRC if ip.version == 4 else IP6_SRC
    cdef uint8_t* l4 = p + ip.hdr_len
    cdef uint32_t hdr_len, payload_len, seq = 0
    cdef uint16_t id_ = 0
    cdef uint8_t flags = 0
    cdef bint tcp = ip.proto == PROTO_TCP
    cdef flow_t* flow
    cdef output_t* out
    cdef int32_t i

    if ip.fragment or ip.total_len != n or (ip.version == 6 and is_extension(ip.proto)):
        m.seal += 1
        merge_append(m, p, n)
        return
    if not tcp and ip.proto != PROTO_UDP:
        merge_append(m, p, n)
        return
    if n < ip.hdr_len + <size_t>(TCP_MIN if tcp else UDP_LEN):
        m.seal += 1
        merge_append(m, p, n)
        return
    flow = merge_flow(m, p + addr_off, 2 * ip.addr_len, l4, ip.proto)

    # what can never join or be joined
    if tcp:
        hdr_len = ip.hdr_len + (l4[TCP_OFF] >> 4) * 4
        flags = l4[TCP_FLAGS]
        if hdr_len < ip.hdr_len + TCP_MIN or hdr_len > n:
            flow.seal = 0
            merge_append(m, p, n)
            return
        if hdr_len == n and flags == TCP_F_ACK:
            merge_append(m, p, n)
            return
        if (
            not m.tcp or flags & ~TCP_F_PSH != TCP_F_ACK or hdr_len == n
            or l4[TCP_OFF] & 15 != 0
        ):
            flow.seal = 0
            merge_append(m, p, n)
            return
        seq = load_be32(l4 + TCP_SEQ)
    else:
        hdr_len = ip.hdr_len + UDP_LEN
        if (
            not m.udp or load_be16(l4 + UDP_LENGTH) != n - ip.hdr_len or hdr_len == n
            or load_u16(l4 + UDP_CSUM) == 0
        ):
            flow.seal = 0
            merge_append(m, p, n)
            return
    if ip.version == 4:
        if ip.hdr_len != IP4_MIN:
            flow.seal = 0
            merge_append(m, p, n)
            return
        id_ = load_be16(p + IP4_ID)
    payload_len = <uint32_t>n - hdr_len

    # join the flow's open output
    if flow.seal == m.seal:
        out = &m.outputs[flow.output]
        if (
            not out.closed and out.tcp == tcp and out.hdr_len == hdr_len
            and out.ip_hdr_len == ip.hdr_len
            and payload_len <= out.gso_size and out.total_len + payload_len <= IP_MAX
            and (tcp or out.n < MERGE_UDP_MAX)
            and (not tcp or seq == out.next_seq)
            and (ip.version == 6 or ip.dont_fragment or id_ == out.next_id)
            and same_headers(m.packets[out.first].data, p, out, ip.version)
        ):
            if not out.verified:
                if not l4_verifies(
                    m.packets[out.first].data, addr_off, ip.addr_len, ip.hdr_len,
                    m.packets[out.first].len, ip.proto,
                ):
                    out.closed = True
                else:
                    out.verified = True
            if not out.closed:
                if not l4_verifies(p, addr_off, ip.addr_len, ip.hdr_len, n, ip.proto):
                    flow.seal = 0
                    merge_append(m, p, n)
                    return
                i = m.packets_n
                m.packets_n += 1
                m.packets[i].data = p
                m.packets[i].len = <uint32_t>n
                m.packets[i].next = -1
                m.packets[out.last].next = i
                out.last = i
                out.n += 1
                out.total_len += payload_len
                out.next_seq = seq + payload_len
                out.next_id = <uint16_t>(id_ + 1)
                out.flags = flags
                out.closed = payload_len < out.gso_size or flags & TCP_F_PSH != 0
                return

    # open a new one
    i = merge_append(m, p, n)
    out = &m.outputs[i]
    out.hdr_len = <uint16_t>hdr_len
    out.ip_hdr_len = <uint16_t>ip.hdr_len
    out.gso_size = payload_len
    out.next_seq = seq + payload_len
    out.next_id = <uint16_t>(id_ + 1)
    out.tcp = tcp
    out.verified = False
    out.closed = flags & TCP_F_PSH != 0
    out.flags = flags
    flow.seal = m.seal
    flow.output = i


cdef inline size_t merge_frame(
    const merge_t* m, const output_t* out, uint8_t* frame
) noexcept nogil:
    """Write one merged output (n > 1) as a frame for the TUN, vnet header first.

    frame    room for MERGE_FRAME bytes
    returns  how many are used
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
