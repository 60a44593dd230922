"""RouteTable: the table of routes that the control side reads and changes.

Owns: a sorted vector of routes in C memory, and the messages of parse errors. Does not depend on
snapshots or workers; Core makes a snapshot from a table.

Threading: only one thread at a time may use a table. Methods whose time grows with the table
release the GIL. Other threads can run during such a call, but must not use the same table.
"""

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from limits cimport MAX_MTU, MAX_PORT, MIN_MTU
from table.address cimport write_addr, write_prefix
from table.json cimport parse_json, write_route_json
from table.parser cimport (
    PARSE_BODY, PARSE_NO_MEMORY, PARSE_REPEAT, ROUTE_TEXT_MAX, find_repeat, parse_routes, parser_t,
)
from table.route cimport (
    ROUTE_ADDED, ROUTE_CHANGED, ROUTE_ECN, ROUTE_EXPRESS, ROUTE_PROBE, route_diff_t, route_edit_t,
    route_same, route_t, route_valid, route_vec_t, routes_append, routes_copy, routes_diff,
    routes_find, routes_first_repeat, routes_free, routes_insert, routes_remove, routes_sort,
)
from table.text cimport parse_text, write_route_text

from udptun.errors import FieldError, RouteExists
from udptun.model import Route

JSON_BODY = 'JSON {"routes": [{"dst", "via", "port"?, "mtu"?, "source_port"?, "probe"?, ' \
            '"express"?, "ecn"?}, ...]}'
LONGEST_ROUTE = 65536  # bytes; if a wrong route is longer, the error does not name the field


def _refuse_repeated_keys(where):
    """Return a hook with which json.loads refuses repeated keys. Without the hook, json.loads
    silently uses the last of two equal keys."""
    def hook(pairs):
        members = {}
        for name, value in pairs:
            if name in members:
                raise FieldError("route", name, "each key once", where)
            members[name] = value
        return members
    return hook


cdef object route_error(bytes text, bint is_json, str where):
    """Return the FieldError for a route that the parser refused, with model.Route's message."""
    excerpt = text[:60].decode("utf-8", "replace")
    if len(text) <= LONGEST_ROUTE:
        try:
            if is_json:
                value = json.loads(text, object_pairs_hook=_refuse_repeated_keys(where))
                Route.from_json(value, where)
            else:
                Route.from_words([w.decode("utf-8", "replace") for w in text.split()], where)
        except FieldError as error:
            return error
        except ValueError:  # a number with more digits than int() accepts
            pass
    return FieldError("route", excerpt, "a shorter text of the route", where)


cdef object parse_error(const parser_t* p, bint is_json):
    """Return the exception for the error that parse_routes() found."""
    cdef uint8_t prefix[ROUTE_TEXT_MAX]
    if p.error == PARSE_NO_MEMORY:
        return MemoryError("no memory for the routes")
    if p.error == PARSE_BODY:
        excerpt = p.text[p.error_start:min(p.error_start + 20, p.n)].decode("utf-8", "replace")
        return FieldError("body", excerpt, JSON_BODY, f"byte {p.error_start}")
    where = f"routes[{p.index}]" if is_json else f"line {p.index}"
    if p.error == PARSE_REPEAT:
        return FieldError("dst", prefix[:write_prefix(prefix, &p.repeat)].decode(),
                          "each prefix once", where)
    return route_error(p.text[p.error_start:p.error_end], is_json, where)


cdef void pack_prefix(route_t* route, object network):
    """Set the destination of a route. Before the call, all bytes of the route are zero."""
    cdef bytes packed = network.network_address.packed
    memcpy(route.dst, <const char*>packed, len(packed))
    route.dst_family = network.version
    route.dst_len = network.prefixlen


cdef object pack_route(route_t* route, object given):
    """Write a model.Route as a route_t. Raise FieldError if a field is out of its range.

    A Route can be made without Route.make(), so the ranges are checked here again.
    """
    cdef bytes packed = given.via.packed
    memset(route, 0, sizeof(route_t))
    pack_prefix(route, given.dst)
    memcpy(route.via, <const char*>packed, len(packed))
    route.via_family = given.via.version
    first, last = given.source_port or (0, 0)
    if 0 < given.port <= MAX_PORT and (given.mtu is None or MIN_MTU <= given.mtu <= MAX_MTU) \
            and (given.source_port is None or 0 < first <= last <= MAX_PORT):
        route.port = given.port
        route.mtu = given.mtu or 0
        route.source_first, route.source_last = first, last
        route.flags = (
            (ROUTE_PROBE if given.probe else 0) | (ROUTE_EXPRESS if given.express else 0)
            | (ROUTE_ECN if given.ecn else 0))
        if route_valid(route) and (route.via_family == 4 or given.via.scope_id is None):
            return
    # Route.make raises the error that names the field.
    Route.make(str(given.dst), str(given.via), given.port, given.mtu, given.probe,
               given.source_port and f"{first}-{last}", given.express, given.ecn)
    raise FieldError("route", given, "a valid route")


