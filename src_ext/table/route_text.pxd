"""Routes as text: addresses and prefixes, the route file, and the JSON body of the control API.

Owns: the grammar of whole tables, both ways, at a speed that does not keep a worker waiting: a
table of 100,000 routes is parsed without the interpreter. Refuses to know: how an error is worded.
A parser says which route is wrong and where it stands; ``udptun.model.Route``, which reads the
same grammar one route at a time, is then asked for the words (table/route_table.pxi).

Addresses are accepted and written exactly as Python's ``ipaddress`` does (RFC 5952).

Every ``parse_*`` may meet hostile bytes. Text is borrowed during the call only.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memchr, memcmp, memcpy, memmove, memset
from sys cimport sched_yield
from table.routes cimport (
    route_t, route_vec_t, routes_append, routes_find, routes_first_repeat, routes_free, routes_sort,
)


cdef extern from * nogil:
    """
    /* From 3.13 on, ipaddress writes ::ffff:192.0.2.1, before ::ffff:c000:201. */
    #define UDPTUN_MAPPED_DOTTED (PY_VERSION_HEX >= 0x030D0000)
    """
    bint UDPTUN_MAPPED_DOTTED


cdef enum:
    # The limits of udptun.model; the tests hold the two to each other.
    ROUTE_PORT = 8285           # where none is given
    ROUTE_MTU_MIN = 68
    ROUTE_MTU6_MIN = 1280
    ROUTE_TEXT_MAX = 160        # longest route in any form, and some
    JSON_DEPTH = 32             # deepest nesting that is followed
    JSON_STRING_MAX = 512       # longest string with escapes that is decoded
    PREFIX_DIGITS_MAX = 4300    # longest prefix length in digits: what Python's int() takes
    BREATHE_ROUTES = 512        # read at a stretch: some 50 us


cdef enum parse_error_t:
    PARSE_OK = 0
    PARSE_ROUTE                 # a route that cannot be used
    PARSE_BODY                  # not the JSON we want, at the byte span_from
    PARSE_REPEAT                # the prefix of ``repeat`` came before
    PARSE_NO_MEMORY


ctypedef struct parse_t:
    const uint8_t* text         # borrowed
    size_t n
    bint json                   # else a route file
    size_t limit                # stop after so many routes
    size_t at                   # the next byte
    route_vec_t routes          # the result: sorted, each prefix once; the caller frees it
    parse_error_t error
    size_t place                # the current route: line from 1 on, or index from 0 on
    size_t span_from            # the text of the wrong route
    size_t span_to
    route_t repeat


ctypedef struct json_string_t:
    const uint8_t* at           # the decoded string: in the text, or in ``decoded``
    size_t n
    bint plain                  # False: not ASCII, or too long to decode, so none of our words
    uint8_t decoded[JSON_STRING_MAX]


# Addresses

cdef inline bint is_digit(uint8_t c) noexcept nogil:
    return c >= c'0' and c <= c'9'


cdef inline int hex_digit(uint8_t c) noexcept nogil:
    """0..15, or -1."""
    if is_digit(c):
        return c - c'0'
    c |= 0x20
    return c - c'a' + 10 if c >= c'a' and c <= c'f' else -1


cdef inline bint parse_addr4(const uint8_t* text, size_t n, uint8_t* addr) noexcept nogil:
    """Four decimal octets without leading zeros into 4 bytes."""
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
    """RFC 4291 section 2.2, all three forms, no zone, into 16 bytes."""
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
    """Into 16 bytes, the unused ones zero. The family, 4 or 6, or 0 if it is no address."""
    memset(addr, 0, 16)
    if parse_addr4(text, n, addr):
        return 4
    return 6 if parse_addr6(text, n, addr) else 0


cdef inline bint parse_prefix(const uint8_t* text, size_t n, route_t* route) noexcept nogil:
    """ADDRESS or ADDRESS/LENGTH without host bits, into the route's destination."""
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
    """One to nine decimal digits, low..high."""
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


