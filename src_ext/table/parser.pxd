"""The parser of a whole table: its state, its errors, and the check for repeated prefixes.

Owns ``parser_t``. The grammar is in text.pxd (route files) and json.pxd (the control API); each
provides one ``parse_fn``. Parsing needs no GIL, and yields the CPU regularly. So a table of 100,000
routes does not delay a worker on the same CPU.

Does not build error messages. The parser reports which route is wrong and where the text of this
route is. To get the message, route_table.pxi parses this one route with ``udptun.model.Route``,
which accepts the same grammar.

Threading: a parser belongs to one thread; the GIL is not needed.
"""

from libc.stdint cimport uint8_t
from libc.stdlib cimport calloc, free

from sys cimport sched_yield
from table.route cimport (
    route_t, route_vec_t, routes_append, routes_find, routes_first_repeat, routes_free, routes_sort,
)


cdef enum:
    ROUTE_TEXT_MAX = 208        # bytes of the longest route in any text form, rounded up
    YIELD_ROUTES = 512          # routes between two calls of sched_yield(): about 50 us


cdef enum parse_error_t:
    PARSE_OK = 0
    PARSE_ROUTE                 # a route that is not valid
    PARSE_BODY                  # the text at byte error_start is not the expected JSON
    PARSE_REPEAT                # the prefix of ``repeat`` occurs twice
    PARSE_NO_MEMORY


ctypedef struct parser_t:
    const uint8_t* text         # borrowed
    size_t n
    size_t limit                # stop after this many routes
    size_t pos                  # offset of the next byte
    route_vec_t routes          # the result: sorted, each prefix once; the caller frees it
    parse_error_t error
    size_t index                # current route: line number from 1 on, or JSON index from 0 on
    size_t error_start          # text[error_start:error_end] is the wrong route
    size_t error_end
    route_t repeat


# A parse_fn parses ``text`` from ``pos`` on. It appends the routes to ``routes`` in the order of
# the text, or sets ``error``.
ctypedef void (*parse_fn)(parser_t*) noexcept nogil


cdef inline bint add_route(parser_t* p, const route_t* route) noexcept nogil:
    """Append a route. Return whether to continue: False at p.limit, or if there is no memory.

    Yields the CPU every YIELD_ROUTES routes, so that a worker that waits for the CPU can run.
    """
    if p.routes.n % YIELD_ROUTES == 0:
        sched_yield()
    if routes_append(&p.routes, route) < 0:
        p.error = PARSE_NO_MEMORY
    return p.error == PARSE_OK and p.routes.n < p.limit


cdef inline size_t find_repeat(
    const route_vec_t* sorted, const route_vec_t* given
) noexcept nogil:
    """Return the index of the first route in ``given`` that has the same prefix as an earlier one.

    sorted   the same routes in table order
    returns  the length of ``given`` if no prefix is repeated
    """
    cdef uint8_t* seen = <uint8_t*>calloc(sorted.n + 1, 1)
    cdef size_t i = 0, at
    if seen == NULL:
        return given.n
    while i < given.n and routes_find(sorted, &given.items[i], &at) and not seen[at]:
        seen[at] = 1
        i += 1
    free(seen)
    return i


cdef inline void parse_routes(parser_t* p, parse_fn parse_body) noexcept nogil:
    """Parse ``text`` into a sorted table with each prefix once, or set ``error``.

    p   in: text and n are set, all other fields are zero. The caller frees p.routes, also after an
        error
    """
    cdef parser_t again = p[0]
    p.limit = <size_t>-1
    parse_body(p)
    if p.error != PARSE_OK:
        return
    if routes_sort(&p.routes) < 0:
        p.error = PARSE_NO_MEMORY
        return
    if routes_first_repeat(&p.routes) == p.routes.n:
        return
    # Sorting has lost the order of the text. Parse a second time to find the first repeated prefix.
    # Parse a third time, up to the route with this prefix, to find the position of the route.
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
    p.pos = p.index = 0
    parse_body(p)
    p.error = PARSE_REPEAT