cdef tuple source_port(const route_t* route):
    return (route.source_first, route.source_last) if route.source_last else None


cdef object unpack_route(const route_t* route):
    """Return the model.Route."""
    dst = PyBytes_FromStringAndSize(<const char*>route.dst, 4 if route.dst_family == 4 else 16)
    via = PyBytes_FromStringAndSize(<const char*>route.via, 4 if route.via_family == 4 else 16)
    network = IPv4Network if route.dst_family == 4 else IPv6Network
    address = IPv4Address if route.via_family == 4 else IPv6Address
    return Route(
        network((dst, route.dst_len)), address(via), route.port, route.mtu or None,
        route.flags & ROUTE_PROBE != 0, source_port(route), route.flags & ROUTE_EXPRESS != 0,
        route.flags & ROUTE_ECN != 0,
    )


cdef tuple route_row(const route_t* route):
    """Return (dst, via, port, mtu, probe, source_port, express, ecn) for display. dst and via are
    text; mtu and source_port are None if not set."""
    cdef uint8_t text[ROUTE_TEXT_MAX]
    dst = text[:write_prefix(text, route)].decode()
    via = text[:write_addr(text, route.via_family, route.via)].decode()
    return (dst, via, route.port, route.mtu or None, route.flags & ROUTE_PROBE != 0,
            source_port(route), route.flags & ROUTE_EXPRESS != 0, route.flags & ROUTE_ECN != 0)