cdef inline size_t write_number(uint8_t* out, uint32_t value) noexcept nogil:
    """Decimal; the bytes written, at most 10."""
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


cdef inline size_t write_addr4(uint8_t* out, const uint8_t* addr) noexcept nogil:
    cdef size_t n = 0
    cdef int i
    for i in range(4):
        if i:
            out[n] = c'.'
            n += 1
        n += write_number(out + n, addr[i])
    return n


cdef inline size_t write_addr6(uint8_t* out, const uint8_t* addr) noexcept nogil:
    """RFC 5952: lower case, no leading zeros, the first longest run of zero groups left out."""
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
    """The bytes written, at most 39; nothing is put after them."""
    return write_addr4(out, addr) if family == 4 else write_addr6(out, addr)


cdef inline size_t write_prefix(uint8_t* out, const route_t* route) noexcept nogil:
    cdef size_t n = write_addr(out, route.dst_family, route.dst)
    out[n] = c'/'
    return n + 1 + write_number(out + n + 1, route.dst_len)


# Routes, written

cdef inline size_t write_words(uint8_t* out, const char* words, size_t n) noexcept nogil:
    memcpy(out, words, n)
    return n


cdef inline size_t write_route_text(uint8_t* out, const route_t* route) noexcept nogil:
    """A line of a route file, its newline included; at most ROUTE_TEXT_MAX bytes."""
    cdef size_t n = write_prefix(out, route)
    n += write_words(out + n, b" via ", 5)
    n += write_addr(out + n, route.via_family, route.via)
    n += write_words(out + n, b" port ", 6)
    n += write_number(out + n, route.port)
    if route.mtu:
        n += write_words(out + n, b" mtu ", 5)
        n += write_number(out + n, route.mtu)
    out[n] = c'\n'
    return n + 1


cdef inline size_t write_route_json(uint8_t* out, const route_t* route) noexcept nogil:
    """An object of the JSON array; at most ROUTE_TEXT_MAX bytes."""
    cdef size_t n = write_words(out, b'{"dst":"', 8)
    n += write_prefix(out + n, route)
    n += write_words(out + n, b'","via":"', 9)
    n += write_addr(out + n, route.via_family, route.via)
    n += write_words(out + n, b'","port":', 9)
    n += write_number(out + n, route.port)
    n += write_words(out + n, b',"mtu":', 7)
    if route.mtu:
        n += write_number(out + n, route.mtu)
    else:
        n += write_words(out + n, b"null", 4)
    out[n] = c'}'
    return n + 1


# The route file

cdef inline bint same_word(
    const uint8_t* text, size_t n, const char* word, size_t m
) noexcept nogil:
    return n == m and memcmp(text, word, m) == 0


cdef inline bint next_word(
    const uint8_t* text, size_t n, size_t* at, const uint8_t** word, size_t* word_n
) noexcept nogil:
    """The next run of bytes other than blanks (those of ``bytes.split()``)."""
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


cdef inline bint sound_route(const route_t* route) noexcept nogil:
    """What holds between and beyond the single fields, as model.Route.make has it: the next hop is
    one host's address, and IPv6 is not asked to fit into less than RFC 8200 section 5 allows."""
    cdef const uint8_t* via = &route.via[0]
    cdef int i
    if route.dst_family == 6 and route.mtu != 0 and route.mtu < ROUTE_MTU6_MIN:
        return False
    if route.via_family == 4:
        return 0 < via[0] < 224
    if via[0] == 0xFF:
        return False
    for i in range(10):
        if via[i] != 0:
            return True
    if via[10] == 0xFF and via[11] == 0xFF:
        return False
    for i in range(10, 16):
        if via[i] != 0:
            return True
    return False


