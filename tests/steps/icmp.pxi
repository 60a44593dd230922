# ICMP errors, fragments and checksums. Included by _steps.pyx; uses its check() and exact_copy().

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy

from wire.checksum cimport (
    csum_add, csum_fold, udptun_csum_fn, udptun_csum_fns, udptun_csum_n, udptun_csum_names,
    udptun_csum_short,
)
from drops cimport PASS, drop_t
from wire.fragment cimport FRAG_HDR_MAX, frag_t, fragment_at, fragment_n
from wire.icmp cimport (
    ICMP_MAX, ICMP_NO_ROUTE, ICMP_TOO_BIG, ICMP_TTL_EXCEEDED, icmp_allow, icmp_bucket_t,
)
from wire.icmp cimport icmp_error as c_icmp_error
from posix.stdlib cimport posix_memalign
from wire.packet cimport check_total_len, ip_t, parse_ip
from wire.headers cimport swap16

_ICMP_KINDS = {
    "no_route": ICMP_NO_ROUTE, "ttl_exceeded": ICMP_TTL_EXCEEDED, "too_big": ICMP_TOO_BIG,
}


def icmp_error(bytes packet, str kind, bytes source, uint32_t mtu=0):
    """Return the ICMP error about ``packet`` from our address ``source``, or None."""
    cdef uint8_t out[ICMP_MAX]
    cdef int c_kind = _ICMP_KINDS[kind]
    cdef uint8_t* p = NULL
    cdef uint8_t* address = NULL
    cdef size_t n
    if not packet or len(source) != {4: 4, 6: 16}.get(packet[0] >> 4):
        return None
    try:
        p = exact_copy(packet)
        address = exact_copy(source)
        n = c_icmp_error(p, len(packet), c_kind, address, mtu, out)
        return PyBytes_FromStringAndSize(<char*>out, n) if n else None
    finally:
        free(address)
        free(p)


def icmp_allow_run(times_ns):
    """Return, for each of these times in order, whether a new token bucket allows an error."""
    cdef icmp_bucket_t bucket = icmp_bucket_t(0, 0)
    return [bool(icmp_allow(&bucket, now_ns)) for now_ns in times_ns]


def fragment(bytes packet, size_t mtu, size_t lead_len=0):
    """Cut an IPv4 packet into fragments of at most ``mtu`` bytes.

    lead_len  this number of bytes after the IP header is passed together with the header. The core
              does the same with the transport header of a segment

    Raise Dropped("too_big") if DF is set, for IPv6, and if the MTU is too small.
    """
    cdef ip_t ip = NO_IP
    cdef frag_t frag
    cdef uint8_t out_hdr[FRAG_HDR_MAX]
    cdef uint8_t* p = exact_copy(packet)
    cdef size_t data_len
    cdef int n
    try:
        check(parse_ip(p, len(packet), &ip))
        check(check_total_len(&ip, len(packet)))
        if ip.total_len <= mtu:
            return [packet[:ip.total_len]]
        if lead_len > 60 or ip.hdr_len + lead_len > ip.total_len:
            raise ValueError("lead_len is over 60 or over the payload")
        data_len = ip.total_len - ip.hdr_len - lead_len
        n = 0 if ip.dont_fragment else fragment_n(ip.hdr_len, lead_len, data_len, mtu)
        if n == 0:
            raise Dropped("too_big")
        out = []
        for i in range(n):
            fragment_at(
                p, ip.hdr_len, lead_len, p + ip.hdr_len + lead_len, data_len, mtu, i, out_hdr,
                &frag)
            out.append((<char*>out_hdr)[:frag.hdr_len] + (<char*>frag.data)[:frag.data_len])
        return out
    finally:
        free(p)


cdef uint64_t _csum_add(const uint8_t* p, size_t n, uint64_t acc) noexcept nogil:
    return csum_add(p, n, acc)


cdef uint64_t _csum_short(const uint8_t* p, size_t n, uint64_t acc) noexcept nogil:
    return udptun_csum_short(p, n, acc)


cdef uint64_t _initial_sum(initial) except? 0:
    """Convert a sum of big-endian words to the sum of the words in native byte order."""
    while initial > 0xFFFF:
        initial = (initial & 0xFFFF) + (initial >> 16)
    return swap16(initial)


cdef extern from *:
    """
    #ifdef UDPTUN_SANITIZE
    #define UDPTUN_SANITIZED 1
    #else
    #define UDPTUN_SANITIZED 0
    #endif
    """
    const bint UDPTUN_SANITIZED


cdef uint16_t _checksum_by(udptun_csum_fn fn, const uint8_t[::1] data, initial) except? 0:
    """Sum ``data`` with one implementation.

    A sanitizer build sums an exact copy of the data, with the same address modulo 64. Other builds
    sum the data in place, because the benchmarks time this function.
    """
    cdef uint64_t acc = _initial_sum(initial)
    cdef size_t n = data.shape[0]
    cdef const uint8_t* source = &data[0] if n else NULL
    cdef size_t lead = <size_t>source & 63
    cdef void* block = NULL
    if not UDPTUN_SANITIZED:
        return swap16(csum_fold(fn(source, n, acc)))
    if posix_memalign(&block, 64, lead + n or 1) != 0:
        raise MemoryError
    if n:
        memcpy(<uint8_t*>block + lead, source, n)
    acc = fn(<uint8_t*>block + lead, n, acc)
    free(block)
    return swap16(csum_fold(acc))


def checksum(const uint8_t[::1] data, initial=0):
    """Return the ones-complement sum of the big-endian words of data, folded, not inverted.

    See RFC 1071.
    """
    return _checksum_by(_csum_add, data, initial)


cdef class _Checksum:
    """One implementation of the checksum. A call uses this implementation, whatever the CPU."""

    cdef udptun_csum_fn fn

    def __call__(self, const uint8_t[::1] data, initial=0):
        return _checksum_by(self.fn, data, initial)


def checksum_implementations():
    """Return {name: function} of all implementations that this CPU supports, the slowest first."""
    cdef _Checksum one = _Checksum.__new__(_Checksum)
    one.fn = _csum_short
    found = {"short": one}
    for i in range(udptun_csum_n):
        one = _Checksum.__new__(_Checksum)
        one.fn = udptun_csum_fns[i]
        found[udptun_csum_names[i].decode()] = one
    return found
