"""Routes in C memory: one route, and the sorted vector of a whole table.

Owns: the layout of a route, the order of a table, and the operations that depend on that order
(search, insert, remove, difference). Does not depend on text forms (text.pxd, json.pxd), look-up by
address (lpm.pxd) or Python.

The order of a table is by family, then by destination bytes, then by prefix length. So a prefix
comes before every prefix inside it, and no two routes of a table compare equal.

Threading: no locks. Any number of threads may read a vector while no thread changes the vector.
"""

from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove, memset

from limits cimport MIN_MTU6
from sys cimport sched_yield
from wire.headers cimport load_be64


ctypedef struct route_t:
    # Addresses are in network order. An IPv4 address is in the first 4 bytes. All unused bytes are
    # zero, so that memcmp can compare two whole routes.
    uint8_t dst[16]
    uint8_t via[16]
    uint8_t dst_family      # 4 or 6
    uint8_t dst_len         # prefix length in bits
    uint8_t via_family      # 4 or 6
    uint8_t flags           # ROUTE_PROBE, ROUTE_EXPRESS, ROUTE_ECN
    uint16_t port           # host order
    uint16_t mtu            # bytes; 0 = none
    uint16_t source_first   # the peer may also send from this port to source_last; 0: from none
    uint16_t source_last    # 1 and 65535: any port; 0 and 0: none


ctypedef struct route_vec_t:
    route_t* items          # owned
    size_t n
    size_t cap


cdef enum:                  # bits of route_t.flags
    ROUTE_PROBE = 1         # the peer answers probes
    ROUTE_EXPRESS = 2       # the peer can receive in the kernel, and may send from there
    ROUTE_ECN = 4           # the peer copies the congestion marks of the path to the packets


cdef enum route_change_t:
    ROUTE_ADDED = 0
    ROUTE_CHANGED = 1
    ROUTE_REMOVED = 2


ctypedef struct route_diff_t:
    size_t added
    size_t changed
    size_t removed


ctypedef struct route_edit_t:
    const route_t* route    # the new route, or the removed one; borrowed from its vector
    route_change_t change


cdef inline void routes_free(route_vec_t* vec) noexcept nogil:
    """Free the routes and empty the vector."""
    free(vec.items)
    memset(vec, 0, sizeof(route_vec_t))


cdef inline int routes_reserve(route_vec_t* vec, size_t cap) noexcept nogil:
    """Make space for at least ``cap`` routes. If the vector must grow, at least double its size.
    Return 0, or -1 if there is no memory."""
    cdef route_t* items
    if cap <= vec.cap:
        return 0
    if cap < vec.cap * 2:
        cap = vec.cap * 2
    items = <route_t*>realloc(vec.items, cap * sizeof(route_t))
    if items == NULL:
        return -1
    vec.items = items
    vec.cap = cap
    return 0


cdef inline int routes_append(route_vec_t* vec, const route_t* route) noexcept nogil:
    """Add a route at the end; the order may be wrong. Return 0, or -1 if there is no memory."""
    if vec.n == vec.cap and routes_reserve(vec, 16 if vec.n == 0 else vec.n * 2) < 0:
        return -1
    vec.items[vec.n] = route[0]
    vec.n += 1
    return 0


cdef inline int routes_copy(route_vec_t* target, const route_vec_t* source) noexcept nogil:
    """Copy ``source`` into the empty ``target``. Return 0, or -1 if there is no memory."""
    if source.n == 0:
        return 0
    if routes_reserve(target, source.n) < 0:
        return -1
    memcpy(target.items, source.items, source.n * sizeof(route_t))
    target.n = source.n
    return 0


cdef inline int route_order(const route_t* a, const route_t* b) noexcept nogil:
    """Compare the prefixes of a and b. Return a negative number if a comes first, 0 if the prefixes
    are equal, a positive number if b comes first."""
    cdef uint64_t left = load_be64(a.dst), right = load_be64(b.dst)
    if a.dst_family != b.dst_family:
        return <int>a.dst_family - <int>b.dst_family
    if left == right:
        left = load_be64(a.dst + 8)
        right = load_be64(b.dst + 8)
    if left != right:
        return -1 if left < right else 1
    return <int>a.dst_len - <int>b.dst_len


cdef inline bint route_same(const route_t* a, const route_t* b) noexcept nogil:
    """Return whether all fields of two routes are equal."""
    return memcmp(a, b, sizeof(route_t)) == 0


cdef inline bint route_valid(const route_t* route) noexcept nogil:
    """Return whether the combination of fields is valid, by the rules of model.Route.make.

    The next hop must be a unicast address. The MTU of an IPv6 route must not be below the
    minimum of RFC 8200 section 5. The parsers check the range of each field.
    """
    cdef const uint8_t* via = &route.via[0]
    cdef int i
    if route.dst_family == 6 and route.mtu != 0 and route.mtu < MIN_MTU6:
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