cdef inline int parse_line(const uint8_t* text, size_t n, route_t* route) noexcept nogil:
    """A line without its comment: 1 a route, 0 blank, -1 wrong."""
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
        next_word(text, n, &at, &value, &value_n)
        if same_word(word, word_n, b"port", 4) and not route.port:
            if not parse_number(value, value_n, 1, 65535, &route.port):
                return -1
        elif same_word(word, word_n, b"mtu", 3) and not route.mtu:
            if not parse_number(value, value_n, ROUTE_MTU_MIN, 65535, &route.mtu):
                return -1
        else:
            return -1
    if not route.port:
        route.port = ROUTE_PORT
    return 1 if sound_route(route) else -1


cdef inline bint keep_route(parse_t* p, const route_t* route) noexcept nogil:
    """Whether to go on: not when memory is out or the limit is reached. Now and then a worker that
    waits for this core may have it."""
    if p.routes.n % BREATHE_ROUTES == 0:
        sched_yield()
    if routes_append(&p.routes, route) < 0:
        p.error = PARSE_NO_MEMORY
    return p.error == PARSE_OK and p.routes.n < p.limit


cdef inline void parse_text_body(parse_t* p) noexcept nogil:
    cdef const uint8_t* found
    cdef size_t end, stop
    cdef route_t route
    cdef int verdict
    while p.at < p.n:
        p.place += 1
        found = <const uint8_t*>memchr(p.text + p.at, c'\n', p.n - p.at)
        end = p.n if found == NULL else <size_t>(found - p.text)
        found = <const uint8_t*>memchr(p.text + p.at, c'#', end - p.at)
        stop = end if found == NULL else <size_t>(found - p.text)
        verdict = parse_line(p.text + p.at, stop - p.at, &route)
        if verdict < 0:
            p.error = PARSE_ROUTE
            p.span_from = p.at
            p.span_to = stop
            return
        if verdict > 0 and not keep_route(p, &route):
            return
        p.at = end + 1


# JSON (RFC 8259). A json_* returns False at the first byte that cannot stand there: p.at.

cdef inline uint8_t json_peek(const parse_t* p) noexcept nogil:
    """The next byte, 0 at the end (which may stand nowhere outside a string)."""
    return p.text[p.at] if p.at < p.n else 0


cdef inline void json_space(parse_t* p) noexcept nogil:
    cdef uint8_t c
    while p.at < p.n:
        c = p.text[p.at]
        if c != c' ' and c != c'\n' and c != c'\t' and c != c'\r':
            return
        p.at += 1


cdef inline bint json_byte(parse_t* p, uint8_t c) noexcept nogil:
    """The byte c, with any space around it."""
    json_space(p)
    if json_peek(p) != c:
        return False
    p.at += 1
    json_space(p)
    return True


cdef inline bint json_word(parse_t* p, const char* word, size_t n) noexcept nogil:
    if p.n - p.at < n or memcmp(p.text + p.at, word, n) != 0:
        return False
    p.at += n
    return True


cdef inline size_t utf8_n(const uint8_t* text, size_t n) noexcept nogil:
    """Length of the character above U+007F that begins here, 2..4, or 0 (RFC 3629)."""
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


cdef inline bint json_escape(parse_t* p, uint32_t* value) noexcept nogil:
    """What follows a backslash; a surrogate is not joined to the next one."""
    cdef uint8_t c = json_peek(p)
    cdef int _i
    value[0] = c
    if c == c'u':
        value[0] = 0
        for _i in range(4):
            p.at += 1
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
    p.at += 1
    return True


