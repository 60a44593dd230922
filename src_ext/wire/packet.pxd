"""The IP header: validate it, and decrement the hop limit.

Owns no state. ``parse_ip`` validates an IP header, ``skip_extensions`` a chain of IPv6 extension
headers. Every later step relies on the bounds that they check.
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
    EXT_MAX_N = 8               # maximum headers in a chain; a longer chain is not parsed
    EXT_SEGMENTS_LEFT = 3       # offset in a routing header


cdef struct ip_t:
    uint8_t version     # 4 or 6
    uint8_t proto       # the transport protocol, or IPv6's first extension header
    uint8_t addr_len    # 4 or 16
    bint fragment       # IPv4: any fragment, including the first
    bint dont_fragment  # IPv4: DF; IPv6: always true
    uint32_t hdr_len    # length of the IP header, including IPv4 options
    uint32_t total_len  # length of the packet that the header declares


cdef inline drop_t parse_ip(const uint8_t* p, size_t n, ip_t* ip) noexcept nogil:
    """Read the IP header of p[0:n].

    drops  SHORT_PACKET, BAD_VERSION, BAD_HEADER_LEN (IPv4: under 20 or over n)

    The declared length is not checked here, because a super-packet may declare a wrong length. See
    ``check_total_len``.
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
    """Check that the declared length covers the header and is at most n.

    drops  BAD_TOTAL_LEN
    """
    if ip.total_len < ip.hdr_len or ip.total_len > n:
        return DROP_BAD_TOTAL_LEN
    return PASS


cdef inline const uint8_t* ip_src(const uint8_t* p, const ip_t* ip) noexcept nogil:
    """Return the source address; the destination follows it in both versions."""
    return p + (IP4_SRC if ip.version == 4 else IP6_SRC)


cdef inline bint is_extension(uint8_t next_header) noexcept nogil:
    """Return whether this IPv6 header precedes or hides the transport header: hop-by-hop options,
    routing, fragment, ESP, AH, destination options."""
    return (
        next_header == EXT_HOP_BY_HOP or next_header == EXT_ROUTING
        or next_header == EXT_FRAGMENT or next_header == EXT_ESP
        or next_header == EXT_AUTHENTICATION or next_header == EXT_DESTINATION
    )


cdef inline drop_t skip_extensions(
    const uint8_t* p, size_t n, uint8_t* next_header, uint32_t* off
) noexcept nogil:
    """Find the transport header of an IPv6 packet p[0:n], n >= 40.

    next_header  output: the transport protocol
    off          output: the offset of the transport header, at most n
    drops  BAD_L4_HEADER: the chain exceeds the packet or EXT_MAX_N headers; it has a fragment, ESP
           or authentication header; it has a routing header with segments left (the transport
           checksum then covers the last address of the route: RFC 8200 8.1)
    """
    cdef uint8_t kind = p[IP6_NEXT]
    cdef size_t end = IP6_LEN
    cdef int left = EXT_MAX_N
    while is_extension(kind):
        if kind == EXT_FRAGMENT or kind == EXT_ESP or kind == EXT_AUTHENTICATION:
            return DROP_BAD_L4_HEADER
        if left == 0 or n - end < 8:
            return DROP_BAD_L4_HEADER
        if kind == EXT_ROUTING and p[end + EXT_SEGMENTS_LEFT] != 0:
            return DROP_BAD_L4_HEADER
        left -= 1
        kind = p[end]
        end += 8 + 8 * <size_t>p[end + 1]
        if end > n:
            return DROP_BAD_L4_HEADER
    next_header[0] = kind
    off[0] = <uint32_t>end
    return PASS


cdef inline bint hop_limit_spent(const uint8_t* p, uint8_t version) noexcept nogil:
    """Return whether the hop limit is 0 or 1, so that the packet must not be forwarded."""
    return p[IP4_TTL if version == 4 else IP6_HOPS] <= 1


cdef inline drop_t decrement_hop_limit(uint8_t* p, uint8_t version) noexcept nogil:
    """Decrement the hop limit and update the IPv4 header checksum. The update is incremental, so a
    wrong checksum stays wrong.

    drops  TTL_EXCEEDED if the hop limit is 0 or 1; the packet is then unchanged
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
