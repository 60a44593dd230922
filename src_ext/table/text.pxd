"""Parse and write the route file, one route per line:
``DST via IP [port P] [mtu M] [source-port P] [probe] [express] [ecn]``.

The source port is a port, ``P-Q`` or ``any``. A ``#`` starts a comment; blank lines are ignored.
``udptun.model.Route.from_words`` accepts the same lines; the tests compare the two.

The bytes are untrusted and are borrowed during the call. Threading: as parser.pxd.
"""

from libc.stdint cimport uint8_t
from libc.string cimport memchr, memset

from limits cimport DEFAULT_PORT, MAX_MTU, MAX_PORT, MIN_MTU
from table.address cimport (
    parse_addr, parse_number, parse_prefix, parse_source_port, same_word, write_addr, write_bytes,
    write_number, write_prefix, write_source_port,
)
from table.parser cimport PARSE_ROUTE, add_route, parser_t
from table.route cimport ROUTE_ECN, ROUTE_EXPRESS, ROUTE_PROBE, route_t, route_valid


# Parse

cdef inline bint next_word(
    const uint8_t* text, size_t n, size_t* at, const uint8_t** word, size_t* word_n
) noexcept nogil:
    """Find the next word from ``at`` on. Return whether there is one. Words are separated by the
    same characters as in ``bytes.split()``."""
    cdef size_t i = at[0]
    while i < n and (text[i] == c' ' or 9 <= text[i] <= 13):
        i += 1
    word[0] = text + i
    at[0] = i
    while i < n and not (text[i] == c' ' or 9 <= text[i] <= 13):
        i += 1
    word_n[0] = i - at[0]
    at[0] = i
    return word_n[0] > 0


cdef inline int parse_line(const uint8_t* text, size_t n, route_t* route) noexcept nogil:
    """Parse a line from which the comment is removed. Return 1 for a route, 0 for a blank line, -1
    on error."""
    cdef size_t at = 0, word_n, value_n
    cdef const uint8_t* word
    cdef const uint8_t* value
    memset(route, 0, sizeof(route_t))
    if not next_word(text, n, &at, &word, &word_n):
        return 0
    if not parse_prefix(word, word_n, route):
        return -1
    next_word(text, n, &at, &word, &word_n)
    if not same_word(word, word_n, b"via", 3):
        return -1
    next_word(text, n, &at, &word, &word_n)
    route.via_family = parse_addr(word, word_n, route.via)
    if route.via_family == 0:
        return -1
    while next_word(text, n, &at, &word, &word_n):
        if same_word(word, word_n, b"probe", 5) and not route.flags & ROUTE_PROBE:
            route.flags |= ROUTE_PROBE
            continue
        if same_word(word, word_n, b"express", 7) and not route.flags & ROUTE_EXPRESS:
            route.flags |= ROUTE_EXPRESS
            continue
        if same_word(word, word_n, b"ecn", 3) and not route.flags & ROUTE_ECN:
            route.flags |= ROUTE_ECN
            continue
        next_word(text, n, &at, &value, &value_n)
        if same_word(word, word_n, b"port", 4) and not route.port:
            if not parse_number(value, value_n, 1, MAX_PORT, &route.port):
                return -1
        elif same_word(word, word_n, b"mtu", 3) and not route.mtu:
            if not parse_number(value, value_n, MIN_MTU, MAX_MTU, &route.mtu):
                return -1
        elif same_word(word, word_n, b"source-port", 11) and not route.source_last:
            if not parse_source_port(value, value_n, route):
                return -1
        else:
            return -1
    if not route.port:
        route.port = DEFAULT_PORT
    return 1 if route_valid(route) else -1


cdef inline void parse_text(parser_t* p) noexcept nogil:
    """Parse a route file. The signature is ``parse_fn`` (see parser.pxd)."""
    cdef const uint8_t* found
    cdef size_t end, stop
    cdef route_t route
    cdef int verdict
    while p.pos < p.n:
        p.index += 1
        found = <const uint8_t*>memchr(p.text + p.pos, c'\n', p.n - p.pos)
        end = p.n if found == NULL else <size_t>(found - p.text)
        found = <const uint8_t*>memchr(p.text + p.pos, c'#', end - p.pos)
        stop = end if found == NULL else <size_t>(found - p.text)
        verdict = parse_line(p.text + p.pos, stop - p.pos, &route)
        if verdict < 0:
            p.error = PARSE_ROUTE
            p.error_start = p.pos
            p.error_end = stop
            return
        if verdict > 0 and not add_route(p, &route):
            return
        p.pos = end + 1


# Write

cdef inline size_t write_route_text(uint8_t* out, const route_t* route) noexcept nogil:
    """Write a route as a line of a route file, with the newline.

    returns  the number of bytes written, at most ROUTE_TEXT_MAX
    """
    cdef size_t n = write_prefix(out, route)
    n += write_bytes(out + n, b" via ", 5)
    n += write_addr(out + n, route.via_family, route.via)
    n += write_bytes(out + n, b" port ", 6)
    n += write_number(out + n, route.port)
    if route.mtu:
        n += write_bytes(out + n, b" mtu ", 5)
        n += write_number(out + n, route.mtu)
    if route.source_last:
        n += write_bytes(out + n, b" source-port ", 13)
        n += write_source_port(out + n, route)
    if route.flags & ROUTE_PROBE:
        n += write_bytes(out + n, b" probe", 6)
    if route.flags & ROUTE_EXPRESS:
        n += write_bytes(out + n, b" express", 8)
    if route.flags & ROUTE_ECN:
        n += write_bytes(out + n, b" ecn", 4)
    out[n] = c'\n'
    return n + 1
