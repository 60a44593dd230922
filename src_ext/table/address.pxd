"""Parse and write the text forms of words, addresses, prefixes and numbers.

Accepts and writes exactly the same text as Python's ``ipaddress`` (RFC 4291, RFC 5952). The tests
compare this module with ``ipaddress``. Does not depend on route files or JSON.

Every ``parse_*`` function takes untrusted bytes and returns whether the bytes are valid. The text
is borrowed during the call. All functions are pure, and any thread may call them.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memchr, memcmp, memcpy, memmove, memset

from limits cimport MAX_PORT
from table.route cimport route_t


cdef extern from * nogil:
    """
    /* Python 3.13 and later write ::ffff:192.0.2.1; earlier versions write ::ffff:c000:201. */
    #define UDPTUN_MAPPED_DOTTED (PY_VERSION_HEX >= 0x030D0000)
    """
    bint UDPTUN_MAPPED_DOTTED


cdef enum:
    PREFIX_DIGITS_MAX = 4300    # maximum digits of a prefix length, as in Python's int()


# Parse

cdef inline bint same_word(
    const uint8_t* text, size_t n, const char* word, size_t m
) noexcept nogil:
    """Return whether text[0:n] equals word[0:m]."""
    return n == m and memcmp(text, word, m) == 0


cdef inline bint is_digit(uint8_t c) noexcept nogil:
    return c >= c'0' and c <= c'9'


cdef inline int hex_digit(uint8_t c) noexcept nogil:
    """Return the digit's value, 0..15, or -1 if it is not a hexadecimal digit."""
    if is_digit(c):
        return c - c'0'
    c |= 0x20
    return c - c'a' + 10 if c >= c'a' and c <= c'f' else -1


cdef inline bint parse_addr4(const uint8_t* text, size_t n, uint8_t* addr) noexcept nogil:
    """Parse four decimal octets without leading zeros into 4 bytes."""
    cdef size_t i = 0, start
    cdef uint32_t value
    cdef int octet
    for octet in range(4):
        if octet:
            if i == n or text[i] != c'.':
                return False
            i += 1
        start = i
        value = 0
        while i < n and i < start + 3 and is_digit(text[i]):
            value = value * 10 + (text[i] - c'0')
            i += 1
        if i == start or value > 255 or (text[start] == c'0' and i > start + 1):
            return False
        addr[octet] = <uint8_t>value
    return i == n


cdef inline bint parse_addr6(const uint8_t* text, size_t n, uint8_t* addr) noexcept nogil:
    """Parse any of the three forms of RFC 4291 section 2.2, without a zone, into 16 bytes."""
    cdef size_t i = 0, start, used = 0, gap = 17
    cdef uint32_t value
    memset(addr, 0, 16)
    if n and text[0] == c':':
        if n == 1 or text[1] != c':':
            return False
        gap = 0
        i = 2
    while i < n:
        if used == 16:
            return False
        start = i
        value = 0
        while i < n and i < start + 4 and hex_digit(text[i]) >= 0:
            value = value << 4 | <uint32_t>hex_digit(text[i])
            i += 1
        if i == start:
            return False
        if i < n and text[i] == c'.':
            if used > 12 or not parse_addr4(text + start, n - start, addr + used):
                return False
            used += 4
            break
        addr[used] = <uint8_t>(value >> 8)
        addr[used + 1] = <uint8_t>value
        used += 2
        if i == n:
            break
        if text[i] != c':' or i + 1 == n:
            return False
        i += 1
        if text[i] == c':':
            if gap <= 16:
                return False
            gap = used
            i += 1
    if gap > 16:
        return used == 16
    if used > 14:
        return False
    memmove(addr + gap + 16 - used, addr + gap, used - gap)
    memset(addr + gap, 0, 16 - used)
    return True


cdef inline uint8_t parse_addr(const uint8_t* text, size_t n, uint8_t* addr) noexcept nogil:
    """Parse an address of either family into 16 bytes. Unused bytes are set to zero.

    returns  the family (4 or 6); 0 if the text is not an address
    """
    memset(addr, 0, 16)
    if parse_addr4(text, n, addr):
        return 4
    return 6 if parse_addr6(text, n, addr) else 0


cdef inline bint parse_prefix(const uint8_t* text, size_t n, route_t* route) noexcept nogil:
    """Parse ADDRESS or ADDRESS/LENGTH into the route's destination. Host bits must be zero."""
    cdef const uint8_t* slash = <const uint8_t*>memchr(text, c'/', n)
    cdef size_t addr_n = n if slash == NULL else <size_t>(slash - text), i
    cdef size_t length = 0
    cdef size_t width
    route.dst_family = parse_addr(text, addr_n, route.dst)
    if route.dst_family == 0:
        return False
    width = 32 if route.dst_family == 4 else 128
    if slash == NULL:
        length = width
    else:
        if addr_n + 1 == n or n - addr_n - 1 > PREFIX_DIGITS_MAX:
            return False
        for i in range(addr_n + 1, n):
            if not is_digit(text[i]):
                return False
            length = length * 10 + (text[i] - c'0')
            if length > width:
                return False
    route.dst_len = <uint8_t>length
    for i in range(length >> 3, width >> 3):
        if route.dst[i] & (0xFF >> (length & 7) if i == length >> 3 else 0xFF):
            return False
    return True


