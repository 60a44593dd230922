"""The longest prefix match alone, for tests and micro benchmarks. Included by _steps.pyx."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from table.lpm cimport lpm_build, lpm_bytes, lpm_free, lpm_lookup4, lpm_lookup6, lpm_t
from table.parser cimport parse_routes, parser_t
from table.route cimport routes_free
from table.text cimport parse_text


cdef class Lpm:
    """Longest prefix match over the routes of a route file.

    A value is 1 + index into the routes in table order; 0 means no route.
    """

    cdef lpm_t* lpm
    cdef parser_t parsed

    def __cinit__(self, bytes text not None):
        memset(&self.parsed, 0, sizeof(self.parsed))
        self.parsed.text = text
        self.parsed.n = len(text)
        parse_routes(&self.parsed, parse_text)
        if self.parsed.error:
            raise ValueError("not a route file")
        self.build()

    def __dealloc__(self):
        lpm_free(self.lpm)
        routes_free(&self.parsed.routes)

    def build(self):
        """Build the look-up structure again, for timing. The constructor has built it once."""
        cdef lpm_t* old = self.lpm
        with nogil:
            self.lpm = lpm_build(self.parsed.routes.items, self.parsed.routes.n)
            lpm_free(old)
        if self.lpm == NULL:
            raise MemoryError("no memory for the look-up")

    def sizeof(self):
        """Return the bytes of memory that the look-up structure uses."""
        return lpm_bytes(self.lpm)

    def slow_popcount(self):
        """Stop using the POPCNT instruction, as on a CPU without it."""
        self.lpm.v4.fast_popcount = self.lpm.v6.fast_popcount = 0

    def lookup(self, bytes addr not None):
        """Return the value for ``addr``, 4 or 16 bytes in network order."""
        cdef const uint8_t* at = addr
        if len(addr) == 4:
            return lpm_lookup4(self.lpm, addr4(at))
        if len(addr) == 16:
            return lpm_lookup6(self.lpm, at)
        raise ValueError("4 or 16 bytes")

    def bench(self, bytes addrs not None, int family, int rounds):
        """Look up every address in ``addrs``, ``rounds`` times; return the sum of the values."""
        cdef const uint8_t* at = addrs
        cdef size_t i, n = len(addrs) // (4 if family == 4 else 16)
        cdef uint64_t total = 0
        cdef int k
        with nogil:
            for k in range(rounds):
                if family == 4:
                    for i in range(n):
                        total += lpm_lookup4(self.lpm, addr4(at + 4 * i))
                else:
                    for i in range(n):
                        total += lpm_lookup6(self.lpm, at + 16 * i)
        return total


cdef inline uint32_t addr4(const uint8_t* at) noexcept nogil:
    return <uint32_t>at[0] << 24 | <uint32_t>at[1] << 16 | <uint32_t>at[2] << 8 | at[3]
