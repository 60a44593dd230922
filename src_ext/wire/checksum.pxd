"""The Internet checksum (RFC 1071) and its incremental update (RFC 1624).

Sums words in native byte order. By RFC 1071 section 2(B), the result is correct if it is also
stored in native byte order. ``csum_add`` returns an unfolded 64-bit sum, which can be the start
value of another call. So constant parts of headers, and payloads, are read only once.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from wire.headers cimport IP4_CSUM, store_u16, swap16


cdef extern from "wire/checksum.h" nogil:
    ctypedef uint64_t (*udptun_csum_fn)(const uint8_t* p, size_t n, uint64_t acc) noexcept nogil
    uint64_t udptun_csum_add(const uint8_t* p, size_t n, uint64_t acc) noexcept
    uint64_t udptun_csum_short(const uint8_t* p, size_t n, uint64_t acc) noexcept
    # The implementations that this CPU supports. csum_add uses the last one for 64 bytes or more.
    const char** udptun_csum_names
    udptun_csum_fn* udptun_csum_fns
    int udptun_csum_n


cdef inline uint64_t csum_add(const uint8_t* p, size_t n, uint64_t acc) noexcept nogil:
    """Return acc plus the sum of the words of p[0:n]. In the data that the whole sum covers, p must
    be at an even offset."""
    return udptun_csum_add(p, n, acc)


cdef inline uint16_t csum_fold(uint64_t acc) noexcept nogil:
    """Return the sum folded to 16 bits, in native order, not inverted."""
    acc = (acc & 0xFFFFFFFFu) + (acc >> 32)
    acc = (acc & 0xFFFFFFFFu) + (acc >> 32)
    acc = (acc & 0xFFFF) + (acc >> 16)
    return <uint16_t>((acc & 0xFFFF) + (acc >> 16))


cdef inline uint16_t csum_not(uint64_t acc) noexcept nogil:
    """Return the folded and inverted sum: the value of a checksum field."""
    return <uint16_t>(~csum_fold(acc))


cdef inline uint64_t csum_pseudo(
    const uint8_t* src, size_t addr_len, uint32_t proto, uint32_t l4_len
) noexcept nogil:
    """Return the sum of the pseudo-header (RFC 9293 3.1, RFC 8200 8.1).

    src       the source address; the destination follows it in both IP versions
    addr_len  4 or 16
    """
    cdef uint64_t acc = csum_add(src, 2 * addr_len, 0)
    return acc + swap16(proto) + swap16(l4_len)


cdef inline void ip4_set_csum(uint8_t* ip, size_t hdr_len) noexcept nogil:
    store_u16(ip + IP4_CSUM, 0)
    store_u16(ip + IP4_CSUM, csum_not(csum_add(ip, hdr_len, 0)))
