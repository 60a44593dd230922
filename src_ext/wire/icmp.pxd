"""ICMP errors: build an error about a packet, and limit the rate of errors.

Owns the format of the errors, the rules that forbid an error, and the token bucket. Does not choose
the source address, and does not send. The only state is the caller's bucket, which belongs to one
thread.
Source: RFC 792, RFC 1122 3.2.2, RFC 1812 4.3.2, RFC 1191 4 (IPv4); RFC 4443 2.4, 3 (IPv6).
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from limits cimport MIN_MTU, MIN_MTU6
from wire.checksum cimport csum_add, csum_not, csum_pseudo, ip4_set_csum
from wire.headers cimport (
    IP4_DST, IP4_FRAG, IP4_LEN, IP4_MIN, IP4_OFFSET, IP4_PROTO, IP4_SRC, IP4_TOS, IP4_TTL,
    IP6_DST, IP6_HOPS, IP6_LEN, IP6_NEXT, IP6_PAYLOAD, IP6_SRC, PROTO_ICMP, PROTO_ICMP6,
    load_be16, load_be32, load_u64, store_be16, store_be32, store_u16,
)
from wire.packet cimport (
    EXT_DESTINATION, EXT_FRAGMENT, EXT_HOP_BY_HOP, EXT_MAX_N, EXT_ROUTING,
)


cdef enum:
    ICMP_NO_ROUTE = 0
    ICMP_TTL_EXCEEDED = 1
    ICMP_TOO_BIG = 2
    ICMP_KINDS_N = 3

    ICMP_MAX = 1280  # the longest error: RFC 4443 2.4 (c)
    ICMP4_MAX = 576  # RFC 1812 4.3.2.3
    ICMP_HDR = 8
    ICMP_CSUM = 2
    ICMP_MTU4 = 6  # RFC 1191 4: the low half of the second word
    ICMP_MTU6 = 4
    ICMP_HOPS = 64
    ICMP4_TOS = 0xC0  # internetwork control: RFC 1812 4.3.2.5

    ICMP6_FIRST_INFO = 128  # types below are errors: RFC 4443 2.1
    ICMP6_REDIRECT = 137

    # Linux: net.ipv4.icmp_msgs_per_sec 1000, icmp_msgs_burst 50
    ICMP_TOKEN_NS = 1000000
    ICMP_BURST_NS = 50000000


cdef struct icmp_bucket_t:  # one per kind and family; a bucket of zeros is full at its first use
    uint64_t tokens_ns
    uint64_t last_ns


cdef inline bint icmp_allow(icmp_bucket_t* bucket, uint64_t now_ns) noexcept nogil:
    """Return whether one more error may be sent at now_ns (monotonic), and count it."""
    cdef uint64_t passed
    if bucket.last_ns == 0:
        bucket.tokens_ns = ICMP_BURST_NS
    elif now_ns > bucket.last_ns:
        passed = now_ns - bucket.last_ns
        if passed > ICMP_BURST_NS - bucket.tokens_ns:
            bucket.tokens_ns = ICMP_BURST_NS
        else:
            bucket.tokens_ns += passed
    # Store now_ns also if it is smaller than last_ns. Otherwise no token would be added until the
    # clock reaches last_ns.
    bucket.last_ns = now_ns if now_ns != 0 else 1
    if bucket.tokens_ns < ICMP_TOKEN_NS:
        return False
    bucket.tokens_ns -= ICMP_TOKEN_NS
    return True


cdef inline bint icmp4_allowed(const uint8_t* pkt, size_t hdr_len, size_t n) noexcept nogil:
    """Return whether RFC 1122 3.2.2 allows an error about pkt[0:n]. The IP header is complete."""
    cdef uint8_t kind
    cdef uint8_t src = pkt[IP4_SRC]
    if load_be16(pkt + IP4_FRAG) & IP4_OFFSET:
        return False
    if src == 0 or src == 127 or src >= 224:  # "this" network, loopback, multicast, reserved
        return False
    if pkt[IP4_DST] & 0xF0 == 0xE0 or load_be32(pkt + IP4_DST) == 0xFFFFFFFFu:
        return False
    if pkt[IP4_PROTO] == PROTO_ICMP:
        if n <= hdr_len:
            return False  # the ICMP type is missing: the packet may be an ICMP error
        kind = pkt[hdr_len]
        return not (kind == 3 or kind == 4 or kind == 5 or kind == 11 or kind == 12)
    return True


cdef inline bint icmp6_allowed(const uint8_t* pkt, size_t n, int kind) noexcept nogil:
    """Return whether RFC 4443 2.4 (e) allows an error of this kind about pkt[0:n], n >= 40."""
    cdef uint8_t next_hdr = pkt[IP6_NEXT]
    cdef size_t off = IP6_LEN
    cdef size_t ext_len
    cdef int left = EXT_MAX_N
    if pkt[IP6_SRC] == 0xFF or (pkt[IP6_DST] == 0xFF and kind != ICMP_TOO_BIG):
        return False
    if load_u64(pkt + IP6_SRC) == 0 and load_be32(pkt + IP6_SRC + 8) == 0:
        if load_be32(pkt + IP6_SRC + 12) <= 1:  # unspecified, loopback
            return False
    while (next_hdr == EXT_HOP_BY_HOP or next_hdr == EXT_ROUTING or next_hdr == EXT_FRAGMENT
           or next_hdr == EXT_DESTINATION):
        if left == 0 or n - off < 8:
            return False
        left -= 1
        ext_len = 8
        if next_hdr == EXT_FRAGMENT:
            if load_be16(pkt + off + 2) & 0xFFF8:
                return False
        else:
            ext_len += 8 * <size_t>pkt[off + 1]
        if n - off < ext_len:
            return False
        next_hdr = pkt[off]
        off += ext_len
    if next_hdr == PROTO_ICMP6:
        return off < n and pkt[off] >= ICMP6_FIRST_INFO and pkt[off] != ICMP6_REDIRECT
    return True


cdef inline size_t icmp4_error(
    const uint8_t* pkt, size_t n, int kind, const uint8_t* source, uint32_t mtu, uint8_t* out
) noexcept nogil:
    """Do the work of ``icmp_error`` for IPv4; n >= 1."""
    cdef uint8_t* icmp = out + IP4_MIN
    cdef size_t hdr_len = <size_t>(pkt[0] & 0x0F) * 4
    cdef size_t total
    if hdr_len < IP4_MIN or n < hdr_len:
        return 0
    total = load_be16(pkt + IP4_LEN)
    if total < hdr_len:
        return 0
    if n > total:
        n = total
    if not icmp4_allowed(pkt, hdr_len, n):
        return 0
    if n > ICMP4_MAX - IP4_MIN - ICMP_HDR:
        n = ICMP4_MAX - IP4_MIN - ICMP_HDR

    memset(out, 0, IP4_MIN + ICMP_HDR)
    out[0] = 0x45
    out[IP4_TOS] = ICMP4_TOS
    store_be16(out + IP4_LEN, <uint32_t>(IP4_MIN + ICMP_HDR + n))
    out[IP4_TTL] = ICMP_HOPS
    out[IP4_PROTO] = PROTO_ICMP
    memcpy(out + IP4_SRC, source, 4)
    memcpy(out + IP4_DST, pkt + IP4_SRC, 4)
    ip4_set_csum(out, IP4_MIN)

    if kind == ICMP_TTL_EXCEEDED:
        icmp[0] = 11
    else:
        icmp[0] = 3
    if kind == ICMP_TOO_BIG:
        icmp[1] = 4
        if mtu < MIN_MTU:
            mtu = MIN_MTU
        elif mtu > 0xFFFF:
            mtu = 0xFFFF
        store_be16(icmp + ICMP_MTU4, mtu)
    memcpy(icmp + ICMP_HDR, pkt, n)
    store_u16(icmp + ICMP_CSUM, csum_not(csum_add(icmp, ICMP_HDR + n, 0)))
    return IP4_MIN + ICMP_HDR + n


cdef inline size_t icmp6_error(
    const uint8_t* pkt, size_t n, int kind, const uint8_t* source, uint32_t mtu, uint8_t* out
) noexcept nogil:
    """Do the work of ``icmp_error`` for IPv6; n >= 1."""
    cdef uint8_t* icmp = out + IP6_LEN
    cdef size_t total
    cdef uint64_t acc
    if n < IP6_LEN:
        return 0
    total = IP6_LEN + <size_t>load_be16(pkt + IP6_PAYLOAD)
    if n > total:
        n = total
    if not icmp6_allowed(pkt, n, kind):
        return 0
    if n > ICMP_MAX - IP6_LEN - ICMP_HDR:
        n = ICMP_MAX - IP6_LEN - ICMP_HDR

    memset(out, 0, IP6_LEN + ICMP_HDR)
    out[0] = 0x60
    store_be16(out + IP6_PAYLOAD, <uint32_t>(ICMP_HDR + n))
    out[IP6_NEXT] = PROTO_ICMP6
    out[IP6_HOPS] = ICMP_HOPS
    memcpy(out + IP6_SRC, source, 16)
    memcpy(out + IP6_DST, pkt + IP6_SRC, 16)

    if kind == ICMP_TTL_EXCEEDED:
        icmp[0] = 3
    elif kind == ICMP_TOO_BIG:
        icmp[0] = 2
        store_be32(icmp + ICMP_MTU6, mtu if mtu > MIN_MTU6 else MIN_MTU6)
    else:
        icmp[0] = 1
    memcpy(icmp + ICMP_HDR, pkt, n)
    acc = csum_pseudo(out + IP6_SRC, 16, PROTO_ICMP6, <uint32_t>(ICMP_HDR + n))
    store_u16(icmp + ICMP_CSUM, csum_not(csum_add(icmp, ICMP_HDR + n, acc)))
    return IP6_LEN + ICMP_HDR + n


cdef inline size_t icmp_error(
    const uint8_t* pkt, size_t n, int kind, const uint8_t* source, uint32_t mtu, uint8_t* out
) noexcept nogil:
    """Write an ICMP error about the packet pkt[0:n], with its IP header, to the packet's source.

    pkt      untrusted; n may be less than the declared length
    kind     ICMP_NO_ROUTE, ICMP_TTL_EXCEEDED, ICMP_TOO_BIG
    source   the source address of the error: the packet's family, 4 or 16 bytes, network order
    mtu      for ICMP_TOO_BIG; raised to 68 (IPv4) or 1280 (IPv6)
    out      ICMP_MAX bytes or more; does not overlap pkt
    returns  bytes written; 0 if the RFCs forbid an error or the packet does not parse
    """
    if n == 0 or kind < 0 or kind >= ICMP_KINDS_N:
        return 0
    if pkt[0] >> 4 == 4:
        return icmp4_error(pkt, n, kind, source, mtu, out)
    if pkt[0] >> 4 == 6:
        return icmp6_error(pkt, n, kind, source, mtu, out)
    return 0
