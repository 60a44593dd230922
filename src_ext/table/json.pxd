"""Parse and write routes as JSON. The control API uses ``{"routes": [...], "generation": N}``.

Owns: the part of the JSON grammar (RFC 8259) that a table needs. ``udptun.model.Route.from_json``
accepts the same route objects; the tests compare the two. ``json.loads`` accepts all text that this
parser accepts.

Each ``json_*`` function accepts one element at ``p.pos``. If the element is wrong, the function
returns False, and ``p.pos`` is at the first wrong byte. The bytes are untrusted and are borrowed
during the call. Threading: as parser.pxd.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

from limits cimport DEFAULT_PORT, MAX_MTU, MAX_PORT, MIN_MTU
from table.address cimport (
    hex_digit, is_digit, parse_addr, parse_number, parse_prefix, parse_source_port, same_word,
    write_addr, write_bytes, write_number, write_prefix, write_source_port,
)
from table.parser cimport PARSE_BODY, PARSE_OK, PARSE_ROUTE, add_route, parser_t
from table.route cimport ROUTE_ECN, ROUTE_EXPRESS, ROUTE_PROBE, route_t, route_valid


cdef enum:
    JSON_DEPTH = 32             # deepest nesting that is accepted
    JSON_STRING_MAX = 512       # longest string with escapes that is decoded, in bytes


ctypedef struct json_string_t:
    const uint8_t* chars        # the decoded string: in the text, or in ``decoded``
    size_t n
    # Whether the string is ASCII and fully decoded. Only then can it be a key or value of a route.
    bint plain
    uint8_t decoded[JSON_STRING_MAX]


# Parse

cdef inline uint8_t json_peek(const parser_t* p) noexcept nogil:
    """Return the next byte, or 0 at the end of the text. A 0 byte in the text is not confused with
    the end: such a byte is an error everywhere, also inside strings."""
    return p.text[p.pos] if p.pos < p.n else 0


cdef inline void json_space(parser_t* p) noexcept nogil:
    """Skip white space."""
    cdef uint8_t c
    while p.pos < p.n:
        c = p.text[p.pos]
        if c != c' ' and c != c'\n' and c != c'\t' and c != c'\r':
            return
        p.pos += 1


cdef inline bint json_byte(parser_t* p, uint8_t c) noexcept nogil:
    """Accept the byte c, with white space around it."""
    json_space(p)
    if json_peek(p) != c:
        return False
    p.pos += 1
    json_space(p)
    return True


cdef inline bint json_word(parser_t* p, const char* word, size_t n) noexcept nogil:
    """Accept a literal: null, true or false."""
    if p.n - p.pos < n or memcmp(p.text + p.pos, word, n) != 0:
        return False
    p.pos += n
    return True


cdef inline size_t utf8_n(const uint8_t* text, size_t n) noexcept nogil:
    """Return the length, 2..4, of a character above U+007F, or 0 if it is not UTF-8 (RFC 3629)."""
    cdef uint8_t c = text[0]
    cdef size_t length = 2 if c < 0xE0 else 3 if c < 0xF0 else 4, i
    if c < 0xC2 or c > 0xF4 or n < length:
        return 0
    for i in range(1, length):
        if text[i] & 0xC0 != 0x80:
            return 0
    if (c == 0xE0 and text[1] < 0xA0 or c == 0xED and text[1] > 0x9F
            or c == 0xF0 and text[1] < 0x90 or c == 0xF4 and text[1] > 0x8F):
        return 0
    return length


cdef inline bint json_escape(parser_t* p, uint32_t* value) noexcept nogil:
    """Accept the part of an escape after the backslash. A surrogate pair is two escapes and gives
    two values."""
    cdef uint8_t c = json_peek(p)
    cdef int _i
    value[0] = c
    if c == c'u':
        value[0] = 0
        for _i in range(4):
            p.pos += 1
            c = json_peek(p)
            if hex_digit(c) < 0:
                return False
            value[0] = value[0] << 4 | <uint32_t>hex_digit(c)
    elif c == c'b':
        value[0] = 8
    elif c == c'f':
        value[0] = 12
    elif c == c'n':
        value[0] = 10
    elif c == c'r':
        value[0] = 13
    elif c == c't':
        value[0] = 9
    elif c != c'"' and c != c'\\' and c != c'/':
        return False
    p.pos += 1
    return True


cdef inline bint json_string(parser_t* p, json_string_t* string) noexcept nogil:
    """Accept a string. Only a string with escapes is copied and decoded."""
    cdef size_t start, length
    cdef uint32_t value
    cdef uint8_t c
    if json_peek(p) != c'"':
        return False
    p.pos += 1
    start = p.pos
    string.plain = True
    string.chars = p.text + start
    while True:
        if p.pos == p.n:
            return False
        c = p.text[p.pos]
        if c == c'"':
            break
        if c < 0x20:
            return False
        if c >= 0x80:
            length = utf8_n(p.text + p.pos, p.n - p.pos)
            if length == 0:
                return False
            p.pos += length
            string.plain = False
        elif c == c'\\':
            if string.chars != string.decoded:
                string.n = p.pos - start
                string.chars = string.decoded
                if string.n >= JSON_STRING_MAX:
                    string.plain = False
                elif string.plain:
                    memcpy(string.decoded, p.text + start, string.n)
            p.pos += 1
            if not json_escape(p, &value):
                return False
            if value >= 0x80:
                string.plain = False
            c = <uint8_t>value
            if string.plain and string.n < JSON_STRING_MAX:
                string.decoded[string.n] = c
            string.n += 1
        else:
            p.pos += 1
            if string.chars == string.decoded:
                if string.plain and string.n < JSON_STRING_MAX:
                    string.decoded[string.n] = c
                string.n += 1
    if string.chars != string.decoded:
        string.n = p.pos - start
    elif string.n > JSON_STRING_MAX:
        string.plain = False
    p.pos += 1
    return True


cdef inline bint json_digits(parser_t* p) noexcept nogil:
    """Accept one or more decimal digits."""
    if not is_digit(json_peek(p)):
        return False
    while is_digit(json_peek(p)):
        p.pos += 1
    return True


cdef inline bint json_number(parser_t* p) noexcept nogil:
    """Accept a number of any form."""
    if json_peek(p) == c'-':
        p.pos += 1
    if json_peek(p) == c'0':
        p.pos += 1
    elif not json_digits(p):
        return False
    if json_peek(p) == c'.':
        p.pos += 1
        if not json_digits(p):
            return False
    if json_peek(p) | 0x20 == c'e':
        p.pos += 1
        if json_peek(p) == c'+' or json_peek(p) == c'-':
            p.pos += 1
        return json_digits(p)
    return True


cdef inline bint json_skip(parser_t* p, int depth) noexcept nogil:
    """Accept any one value. Recurses at most JSON_DEPTH deep."""
    cdef json_string_t string
    cdef uint8_t c = json_peek(p), close
    if c == c'"':
        return json_string(p, &string)
    if c == c'n':
        return json_word(p, b"null", 4)
    if c == c't':
        return json_word(p, b"true", 4)
    if c == c'f':
        return json_word(p, b"false", 5)
    if c != c'{' and c != c'[':
        return json_number(p)
    if depth == JSON_DEPTH:
        return False
    close = c'}' if c == c'{' else c']'
    json_byte(p, c)
    if json_peek(p) == close:
        p.pos += 1
        return True
    while True:
        if c == c'{' and not (json_string(p, &string) and json_byte(p, c':')):
            return False
        if not json_skip(p, depth + 1):
            return False
        json_space(p)
        if json_peek(p) == close:
            p.pos += 1
            return True
        if not json_byte(p, c','):
            return False


cdef inline bint json_uint16(
    parser_t* p, json_string_t* string, uint32_t low, uint32_t high, uint16_t* number
) noexcept nogil:
    """Accept an integer in low..high, written as a number or as a string of digits."""
    cdef size_t start = p.pos
    if json_peek(p) == c'"':
        return (json_string(p, string) and string.plain
                and parse_number(string.chars, string.n, low, high, number))
    return (json_number(p)
            and parse_number(p.text + start, p.pos - start, low, high, number))


cdef inline bint json_source_port(
    parser_t* p, json_string_t* string, route_t* route
) noexcept nogil:
    """Accept null, a port, or a string that parse_source_port accepts."""
    cdef size_t start = p.pos
    if json_word(p, b"null", 4):
        return True
    if json_peek(p) == c'"':
        return (json_string(p, string) and string.plain
                and parse_source_port(string.chars, string.n, route))
    return (json_number(p)
            and parse_source_port(p.text + start, p.pos - start, route))


cdef inline bint json_route(parser_t* p, route_t* route) noexcept nogil:
    """Accept an object with dst, via, and optionally port, mtu, source_port, probe, express
    and ecn, each once.

    False means a wrong route or text that is not JSON. The caller finds out with json_skip which of
    the two it is.
    """
    cdef json_string_t string
    cdef uint32_t seen = 0, key
    memset(route, 0, sizeof(route_t))
    route.port = DEFAULT_PORT
    if not json_byte(p, c'{'):
        return False
    while True:
        if not (json_string(p, &string) and string.plain):
            return False
        if same_word(string.chars, string.n, b"dst", 3):
            key = 1
        elif same_word(string.chars, string.n, b"via", 3):
            key = 2
        elif same_word(string.chars, string.n, b"port", 4):
            key = 4
        elif same_word(string.chars, string.n, b"mtu", 3):
            key = 8
        elif same_word(string.chars, string.n, b"probe", 5):
            key = 16
        elif same_word(string.chars, string.n, b"source_port", 11):
            key = 32
        elif same_word(string.chars, string.n, b"express", 7):
            key = 64
        elif same_word(string.chars, string.n, b"ecn", 3):
            key = 128
        else:
            return False
        if seen & key or not json_byte(p, c':'):
            return False
        seen |= key
        if key == 4:
            if not json_uint16(p, &string, 1, MAX_PORT, &route.port):
                return False
        elif key == 8:
            if not json_word(p, b"null", 4) and not json_uint16(
                    p, &string, MIN_MTU, MAX_MTU, &route.mtu):
                return False
        elif key == 16 or key == 64 or key == 128:
            if json_word(p, b"true", 4):
                route.flags |= (
                    ROUTE_PROBE if key == 16 else ROUTE_EXPRESS if key == 64 else ROUTE_ECN)
            elif not json_word(p, b"false", 5):
                return False
        elif key == 32:
            if not json_source_port(p, &string, route):
                return False
        elif not (json_string(p, &string) and string.plain):
            return False
        elif key == 1:
            if not parse_prefix(string.chars, string.n, route):
                return False
        else:
            route.via_family = parse_addr(string.chars, string.n, route.via)
            if route.via_family == 0:
                return False
        json_space(p)
        if json_peek(p) == c'}':
            p.pos += 1
            return seen & 3 == 3 and route_valid(route)
        if not json_byte(p, c','):
            return False


cdef inline bint json_array(parser_t* p) noexcept nogil:
    """Accept the array of routes. Return False also if p.error is set or p.limit is reached."""
    cdef route_t route
    cdef size_t start
    if not json_byte(p, c'['):
        return False
    if json_peek(p) == c']':
        p.pos += 1
        return True
    while True:
        start = p.pos
        if not json_route(p, &route):
            p.pos = start
            if json_skip(p, 0):
                p.error = PARSE_ROUTE
                p.error_start = start
                p.error_end = p.pos
            return False
        if not add_route(p, &route):
            return False
        p.index += 1
        json_space(p)
        if json_peek(p) == c']':
            p.pos += 1
            return True
        if not json_byte(p, c','):
            return False


cdef inline bint json_body(parser_t* p) noexcept nogil:
    """Accept the whole body: an object with routes and optionally generation, which is ignored."""
    cdef json_string_t string
    cdef bint routes = False, generation = False
    cdef size_t start
    if not json_byte(p, c'{'):
        return False
    while True:
        start = p.pos
        if not json_string(p, &string):
            return False
        if string.plain and not routes and same_word(string.chars, string.n, b"routes", 6):
            routes = True
            if not (json_byte(p, c':') and json_array(p)):
                return False
        elif (string.plain and not generation
                and same_word(string.chars, string.n, b"generation", 10)):
            generation = True
            if not (json_byte(p, c':') and json_number(p)):
                return False
        else:
            p.pos = start
            return False
        json_space(p)
        if json_peek(p) == c'}':
            if not routes:
                return False
            p.pos += 1
            json_space(p)
            return p.pos == p.n
        if not json_byte(p, c','):
            return False


cdef inline void parse_json(parser_t* p) noexcept nogil:
    """Parse the body of a control API request. The signature is ``parse_fn`` (see parser.pxd)."""
    if not json_body(p) and p.error == PARSE_OK and p.routes.n < p.limit:
        p.error = PARSE_BODY
        p.error_start = p.pos


# Write

cdef inline size_t write_json_source_port(uint8_t* out, const route_t* route) noexcept nogil:
    """Write the member source_port: one port as a number, other values as a string."""
    cdef bint quoted = route.source_first != route.source_last
    cdef size_t n = write_bytes(out, b',"source_port":', 15)
    if quoted:
        n += write_bytes(out + n, b'"', 1)
    n += write_source_port(out + n, route)
    if quoted:
        n += write_bytes(out + n, b'"', 1)
    return n


cdef inline size_t write_route_json(uint8_t* out, const route_t* route) noexcept nogil:
    """Write a route as an object of the JSON array.

    returns  the number of bytes written, at most ROUTE_TEXT_MAX
    """
    cdef size_t n = write_bytes(out, b'{"dst":"', 8)
    n += write_prefix(out + n, route)
    n += write_bytes(out + n, b'","via":"', 9)
    n += write_addr(out + n, route.via_family, route.via)
    n += write_bytes(out + n, b'","port":', 9)
    n += write_number(out + n, route.port)
    n += write_bytes(out + n, b',"mtu":', 7)
    if route.mtu:
        n += write_number(out + n, route.mtu)
    else:
        n += write_bytes(out + n, b"null", 4)
    if route.source_last:
        n += write_json_source_port(out + n, route)
    if route.flags & ROUTE_PROBE:
        n += write_bytes(out + n, b',"probe":true', 13)
    if route.flags & ROUTE_EXPRESS:
        n += write_bytes(out + n, b',"express":true', 15)
    if route.flags & ROUTE_ECN:
        n += write_bytes(out + n, b',"ecn":true', 11)
    out[n] = c'}'
    return n + 1
