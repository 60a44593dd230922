"""Cut the kernel's super-packets into IP packets.

Owns the parsing of the virtio_net_hdr that precedes each packet read from the TUN. ``plan_cut``
validates a frame, ``cut_start`` makes a template of the segments' headers, ``cut_segment`` writes a
segment, and ``cut_header`` writes only the headers of a segment. Does not depend on workers.
Each payload byte is summed once. The constant part of the headers is summed once per super-packet.
Source: linux/virtio_net.h, RFC 9293 (seq, FIN/PSH), RFC 3168 6.1.2 (CWR on the first only),
RFC 768 (a computed 0 is sent as 0xFFFF), RFC 6864 (IPv4 id), RFC 8200 4 (extension headers: a TCP
super-packet has them if the application set them on its socket, RFC 3542 sticky options).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from drops cimport DROP_BAD_GSO, DROP_BAD_L4_HEADER, PASS, drop_t
from wire.checksum cimport csum_add, csum_not, csum_pseudo
from wire.headers cimport (
    GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, IP4_CSUM, IP4_ID, IP4_LEN, IP6_LEN,
    IP6_PAYLOAD, IP_MAX, PROTO_TCP, PROTO_UDP, TCP_CSUM, TCP_F_CWR, TCP_F_FIN, TCP_F_PSH,
    TCP_FLAGS, TCP_MIN, TCP_OFF, TCP_SEQ, UDP_CSUM, UDP_LEN, UDP_LENGTH, VNET_CSUM_OFFSET,
    VNET_CSUM_START, VNET_F_NEEDS_CSUM, VNET_FLAGS, VNET_GSO_SIZE, VNET_GSO_TYPE, load_be16,
    load_be32, load_u16, store_be16, store_be32, store_u16, swap16,
)
from wire.packet cimport ip_src, ip_t, skip_extensions


cdef enum:
    MAX_SEG_HDR = 120       # an IPv4 and a TCP header, each with the maximum of options
    # Size of a header buffer, >= MAX_SEG_HDR. cut_header copies the first half, and the second half
    # only if the headers are longer.
    SEG_HDR_ROOM = 128


cdef struct cut_t:
    bint tcp
    uint8_t version
    uint32_t ip_hdr_len     # including IPv6 extension headers
    uint32_t hdr_len        # IP and transport header of each segment
    uint32_t payload_len    # of the whole super-packet
    uint32_t gso_size       # payload bytes of each segment; the last may be shorter
    uint32_t n              # segments, >= 1
    uint32_t seq            # TCP: of the first segment, host order
    uint32_t ip_id          # IPv4: of the first segment, host order
    uint64_t pseudo         # sum of the pseudo-header without the length
    # set by ``cut_start``: the template of the headers (zeros where segments differ), and its sums
    uint8_t flags           # TCP: of the super-packet
    uint64_t ip_base        # sum of the IPv4 header in ``hdr``
    uint64_t l4_base        # ``pseudo``, plus the sum of the transport header in ``hdr``
    uint8_t hdr[SEG_HDR_ROOM]


cdef inline bint is_super(const uint8_t* vnet) noexcept nogil:
    return vnet[VNET_GSO_TYPE] != GSO_NONE


cdef inline drop_t complete_checksum(
    const uint8_t* vnet, uint8_t* p, size_t n, const ip_t* ip
) noexcept nogil:
    """Complete the transport checksum if the kernel left it to the device (NEEDS_CSUM, no GSO).

    p      the IP packet, n bytes; the checksum field holds the pseudo-header's sum
    ip     from ``parse_ip``; still valid after the call
    drops  BAD_GSO if the offsets point into the IP header or outside the packet
    """
    cdef size_t start, field
    cdef uint16_t csum
    if not vnet[VNET_FLAGS] & VNET_F_NEEDS_CSUM:
        return PASS
    start = load_u16(vnet + VNET_CSUM_START)
    field = start + load_u16(vnet + VNET_CSUM_OFFSET)
    if start < ip.hdr_len or field + 2 > n:
        return DROP_BAD_GSO
    csum = csum_not(csum_add(p + start, n - start, 0))
    if csum == 0 and field - start == UDP_CSUM:
        csum = 0xFFFF
    store_u16(p + field, csum)
    return PASS


cdef inline drop_t plan_cut(
    const uint8_t* vnet, uint8_t* p, size_t n, const ip_t* ip, cut_t* cut
) noexcept nogil:
    """Validate a super-packet, and compute how to cut it.

    p      the IP packet, n bytes, at most 65535. On PASS, this function has set the transport
           header's checksum and UDP's length field to zero
    ip     from ``parse_ip``
    cut    the result. If the packet is dropped, cut.n is unchanged; all other fields are undefined
    drops  BAD_GSO: gso_size 0, unknown type, the type contradicts the protocol, the checksum
           offsets contradict the headers. BAD_L4_HEADER: the TCP or UDP header or an extension
           header does not parse, or all headers together exceed MAX_SEG_HDR
    """
    cdef uint8_t kind = vnet[VNET_GSO_TYPE]
    cdef uint8_t* l4
    cdef size_t l4_len
    cdef uint32_t l4_hdr, csum_off
    cdef uint32_t ip_hdr_len = ip.hdr_len
    cdef uint8_t expected, proto
    cdef drop_t verdict
    cut.tcp = kind & ~GSO_ECN == GSO_TCPV4 or kind & ~GSO_ECN == GSO_TCPV6
    if cut.tcp:
        if ip.version != (4 if kind & ~GSO_ECN == GSO_TCPV4 else 6):
            return DROP_BAD_GSO
    elif kind != GSO_UDP_L4:
        return DROP_BAD_GSO
    expected = PROTO_TCP if cut.tcp else PROTO_UDP
    if ip.proto != expected:
        proto = ip.proto
        if ip.version == 6:
            verdict = skip_extensions(p, n, &proto, &ip_hdr_len)
            if verdict != PASS:
                return verdict
        if proto != expected:
            return DROP_BAD_GSO
    l4 = p + ip_hdr_len
    l4_len = n - ip_hdr_len
    if cut.tcp:
        csum_off = TCP_CSUM
        if l4_len < TCP_MIN:
            return DROP_BAD_L4_HEADER
        l4_hdr = (l4[TCP_OFF] >> 4) * 4
        if l4_hdr < TCP_MIN or l4_hdr > l4_len:
            return DROP_BAD_L4_HEADER
    else:
        csum_off = UDP_CSUM
        l4_hdr = UDP_LEN
        if l4_len < UDP_LEN:
            return DROP_BAD_L4_HEADER
    if ip_hdr_len + l4_hdr > MAX_SEG_HDR:
        return DROP_BAD_L4_HEADER
    cut.gso_size = load_u16(vnet + VNET_GSO_SIZE)
    if cut.gso_size == 0 or ip.fragment or n > IP_MAX:
        return DROP_BAD_GSO
    if vnet[VNET_FLAGS] & VNET_F_NEEDS_CSUM and (
        load_u16(vnet + VNET_CSUM_START) != ip_hdr_len
        or load_u16(vnet + VNET_CSUM_OFFSET) != csum_off
    ):
        return DROP_BAD_GSO
    cut.version = ip.version
    cut.ip_hdr_len = ip_hdr_len
    cut.hdr_len = ip_hdr_len + l4_hdr
    cut.payload_len = <uint32_t>(n - cut.hdr_len)
    if cut.gso_size > cut.payload_len:
        cut.gso_size = cut.payload_len
    cut.n = 1
    if cut.payload_len != 0:
        cut.n = (cut.payload_len + cut.gso_size - 1) // cut.gso_size
    cut.seq = load_be32(l4 + TCP_SEQ) if cut.tcp else 0
    cut.ip_id = load_be16(p + IP4_ID)
    store_u16(l4 + csum_off, 0)
    cut.pseudo = csum_pseudo(ip_src(p, ip), ip.addr_len, expected, 0)
    if not cut.tcp:
        store_u16(l4 + UDP_LENGTH, 0)
    return PASS


cdef inline uint32_t cut_payload_len(const cut_t* cut, uint32_t i) noexcept nogil:
    """Return the payload bytes of segment i: gso_size, or fewer for the last segment."""
    if i + 1 < cut.n:
        return cut.gso_size
    return cut.payload_len - i * cut.gso_size


cdef inline void cut_start(cut_t* cut, const uint8_t* p) noexcept nogil:
    """Make the template of the headers of all segments. p is the super-packet after ``plan_cut``.
    The segments get the hop limit that the super-packet has at this call."""
    cdef uint8_t* l4 = cut.hdr + cut.ip_hdr_len
    memcpy(cut.hdr, p, cut.hdr_len)
    cut.ip_base = cut.flags = 0
    if cut.version == 4:
        store_u16(cut.hdr + IP4_LEN, 0)
        store_u16(cut.hdr + IP4_ID, 0)
        store_u16(cut.hdr + IP4_CSUM, 0)
        cut.ip_base = csum_add(cut.hdr, cut.ip_hdr_len, 0)
    if cut.tcp:
        cut.flags = l4[TCP_FLAGS]
        l4[TCP_FLAGS] = 0
        store_be32(l4 + TCP_SEQ, 0)
    cut.l4_base = csum_add(l4, cut.hdr_len - cut.ip_hdr_len, cut.pseudo)


cdef inline void cut_header(
    const cut_t* cut, const uint8_t* payload, uint32_t i, uint8_t* out
) noexcept nogil:
    """Write the headers of segment i. The code does not read bytes that it has just written: if
    several smaller stores wrote the bytes, the load waits until these stores complete.

    payload  the payload of this segment, cut_payload_len(i) bytes; does not overlap out
    out      SEG_HDR_ROOM bytes; the bytes after the headers are overwritten too
    """
    cdef uint32_t len_ = cut_payload_len(cut, i)
    cdef uint32_t l4_len = cut.hdr_len - cut.ip_hdr_len + len_
    cdef uint8_t* l4 = out + cut.ip_hdr_len
    cdef uint64_t acc = cut.l4_base + swap16(l4_len)
    cdef uint32_t seq
    cdef uint16_t csum, total, id_
    cdef uint8_t flags = cut.flags
    memcpy(out, cut.hdr, SEG_HDR_ROOM // 2)
    if cut.hdr_len > SEG_HDR_ROOM // 2:
        memcpy(out + SEG_HDR_ROOM // 2, cut.hdr + SEG_HDR_ROOM // 2, SEG_HDR_ROOM // 2)
    if cut.version == 4:
        total = swap16(cut.hdr_len + len_)
        id_ = swap16(cut.ip_id + i)
        store_u16(out + IP4_LEN, total)
        store_u16(out + IP4_ID, id_)
        store_u16(out + IP4_CSUM, csum_not(cut.ip_base + total + id_))
    else:
        store_be16(out + IP6_PAYLOAD, cut.hdr_len - IP6_LEN + len_)
    if cut.tcp:
        if i != 0:
            flags &= ~TCP_F_CWR
        if i + 1 != cut.n:
            flags &= ~(TCP_F_FIN | TCP_F_PSH)
        l4[TCP_FLAGS] = flags
        seq = cut.seq + i * cut.gso_size
        store_be32(l4 + TCP_SEQ, seq)
        acc += <uint32_t>swap16(flags) + swap16(seq >> 16) + swap16(seq)
        store_u16(l4 + TCP_CSUM, csum_not(csum_add(payload, len_, acc)))
    else:
        store_be16(l4 + UDP_LENGTH, l4_len)
        acc += swap16(l4_len)
        csum = csum_not(csum_add(payload, len_, acc))
        store_u16(l4 + UDP_CSUM, csum if csum != 0 else 0xFFFF)


cdef inline uint32_t cut_segment(
    const cut_t* cut, const uint8_t* p, uint32_t i, uint8_t* out
) noexcept nogil:
    """Write segment i, headers and payload. Return its length.

    p    the super-packet; does not overlap out
    out  room for SEG_HDR_ROOM bytes and a payload of gso_size
    """
    cdef const uint8_t* payload = p + cut.hdr_len + i * cut.gso_size
    cdef uint32_t len_ = cut_payload_len(cut, i)
    cut_header(cut, payload, i, out)
    memcpy(out + cut.hdr_len, payload, len_)
    return cut.hdr_len + len_
