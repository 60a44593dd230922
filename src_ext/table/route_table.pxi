"""RouteTable: the master copy of the routes, as the control side handles it.

Owns: a sorted vector of routes in C memory, and the words of a parser's errors. Refuses to know:
who forwards by it; a snapshot for the workers is made from it elsewhere.

Threading: one thread at a time. What takes time that grows with the table releases the GIL, so
other threads run meanwhile, but they may not touch the same table.
"""

import json

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from table.route_text cimport (
    PARSE_BODY, PARSE_NO_MEMORY, PARSE_REPEAT, ROUTE_TEXT_MAX, parse_routes, parse_t,
    write_addr, write_prefix, write_route_json, write_route_text,
)
from table.routes cimport (
    ROUTE_ADDED, ROUTE_CHANGED, route_diff_t, route_edit_t, route_same, route_t, route_vec_t,
    routes_copy, routes_diff, routes_find, routes_free, routes_insert, routes_remove,
)

from udptun.errors import FieldError, RouteExists
from udptun.model import Route, parse_prefix as parse_dst

JSON_BODY = 'JSON {"routes": [{"dst", "via", "port"?, "mtu"?}, ...]}'
LONGEST_ROUTE = 65536  # bytes of a wrong route that are still looked into for the words


def _each_key_once(where):
    """A hook for json.loads, which would silently take the last of two equal keys."""
    def hook(pairs):
        members = {}
        for name, value in pairs:
            if name in members:
                raise FieldError("route", name, "each key once", where)
            members[name] = value
        return members
    return hook


cdef object explain_route(bytes span, bint json_text, str where):
    """The FieldError for a route that the parser refused, in the words of model.Route."""
    excerpt = span[:60].decode("utf-8", "replace")
    if len(span) <= LONGEST_ROUTE:
        try:
            if json_text:
                value = json.loads(span, object_pairs_hook=_each_key_once(where))
                Route.from_json(value, where)
            else:
                Route.from_words([w.decode("utf-8", "replace") for w in span.split()], where)
        except FieldError as error:
            return error
        except ValueError:  # a number with more digits than int() takes
            pass
    return FieldError("route", excerpt, "a route of the usual length", where)


cdef object explain(const parse_t* p):
    """The exception that says what parse_routes() found."""
    cdef uint8_t prefix[ROUTE_TEXT_MAX]
    if p.error == PARSE_NO_MEMORY:
        return MemoryError("no memory for the routes")
    if p.error == PARSE_BODY:
        excerpt = p.text[p.span_from:min(p.span_from + 20, p.n)].decode("utf-8", "replace")
        return FieldError("body", excerpt, JSON_BODY, f"byte {p.span_from}")
    where = f"routes[{p.place}]" if p.json else f"line {p.place}"
    if p.error == PARSE_REPEAT:
        return FieldError("dst", prefix[:write_prefix(prefix, &p.repeat)].decode(),
                          "each prefix once", where)
    return explain_route(p.text[p.span_from:p.span_to], p.json, where)


cdef void pack_prefix(route_t* route, object network):
    """The destination of a zeroed route."""
    cdef bytes packed = network.network_address.packed
    memcpy(route.dst, <const char*>packed, len(packed))
    route.dst_family = network.version
    route.dst_len = network.prefixlen


cdef tuple unpack_route(const route_t* route):
    cdef uint8_t text[ROUTE_TEXT_MAX]
    dst = text[:write_prefix(text, route)].decode()
    via = text[:write_addr(text, route.via_family, route.via)].decode()
    return dst, via, route.port, route.mtu or None


