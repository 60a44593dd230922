"""The Internet checksum (RFC 1071) and its incremental update (RFC 1624).

Sums are of words as they lie in memory (native order): RFC 1071 section 2(B) says the result has
the right bytes when it is stored the same way. ``csum_add`` keeps an unfolded 64-bit sum, so that
constant parts of headers are summed once and payloads once per segment.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from wire.headers cimport IP4_CSUM, store_u16, swap16


cdef extern from "wire/checksum.h" nogil:
    ctypedef uint64_t (*udptun_csum_fn)(const uint8_t* p, size_t n, uint64_t acc) noexcept nogil
    uint64_t udptun_csum_add(const uint8_t* p, size_t n, uint64_t acc) noexcept
    uint64_t udptun_csum_short(const uint8_t* p, size_t n, uint64_t acc) noexcept
    # what this CPU has, for the tests: udptun_csum_add calls the last one from 64 bytes on
    const char** udptun_csum_names
    udptun_csum_fn* udptun_csum_fns
    int udptun_csum_n


cdef inline uint64_t csum_add(const uint8_t* p, size_t n, uint64_t acc) noexcept nogil:
    """acc + the words of p[0:n]; p starts at an even offset of what is summed."""
    return udptun_csum_add(p, n, acc)


cdef inline uint16_t csum_fold(uint64_t acc) noexcept nogil:
    """Fold to 16 bits, not inverted, native order."""
    acc = (acc & 0xFFFFFFFFu) + (acc >> 32)
    acc = (acc & 0xFFFFFFFFu) + (acc >> 32)
    acc = (acc & 0xFFFF) + (acc >> 16)
    return <uint16_t>((acc & 0xFFFF) + (acc >> 16))


cdef inline uint16_t csum_not(uint64_t acc) noexcept nogil:
    """The folded complement: what goes into a checksum field."""
    return <uint16_t>(~csum_fold(acc))


cdef inline uint64_t csum_pseudo(
    const uint8_t* src, size_t addr_len, uint32_t proto, uint32_t l4_len
) noexcept nogil:
    """The pseudo-header of RFC 9293 3.1 and RFC 8200 8.1: source and destination lie adjacent in
    both IP versions, so one pointer to the source is enough. addr_len is 4 or 16."""
    cdef uint64_t acc = csum_add(src, 2 * addr_len, 0)
    return acc + swap16(proto) + swap16(l4_len)


cdef inline void ip4_set_csum(uint8_t* ip, size_t hdr_len) noexcept nogil:
    store_u16(ip + IP4_CSUM, 0)
    store_u16(ip + IP4_CSUM, csum_not(csum_add(ip, hdr_len, 0)))
