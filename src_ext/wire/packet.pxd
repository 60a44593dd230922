"""The IP header: parse what may be hostile, and decrement the hop limit.

Owns nothing. ``parse_ip`` is the only place where the bytes of an IP header are believed for the
first time, and ``skip_extensions`` for IPv6 extension headers; every later step relies on their
bounds.
Source: RFC 791 3.1, RFC 8200 3, 4, RFC 1624 eqn 3 (incremental checksum).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from drops cimport (
    DROP_BAD_HEADER_LEN, DROP_BAD_L4_HEADER, DROP_BAD_TOTAL_LEN, DROP_BAD_VERSION,
    DROP_SHORT_PACKET, DROP_TTL_EXCEEDED, PASS, drop_t,
)
from wire.headers cimport (
    IP4_CSUM, IP4_DF, IP4_FRAG, IP4_LEN, IP4_MF, IP4_MIN, IP4_OFFSET, IP4_PROTO, IP4_SRC,
    IP4_TTL, IP6_HOPS, IP6_LEN, IP6_NEXT, IP6_PAYLOAD, IP6_SRC, load_be16, load_u16, store_u16,
)


cdef enum:
    # IPv6 extension headers: RFC 8200 4
    EXT_HOP_BY_HOP = 0
    EXT_ROUTING = 43
    EXT_FRAGMENT = 44
    EXT_ESP = 50
    EXT_AUTHENTICATION = 51
    EXT_DESTINATION = 60
    EXT_MAX_N = 8               # more of them in one packet are taken for an attack
    EXT_SEGMENTS_LEFT = 3       # offset in a routing header


cdef struct ip_t:
    uint8_t version     # 4 or 6
    uint8_t proto       # the transport, or IPv6's first extension header
    uint8_t addr_len    # 4 or 16
    bint fragment       # IPv4: any fragment, the first too
    bint dont_fragment  # IPv4 DF; IPv6 always
    uint32_t hdr_len    # bytes of IP header, IPv4 options included
    uint32_t total_len  # what the header declares, header included


cdef inline drop_t parse_ip(const uint8_t* p, size_t n, ip_t* ip) noexcept nogil:
    """Read the IP header of p[0:n].

    returns  PASS, or why this is no IP packet: SHORT_PACKET, BAD_VERSION, BAD_HEADER_LEN
             (IPv4 under 20 or beyond n). The declared length is reported, not judged: a
             super-packet's is not to be trusted, see ``check_total_len``.
    """
    cdef uint32_t frag
    if n < 1:
        return DROP_SHORT_PACKET
    ip.version = p[0] >> 4
    if ip.version == 4:
        if n < IP4_MIN:
            return DROP_SHORT_PACKET
        ip.hdr_len = (p[0] & 15) * 4
        if ip.hdr_len < IP4_MIN or ip.hdr_len > n:
            return DROP_BAD_HEADER_LEN
        frag = load_be16(p + IP4_FRAG)
        ip.proto = p[IP4_PROTO]
        ip.addr_len = 4
        ip.fragment = (frag & (IP4_MF | IP4_OFFSET)) != 0
        ip.dont_fragment = (frag & IP4_DF) != 0
        ip.total_len = load_be16(p + IP4_LEN)
        return PASS
    if ip.version == 6:
        if n < IP6_LEN:
            return DROP_SHORT_PACKET
        ip.hdr_len = IP6_LEN
        ip.proto = p[IP6_NEXT]
        ip.addr_len = 16
        ip.fragment = False
        ip.dont_fragment = True
        ip.total_len = IP6_LEN + <uint32_t>load_be16(p + IP6_PAYLOAD)
        return PASS
    return DROP_BAD_VERSION


cdef inline drop_t check_total_len(const ip_t* ip, size_t n) noexcept nogil:
    """The declared length must cover the header and lie within the n bytes that came."""
    if ip.total_len < ip.hdr_len or ip.total_len > n:
        return DROP_BAD_TOTAL_LEN
    return PASS


cdef inline const uint8_t* ip_src(const uint8_t* p, const ip_t* ip) noexcept nogil:
    """The source address; the destination lies addr_len bytes behind it in both versions."""
    return p + (IP4_SRC if ip.version == 4 else IP6_SRC)


cdef inline bint is_extension(uint8_t next_header) noexcept nogil:
    """IPv6 headers that stand before, or hide, the transport: hop-by-hop, routing, fragment, ESP,
    AH, destination options."""
    return (
        next_header == EXT_HOP_BY_HOP or next_header == EXT_ROUTING
        or next_header == EXT_FRAGMENT or next_header == EXT_ESP
        or next_header == EXT_AUTHENTICATION or next_header == EXT_DESTINATION
    )


cdef inline drop_t skip_extensions(
    const uint8_t* p, size_t n, uint8_t* next_header, uint32_t* off
) noexcept nogil:
    """Find what an IPv6 packet p[0:n], n >= 40, carries behind its extension headers.

    next_header, off  out: the protocol and where it begins, at most n
    drops  BAD_L4_HEADER: the chain leaves the packet or is too long; a fragment, ESP or
           authentication header; a routing header with segments left, for the transport's
           checksum is over the route's last address then (RFC 8200 8.1)
    """
    cdef uint8_t kind = p[IP6_NEXT]
    cdef size_t at = IP6_LEN
    cdef int left = EXT_MAX_N
    while is_extension(kind):
        if kind == EXT_FRAGMENT or kind == EXT_ESP or kind == EXT_AUTHENTICATION:
            return DROP_BAD_L4_HEADER
        if left == 0 or n - at < 8:
            return DROP_BAD_L4_HEADER
        if kind == EXT_ROUTING and p[at + EXT_SEGMENTS_LEFT] != 0:
            return DROP_BAD_L4_HEADER
        left -= 1
        kind = p[at]
        at += 8 + 8 * <size_t>p[at + 1]
        if at > n:
            return DROP_BAD_L4_HEADER
    next_header[0] = kind
    off[0] = <uint32_t>at
    return PASS


cdef inline bint hop_limit_spent(const uint8_t* p, uint8_t version) noexcept nogil:
    """Whether the packet came with a hop limit of 0 or 1 and may go no further."""
    return p[IP4_TTL if version == 4 else IP6_HOPS] <= 1


cdef inline drop_t decrement_hop_limit(uint8_t* p, uint8_t version) noexcept nogil:
    """One hop less, with the IPv4 checksum kept as right, or as wrong, as it came.

    drops  TTL_EXCEEDED when it arrives as 0 or 1; the packet is then unchanged
    """
    cdef uint8_t* field = p + (IP4_TTL if version == 4 else IP6_HOPS)
    cdef uint32_t acc
    if hop_limit_spent(p, version):
        return DROP_TTL_EXCEEDED
    if version == 4:
        # HC' = ~(~HC + ~m + m'), where m is the word of TTL and protocol (RFC 1624 eqn 3)
        acc = <uint16_t>~load_u16(p + IP4_CSUM)
        acc += <uint16_t>~load_u16(field)
        field[0] -= 1
        acc += load_u16(field)
        acc = (acc & 0xFFFF) + (acc >> 16)
        acc = (acc & 0xFFFF) + (acc >> 16)
        store_u16(p + IP4_CSUM, <uint16_t>~acc)
    else:
        field[0] -= 1
    return PASS