cdef class RouteTable:
    """Routes, sorted by prefix, each prefix once.

    A row is ``(dst, via, port, mtu)``: text, text, number, number or None.
    """

    cdef route_vec_t vec
    # Counts the changes put in force; set by the owner, kept by copy().
    cdef readonly unsigned long long generation

    def __cinit__(self):
        memset(&self.vec, 0, sizeof(self.vec))
        self.generation = 0

    def __dealloc__(self):
        routes_free(&self.vec)

    def __len__(self):
        return self.vec.n

    @staticmethod
    def parse_json(const uint8_t[::1] body not None):
        """From ``{"routes": [{"dst", "via", "port"?, "mtu"?}, ...]}``; raises FieldError."""
        return parse_table(body, True)

    @staticmethod
    def parse_text(const uint8_t[::1] body not None):
        """From a route file, ``DST via IP [port P] [mtu M]`` a line; raises FieldError."""
        return parse_table(body, False)

    def copy(self):
        cdef RouteTable table = RouteTable()
        cdef int status
        table.generation = self.generation
        with nogil:
            status = routes_copy(&table.vec, &self.vec)
        if status < 0:
            raise MemoryError("no memory for the routes")
        return table

    def set(self, dst, via, port, mtu=None, bint replace=False):
        """Add a route, or change it if ``replace``: "added", "changed" or "same".

        Raises FieldError, and RouteExists if ``replace`` is not set and the prefix has another
        next hop.
        """
        cdef route_t route
        cdef size_t at
        cdef bint found
        cdef int status
        cdef bytes packed
        checked = Route.make(dst, via, port, mtu)
        memset(&route, 0, sizeof(route))
        pack_prefix(&route, checked.dst)
        packed = checked.via.packed
        memcpy(route.via, <const char*>packed, len(packed))
        route.via_family = checked.via.version
        route.port = checked.port
        route.mtu = checked.mtu or 0
        found = routes_find(&self.vec, &route, &at)
        if not found:
            with nogil:
                status = routes_insert(&self.vec, at, &route)
            if status < 0:
                raise MemoryError("no memory for the routes")
            return "added"
        if route_same(&self.vec.items[at], &route):
            return "same"
        if not replace:
            raise RouteExists(f"There is a route already: {Route.make(*self.row(at))}.")
        self.vec.items[at] = route
        return "changed"

    def delete(self, dst):
        """Whether there was a route to exactly this prefix."""
        cdef route_t key
        cdef size_t at
        cdef bint found
        memset(&key, 0, sizeof(key))
        pack_prefix(&key, parse_dst("dst", dst))
        found = routes_find(&self.vec, &key, &at)
        if found:
            with nogil:
                routes_remove(&self.vec, at)
        return found

    def get(self, dst):
        """The row of exactly this prefix, or None."""
        cdef route_t key
        cdef size_t at
        memset(&key, 0, sizeof(key))
        pack_prefix(&key, parse_dst("dst", dst))
        if routes_find(&self.vec, &key, &at):
            return unpack_route(&self.vec.items[at])
        return None

    def row(self, size_t index):
        if index >= self.vec.n:
            raise IndexError("no route of that index")
        return unpack_route(&self.vec.items[index])

    def diff_from(self, RouteTable old not None):
        """How many routes were (added, changed, removed) since ``old``."""
        cdef route_diff_t diff
        with nogil:
            diff = routes_diff(&old.vec, &self.vec, NULL, 0)
        return diff.added, diff.changed, diff.removed

    def changes_from(self, RouteTable old not None, size_t limit):
        """The first ``limit`` changes since ``old``: ``(kind, dst, via, port, mtu)``.

        kind is "added", "changed" (with the new next hop) or "removed" (with the old one).
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
                changes.append((kind, *unpack_route(edits[i].route)))
            return changes
        finally:
            free(edits)

    def json_slice(self, size_t start, size_t count):
        """JSON objects of up to ``count`` routes from ``start`` on, with commas between."""
        return write_slice(self, start, count, True)

    def text_slice(self, size_t start, size_t count):
        """Route-file lines of up to ``count`` routes from ``start`` on."""
        return write_slice(self, start, count, False)

    def sizeof(self):
        """Bytes of C memory held."""
        return self.vec.cap * sizeof(route_t)


cdef RouteTable parse_table(const uint8_t[::1] body, bint json_text):
    cdef RouteTable table = RouteTable()
    cdef parse_t p
    memset(&p, 0, sizeof(p))
    p.n = len(body)
    p.text = <const uint8_t*>b""
    if p.n:
        p.text = &body[0]
    p.json = json_text
    with nogil:
        parse_routes(&p)
        if p.error:
            routes_free(&p.routes)
    if p.error:
        raise explain(&p)
    table.vec = p.routes
    return table


cdef bytes write_slice(RouteTable table, size_t start, size_t count, bint json_text):
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
            if not json_text:
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