cdef class RouteTable:
    """The routes, sorted by prefix, each prefix once.

    Methods for single routes take and return model.Route. Whole tables are parsed and written as
    text.
    """

    cdef route_vec_t vec

    def __cinit__(self):
        memset(&self.vec, 0, sizeof(self.vec))

    def __dealloc__(self):
        routes_free(&self.vec)

    def __len__(self):
        return self.vec.n

    @staticmethod
    def parse_json(const uint8_t[::1] body not None):
        """Parse the JSON of JSON_BODY. Raise FieldError."""
        return parse_table(body, True)

    @staticmethod
    def parse_text(const uint8_t[::1] body not None):
        """Parse a route file: lines of ``udptun.model.ROUTE_WORDS``. Raise FieldError."""
        return parse_table(body, False)

    @staticmethod
    def from_routes(routes):
        """Build a table from model.Route objects. Raise FieldError for a repeated prefix."""
        cdef RouteTable table = RouteTable()
        cdef RouteTable given = RouteTable()
        cdef route_t packed
        cdef size_t repeat
        cdef int status = 0
        for route in routes:
            pack_route(&packed, route)
            if routes_append(&given.vec, &packed) < 0:
                raise MemoryError("no memory for the routes")
        with nogil:
            status = routes_copy(&table.vec, &given.vec)
            if status == 0:
                status = routes_sort(&table.vec)
        if status < 0:
            raise MemoryError("no memory for the routes")
        if routes_first_repeat(&table.vec) < table.vec.n:
            repeat = find_repeat(&table.vec, &given.vec)
            raise FieldError("dst", str(given.route_at(repeat).dst), "each prefix once",
                             f"routes[{repeat}]")
        return table

    cdef const route_vec_t* routes(self) noexcept:
        """Return the routes. The pointer is valid until the next change of the table."""
        return &self.vec

    cdef size_t find_unreachable(self, bint has4, bint has6):
        """Return the index of the first route whose next hop has a family without a listener.

        has4, has6  whether there is a listener of the family
        returns     the number of routes if there is no such route
        """
        cdef size_t i = 0
        with nogil:
            while i < self.vec.n and (has4 if self.vec.items[i].via_family == 4 else has6):
                i += 1
        return i

    def copy(self):
        """Return an independent table with the same routes."""
        cdef RouteTable table = RouteTable()
        cdef int status
        with nogil:
            status = routes_copy(&table.vec, &self.vec)
        if status < 0:
            raise MemoryError("no memory for the routes")
        return table

    def set(self, route, bint replace=False):
        """Add a model.Route. If ``replace``, an existing route to the same prefix is replaced.

        Return "added", "changed", or "same" if the table already has exactly this route. Raise
        FieldError if a value is out of range. Raise RouteExists if ``replace`` is not set and the
        table has another route to the prefix.
        """
        cdef route_t packed
        cdef size_t at
        cdef int status
        pack_route(&packed, route)
        if not routes_find(&self.vec, &packed, &at):
            with nogil:
                status = routes_insert(&self.vec, at, &packed)
            if status < 0:
                raise MemoryError("no memory for the routes")
            return "added"
        if route_same(&self.vec.items[at], &packed):
            return "same"
        if not replace:
            raise RouteExists(f"There is a route already: {unpack_route(&self.vec.items[at])}.")
        self.vec.items[at] = packed
        return "changed"

    def delete(self, dst):
        """Remove the route to exactly this network. Return whether there was one."""
        cdef route_t key
        cdef size_t at
        cdef bint found
        memset(&key, 0, sizeof(key))
        pack_prefix(&key, dst)
        found = routes_find(&self.vec, &key, &at)
        if found:
            with nogil:
                routes_remove(&self.vec, at)
        return found

    def get(self, dst):
        """Return the model.Route to exactly this network, or None."""
        cdef route_t key
        cdef size_t at
        memset(&key, 0, sizeof(key))
        pack_prefix(&key, dst)
        if routes_find(&self.vec, &key, &at):
            return unpack_route(&self.vec.items[at])
        return None

    def route_at(self, size_t index):
        """Return the model.Route at this index in table order."""
        if index >= self.vec.n:
            raise IndexError(f"route {index} of {self.vec.n}")
        return unpack_route(&self.vec.items[index])

    def prefixes(self, size_t start, size_t count):
        """Return the destinations of up to ``count`` routes from index ``start`` on, as text."""
        cdef uint8_t text[ROUTE_TEXT_MAX]
        cdef size_t i
        found = []
        for i in range(start, start + min(count, self.vec.n - min(start, self.vec.n))):
            found.append(text[:write_prefix(text, &self.vec.items[i])].decode())
        return found

    def next_hops(self, size_t start, size_t count):
        """Return the set of next hops, as packed addresses, of up to ``count`` routes from index
        ``start`` on."""
        cdef size_t i
        cdef const route_t* route
        found = set()
        for i in range(start, start + min(count, self.vec.n - min(start, self.vec.n))):
            route = &self.vec.items[i]
            found.add(PyBytes_FromStringAndSize(
                <const char*>route.via, 4 if route.via_family == 4 else 16))
        return found

    def diff_from(self, RouteTable old not None):
        """Return how many routes were (added, changed, removed) since ``old``."""
        cdef route_diff_t diff
        with nogil:
            diff = routes_diff(&old.vec, &self.vec, NULL, 0)
        return diff.added, diff.changed, diff.removed

    def changes_from(self, RouteTable old not None, size_t limit):
        """Return the first ``limit`` changes since ``old``, for display.

        Each change is ``(kind, dst, via, port, mtu, probe, source_port, express, ecn)``, dst and
        via as text.
        kind is "added", "changed" (the other fields are those of the new route) or "removed" (of
        the old route).
        """
        cdef route_diff_t diff
        cdef route_edit_t* edits
        cdef size_t i, n
        limit = min(limit, old.vec.n + self.vec.n)
        edits = <route_edit_t*>malloc((limit + 1) * sizeof(route_edit_t))
        if edits == NULL:
            raise MemoryError("no memory for the changes")
        try:
            with nogil:
                diff = routes_diff(&old.vec, &self.vec, edits, limit)
            n = min(limit, diff.added + diff.changed + diff.removed)
            changes = []
            for i in range(n):
                kind = ("added" if edits[i].change == ROUTE_ADDED
                        else "changed" if edits[i].change == ROUTE_CHANGED else "removed")
                changes.append((kind, *route_row(edits[i].route)))
            return changes
        finally:
            free(edits)

    def json_slice(self, size_t start, size_t count):
        """Return up to ``count`` routes from index ``start`` on: JSON objects, comma-separated."""
        return write_slice(self, start, count, True)

    def text_slice(self, size_t start, size_t count):
        """Return up to ``count`` routes from index ``start`` on, as lines of a route file."""
        return write_slice(self, start, count, False)

    def sizeof(self):
        """Return the bytes of C memory that the table uses."""
        return self.vec.cap * sizeof(route_t)


cdef RouteTable parse_table(const uint8_t[::1] body, bint is_json):
    cdef RouteTable table = RouteTable()
    cdef parser_t p
    memset(&p, 0, sizeof(p))
    p.n = len(body)
    p.text = <const uint8_t*>b""
    if p.n:
        p.text = &body[0]
    with nogil:
        parse_routes(&p, parse_json if is_json else parse_text)
        if p.error:
            routes_free(&p.routes)
    if p.error:
        raise parse_error(&p, is_json)
    table.vec = p.routes
    return table


cdef bytes write_slice(RouteTable table, size_t start, size_t count, bint is_json):
    cdef size_t i, n = 0
    cdef uint8_t* out
    if start >= table.vec.n:
        return b""
    count = min(count, table.vec.n - start)
    out = <uint8_t*>malloc(count * (ROUTE_TEXT_MAX + 1) + 1)
    if out == NULL:
        raise MemoryError("no memory for the text of the routes")
    with nogil:
        for i in range(start, start + count):
            if not is_json:
                n += write_route_text(out + n, &table.vec.items[i])
                continue
            if i > start:
                out[n] = c','
                n += 1
            n += write_route_json(out + n, &table.vec.items[i])
    try:
        return PyBytes_FromStringAndSize(<char*>out, n)
    finally:
        free(out)