cdef inline bint parse_number(
    const uint8_t* text, size_t n, uint32_t low, uint32_t high, uint16_t* number
) noexcept nogil:
    """Parse one to nine decimal digits. Return whether the value is in low..high."""
    cdef uint32_t value = 0
    cdef size_t i
    if n == 0 or n > 9:
        return False
    for i in range(n):
        if not is_digit(text[i]):
            return False
        value = value * 10 + (text[i] - c'0')
    number[0] = <uint16_t>value
    return low <= value <= high


cdef inline bint parse_source_port(const uint8_t* text, size_t n, route_t* route) noexcept nogil:
    """Parse ``any``, a port, or the first and the last port as ``P-Q``."""
    cdef const uint8_t* dash = <const uint8_t*>memchr(text, c'-', n)
    cdef size_t first_n = n if dash == NULL else <size_t>(dash - text)
    if same_word(text, n, b"any", 3):
        route.source_first = 1
        route.source_last = MAX_PORT
        return True
    if not parse_number(text, first_n, 1, MAX_PORT, &route.source_first):
        return False
    route.source_last = route.source_first
    return dash == NULL or parse_number(
        dash + 1, n - first_n - 1, route.source_first, MAX_PORT, &route.source_last)


# Write

cdef inline size_t write_bytes(uint8_t* out, const char* bytes_, size_t n) noexcept nogil:
    """Copy n bytes and return n."""
    memcpy(out, bytes_, n)
    return n


cdef inline size_t write_number(uint8_t* out, uint32_t value) noexcept nogil:
    """Write a number in decimal. Return the number of bytes written, at most 10."""
    cdef uint8_t digits[10]
    cdef size_t n = 0, i
    while True:
        digits[n] = <uint8_t>(c'0' + value % 10)
        n += 1
        value = value // 10
        if value == 0:
            break
    for i in range(n):
        out[i] = digits[n - 1 - i]
    return n


cdef inline size_t write_source_port(uint8_t* out, const route_t* route) noexcept nogil:
    """Write the ports of a route that has them: ``any``, a port, or ``P-Q``."""
    cdef size_t n
    if route.source_first == 1 and route.source_last == MAX_PORT:
        return write_bytes(out, b"any", 3)
    n = write_number(out, route.source_first)
    if route.source_last != route.source_first:
        out[n] = c'-'
        n += 1 + write_number(out + n + 1, route.source_last)
    return n


cdef inline size_t write_addr4(uint8_t* out, const uint8_t* addr) noexcept nogil:
    """Write an IPv4 address in dotted decimal. Return the number of bytes written, at most 15."""
    cdef size_t n = 0
    cdef int i
    for i in range(4):
        if i:
            out[n] = c'.'
            n += 1
        n += write_number(out + n, addr[i])
    return n


cdef inline size_t write_addr6(uint8_t* out, const uint8_t* addr) noexcept nogil:
    """Write an IPv6 address as in RFC 5952: in lower case, without leading zeros, and with "::" for
    the longest run of zero groups (the first, if several are longest)."""
    cdef int i, run = 0, gap = -1, gap_n = 1, digit
    cdef uint32_t group
    cdef const char* digits = b"0123456789abcdef"
    cdef size_t n = 0
    if UDPTUN_MAPPED_DOTTED and memcmp(addr, b"\0\0\0\0\0\0\0\0\0\0\xff\xff", 12) == 0:
        memcpy(out, b"::ffff:", 7)
        return 7 + write_addr4(out + 7, addr + 12)
    for i in range(8):
        run = 0 if addr[2 * i] or addr[2 * i + 1] else run + 1
        if run > gap_n:
            gap_n = run
            gap = i + 1 - run
    i = 0
    while i < 8:
        if i == gap:
            out[n] = out[n + 1] = c':'
            n += 2
            i += gap_n
            continue
        if i and i != gap + gap_n:
            out[n] = c':'
            n += 1
        group = <uint32_t>addr[2 * i] << 8 | addr[2 * i + 1]
        digit = 12
        while digit and not group >> digit:
            digit -= 4
        while digit >= 0:
            out[n] = digits[group >> digit & 15]
            n += 1
            digit -= 4
        i += 1
    return n


cdef inline size_t write_addr(uint8_t* out, uint8_t family, const uint8_t* addr) noexcept nogil:
    """Write an address without a terminating zero. Return the bytes written, at most 39."""
    return write_addr4(out, addr) if family == 4 else write_addr6(out, addr)


cdef inline size_t write_prefix(uint8_t* out, const route_t* route) noexcept nogil:
    """Write the route's destination as ADDRESS/LENGTH. Return the bytes written, at most 43."""
    cdef size_t n = write_addr(out, route.dst_family, route.dst)
    out[n] = c'/'
    return n + 1 + write_number(out + n + 1, route.dst_len)