cdef inline int routes_sort(route_vec_t* vec) noexcept nogil:
    """Sort into table order. Return 0. If there is no memory, return -1 and change nothing.

    This is a stable merge sort. A table that is already in order, for example one that udptun
    wrote, takes one pass. The sort yields the CPU between passes, so that a worker that waits for
    the CPU can run.
    """
    cdef route_t* source = vec.items
    cdef route_t* target
    cdef route_t* spare
    cdef route_t held
    cdef size_t n = vec.n, width = 8, i, j, low, middle, high, left, right
    i = 1
    while i < n and route_order(&source[i - 1], &source[i]) <= 0:
        i += 1
    if i >= n:
        return 0
    target = <route_t*>malloc(n * sizeof(route_t))
    if target == NULL:
        return -1
    spare = target
    low = 0
    while low < n:
        high = low + width if low + width < n else n
        for i in range(low + 1, high):
            held = source[i]
            j = i
            while j > low and route_order(&source[j - 1], &held) > 0:
                source[j] = source[j - 1]
                j -= 1
            source[j] = held
        low = high
    while width < n:
        sched_yield()
        low = 0
        while low < n:
            middle = low + width if low + width < n else n
            high = middle + width if middle + width < n else n
            left = low
            right = middle
            for i in range(low, high):
                if left < middle and (right == high
                                      or route_order(&source[left], &source[right]) <= 0):
                    target[i] = source[left]
                    left += 1
                else:
                    target[i] = source[right]
                    right += 1
            low = high
        source, target = target, source
        width *= 2
    if source == spare:
        memcpy(vec.items, source, n * sizeof(route_t))
    free(spare)
    return 0


cdef inline size_t routes_first_repeat(const route_vec_t* vec) noexcept nogil:
    """Return the index of the first route of a sorted vector that repeats a prefix; vec.n if no
    route does."""
    cdef size_t i
    for i in range(1, vec.n):
        if route_order(&vec.items[i - 1], &vec.items[i]) == 0:
            return i
    return vec.n


cdef inline bint routes_find(
    const route_vec_t* vec, const route_t* key, size_t* at
) noexcept nogil:
    """Return whether the key's prefix is in the table. Set ``at`` to the index of the prefix, or to
    the index at which to insert it."""
    cdef size_t low = 0, high = vec.n, middle
    while low < high:
        middle = low + (high - low) // 2
        if route_order(&vec.items[middle], key) < 0:
            low = middle + 1
        else:
            high = middle
    at[0] = low
    return low < vec.n and route_order(&vec.items[low], key) == 0


cdef inline int routes_insert(
    route_vec_t* vec, size_t at, const route_t* route
) noexcept nogil:
    """Insert a route at index ``at`` (0..n), the result of routes_find. Return 0, or -1 without
    memory."""
    if vec.n == vec.cap and routes_reserve(vec, 16 if vec.n == 0 else vec.n * 2) < 0:
        return -1
    memmove(&vec.items[at + 1], &vec.items[at], (vec.n - at) * sizeof(route_t))
    vec.items[at] = route[0]
    vec.n += 1
    return 0


cdef inline void routes_remove(route_vec_t* vec, size_t at) noexcept nogil:
    """Remove the route at index ``at``."""
    memmove(&vec.items[at], &vec.items[at + 1], (vec.n - at - 1) * sizeof(route_t))
    vec.n -= 1


cdef inline route_diff_t routes_diff(
    const route_vec_t* old, const route_vec_t* new, route_edit_t* edits, size_t limit
) noexcept nogil:
    """Count the changes from ``old`` to ``new``, both sorted. Store the first ``limit`` changes.

    edits  space for ``limit`` edits, filled in table order; may be NULL if ``limit`` is 0
    """
    cdef route_diff_t diff
    cdef size_t i = 0, j = 0, k = 0
    cdef int order
    cdef route_change_t change
    cdef const route_t* route
    memset(&diff, 0, sizeof(diff))
    while i < old.n or j < new.n:
        if i == old.n:
            order = 1
        elif j == new.n:
            order = -1
        else:
            order = route_order(&old.items[i], &new.items[j])
        if order < 0:
            diff.removed += 1
            change = ROUTE_REMOVED
            route = &old.items[i]
            i += 1
        elif order > 0:
            diff.added += 1
            change = ROUTE_ADDED
            route = &new.items[j]
            j += 1
        else:
            route = &new.items[j]
            i += 1
            j += 1
            if route_same(&old.items[i - 1], route):
                continue
            diff.changed += 1
            change = ROUTE_CHANGED
        if k < limit:
            edits[k].route = route
            edits[k].change = change
            k += 1
    return diff