cdef inline bint json_string(parse_t* p, json_string_t* string) noexcept nogil:
    cdef size_t start, length
    cdef uint32_t value
    cdef uint8_t c
    if json_peek(p) != c'"':
        return False
    p.at += 1
    start = p.at
    string.plain = True
    string.at = p.text + start
    while True:
        if p.at == p.n:
            return False
        c = p.text[p.at]
        if c == c'"':
            break
        if c < 0x20:
            return False
        if c >= 0x80:
            length = utf8_n(p.text + p.at, p.n - p.at)
            if length == 0:
                return False
            p.at += length
            string.plain = False
        elif c == c'\\':
            if string.at != string.decoded:
                string.n = p.at - start
                string.at = string.decoded
                if string.n >= JSON_STRING_MAX:
                    string.plain = False
                elif string.plain:
                    memcpy(string.decoded, p.text + start, string.n)
            p.at += 1
            if not json_escape(p, &value):
                return False
            if value >= 0x80:
                string.plain = False
            c = <uint8_t>value
            if string.plain and string.n < JSON_STRING_MAX:
                string.decoded[string.n] = c
            string.n += 1
        else:
            p.at += 1
            if string.at == string.decoded:
                if string.plain and string.n < JSON_STRING_MAX:
                    string.decoded[string.n] = c
                string.n += 1
    if string.at != string.decoded:
        string.n = p.at - start
    elif string.n > JSON_STRING_MAX:
        string.plain = False
    p.at += 1
    return True


cdef inline bint json_digits(parse_t* p) noexcept nogil:
    if not is_digit(json_peek(p)):
        return False
    while is_digit(json_peek(p)):
        p.at += 1
    return True


cdef inline bint json_number(parse_t* p) noexcept nogil:
    if json_peek(p) == c'-':
        p.at += 1
    if json_peek(p) == c'0':
        p.at += 1
    elif not json_digits(p):
        return False
    if json_peek(p) == c'.':
        p.at += 1
        if not json_digits(p):
            return False
    if json_peek(p) | 0x20 == c'e':
        p.at += 1
        if json_peek(p) == c'+' or json_peek(p) == c'-':
            p.at += 1
        return json_digits(p)
    return True


cdef inline bint json_skip(parse_t* p, int depth) noexcept nogil:
    """Any one value. Recurses at most JSON_DEPTH deep."""
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
        p.at += 1
        return True
    while True:
        if c == c'{' and not (json_string(p, &string) and json_byte(p, c':')):
            return False
        if not json_skip(p, depth + 1):
            return False
        json_space(p)
        if json_peek(p) == close:
            p.at += 1
            return True
        if not json_byte(p, c','):
            return False


cdef inline bint json_small(
    parse_t* p, json_string_t* string, uint32_t low, uint16_t* number
) noexcept nogil:
    """low..65535, as a number or as a string of digits."""
    cdef size_t start = p.at
    if json_peek(p) == c'"':
        return (json_string(p, string) and string.plain
                and parse_number(string.at, string.n, low, 65535, number))
    return (json_number(p)
            and parse_number(p.text + start, p.at - start, low, 65535, number))


cdef inline bint json_route(parse_t* p, route_t* route) noexcept nogil:
    """An object with dst, via, and perhaps port and mtu, each once.

    False for any other value too: the caller asks json_skip whether it is JSON at all.
    """
    cdef json_string_t string
    cdef uint32_t seen = 0, key
    memset(route, 0, sizeof(route_t))
    route.port = ROUTE_PORT
    if not json_byte(p, c'{'):
        return False
    while True:
        if not (json_string(p, &string) and string.plain):
            return False
        if same_word(string.at, string.n, b"dst", 3):
            key = 1
        elif same_word(string.at, string.n, b"via", 3):
            key = 2
        elif same_word(string.at, string.n, b"port", 4):
            key = 4
        elif same_word(string.at, string.n, b"mtu", 3):
            key = 8
        else:
            return False
        if seen & key or not json_byte(p, c':'):
            return False
        seen |= key
        if key == 4:
            if not json_small(p, &string, 1, &route.port):
                return False
        elif key == 8:
            if not json_word(p, b"null", 4) and not json_small(
                    p, &string, ROUTE_MTU_MIN, &route.mtu):
                return False
        elif not (json_string(p, &string) and string.plain):
            return False
        elif key == 1:
            if not parse_prefix(string.at, string.n, route):
                return False
        else:
            route.via_family = parse_addr(string.at, string.n, route.via)
            if route.via_family == 0:
                return False
        json_space(p)
        if json_peek(p) == c'}':
            p.at += 1
            return seen & 3 == 3 and sound_route(route)
        if not json_byte(p, c','):
            return False


cdef inline bint json_routes(parse_t* p) noexcept nogil:
    """The array of routes. False also when p.error is set or the limit is reached."""
    cdef route_t route
    cdef size_t start
    if not json_byte(p, c'['):
        return False
    if json_peek(p) == c']':
        p.at += 1
        return True
    while True:
        start = p.at
        if not json_route(p, &route):
            p.at = start
            if json_skip(p, 0):
                p.error = PARSE_ROUTE
                p.span_from = start
                p.span_to = p.at
            return False
        if not keep_route(p, &route):
            return False
        p.place += 1
        json_space(p)
        if json_peek(p) == c']':
            p.at += 1
            return True
        if not json_byte(p, c','):
            return False


cdef inline bint json_members(parse_t* p) noexcept nogil:
    """The whole body: an object with routes, and perhaps the generation, which is not used."""
    cdef json_string_t string
    cdef bint routes = False, generation = False
    cdef size_t start
    if not json_byte(p, c'{'):
        return False
    while True:
        start = p.at
        if not json_string(p, &string):
            return False
        if string.plain and not routes and same_word(string.at, string.n, b"routes", 6):
            routes = True
            if not (json_byte(p, c':') and json_routes(p)):
                return False
        elif (string.plain and not generation
                and same_word(string.at, string.n, b"generation", 10)):
            generation = True
            if not (json_byte(p, c':') and json_number(p)):
                return False
        else:
            p.at = start
            return False
        json_space(p)
        if json_peek(p) == c'}':
            if not routes:
                return False
            p.at += 1
            json_space(p)
            return p.at == p.n
        if not json_byte(p, c','):
            return False


cdef inline void parse_json_body(parse_t* p) noexcept nogil:
    if not json_members(p) and p.error == PARSE_OK and p.routes.n < p.limit:
        p.error = PARSE_BODY
        p.span_from = p.at


# Whole tables

cdef inline void parse_body(parse_t* p) noexcept nogil:
    if p.json:
        parse_json_body(p)
    else:
        parse_text_body(p)


cdef inline size_t find_repeat(
    const route_vec_t* sorted, const route_vec_t* given
) noexcept nogil:
    """Index in ``given`` of the first route whose prefix came before, or its length."""
    cdef uint8_t* seen = <uint8_t*>calloc(sorted.n + 1, 1)
    cdef size_t i = 0, at
    if seen == NULL:
        return given.n
    while i < given.n and routes_find(sorted, &given.items[i], &at) and not seen[at]:
        seen[at] = 1
        i += 1
    free(seen)
    return i


cdef inline void parse_routes(parse_t* p) noexcept nogil:
    """Parse ``text`` into a sorted table with each prefix once, or say in ``error`` why not.

    p   in: text, n, json; the rest zero. p.routes is to be freed in every case
    """
    cdef parse_t again = p[0]
    p.limit = <size_t>-1
    parse_body(p)
    if p.error != PARSE_OK:
        return
    if routes_sort(&p.routes) < 0:
        p.error = PARSE_NO_MEMORY
        return
    if routes_first_repeat(&p.routes) == p.routes.n:
        return
    # The order of the text is lost, and with it the place: only now is it worth a second reading,
    # and a third up to the route in question.
    again.limit = <size_t>-1
    parse_body(&again)
    p.limit = find_repeat(&p.routes, &again.routes) + 1
    if again.error != PARSE_OK or p.limit > again.routes.n:
        p.error = PARSE_NO_MEMORY
        routes_free(&again.routes)
        return
    p.repeat = again.routes.items[p.limit - 1]
    routes_free(&again.routes)
    routes_free(&p.routes)
    p.at = p.place = 0
    parse_body(p)
    p.error = PARSE_REPEAT
