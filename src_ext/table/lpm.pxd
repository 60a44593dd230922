"""Longest prefix match: from an inner destination address to its route.

Owns: the look-up structure, a poptrie: Asai & Ohara, "Poptrie: A Compressed Trie with Population
Count for Fast and Scalable Software IP Routing Table Lookup", SIGCOMM 2015, sections 3.1 to 3.4
(64-way nodes, leaf bit vector, direct pointing). Two additions are ours:

- The bits that all prefixes share are compared once and then skipped. So the /64 prefixes of a
  cluster inside one /48 are no deeper in the trie than its IPv4 /24 prefixes. A default route is
  stored separately, because it would reduce the number of shared bits to 0.
- The width of the direct table depends on the number of routes, so that a table with few routes is
  small and quick to build. The width is also chosen so that the most frequent prefix length ends at
  the boundary of a node.

Both families use the same code. An address is 128 bits in two words. An IPv4 address is in the
upper half of the first word; its second word is a constant 0, for which the compiler emits no code.

Does not depend on next hops, peers or Python. A value is 1 + index into the routes from which the
structure was built; 0 means no route.

Threading: a built structure is immutable, and any number of threads may look up in it without
locks. The owner frees the structure when no thread can use it any more.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memset
from table.route cimport route_t
from wire.headers cimport load_be64


cdef extern from "table/lpm.h" nogil:
    int cpu_has_popcount()
    unsigned int popcount64(uint64_t x, int fast)


cdef enum:
    LPM_STRIDE = 6              # bits that one node decides: 64 slots
    LPM_DIRECT_MAX = 18         # widest direct table: 1 MiB
    LPM_LEAF = 0x80000000       # flag of a direct entry: the entry is a value, not a node's index


ctypedef struct lpm_node_t:
    uint64_t children           # bit i set: slot i is a node; bit i clear: slot i is a leaf
    uint64_t runs               # bit i set: slot i is a leaf, the first of a run of equal leaves
    uint32_t first_leaf         # index of this node's first run in leaves
    uint32_t first_child        # index of this node's first child in nodes


ctypedef struct lpm_trie_t:
    uint64_t shared[2]          # the bits that all prefixes except a default route share
    uint64_t shared_mask[2]
    unsigned int shared_n       # the number of these bits, 0..127
    unsigned int direct_n       # bits of the direct table, 1..LPM_DIRECT_MAX
    uint32_t default_value      # value of the default route, or 0; used if the shared bits differ
    int fast_popcount
    uint32_t* direct            # 1 << direct_n entries, owned
    lpm_node_t* nodes           # owned
    uint32_t* leaves            # owned
    size_t nodes_n
    size_t nodes_cap
    size_t leaves_n
    size_t leaves_cap


cdef struct lpm_t:
    lpm_trie_t v4
    lpm_trie_t v6


# Look-up

cdef inline uint32_t _lpm_descend(
    const lpm_trie_t* trie, uint64_t high, uint64_t low, int fast
) noexcept nogil:
    """Return the value for an address from which the shared bits are removed."""
    cdef uint32_t entry = trie.direct[high >> (64 - trie.direct_n)]
    cdef uint64_t bit
    cdef const lpm_node_t* node
    if entry & LPM_LEAF:
        return entry & ~<uint32_t>LPM_LEAF
    high = high << trie.direct_n | low >> (64 - trie.direct_n)
    low <<= trie.direct_n
    while True:
        node = &trie.nodes[entry]
        bit = <uint64_t>1 << (high >> (64 - LPM_STRIDE))
        if not node.children & bit:
            return trie.leaves[node.first_leaf
                               + popcount64(node.runs & ((bit << 1) - 1), fast) - 1]
        entry = node.first_child + popcount64(node.children & (bit - 1), fast)
        high = high << LPM_STRIDE | low >> (64 - LPM_STRIDE)
        low <<= LPM_STRIDE


cdef inline uint32_t _lpm_lookup(
    const lpm_trie_t* trie, uint64_t high, uint64_t low
) noexcept nogil:
    """Return the value for an address. Compare the shared bits, then look up the other bits."""
    cdef unsigned int skip = trie.shared_n
    if ((high ^ trie.shared[0]) & trie.shared_mask[0]
            | (low ^ trie.shared[1]) & trie.shared_mask[1]):
        return trie.default_value
    if skip >= 64:
        high = low << (skip - 64)
        low = 0
    elif skip:
        high = high << skip | low >> (64 - skip)
        low <<= skip
    if trie.fast_popcount:
        return _lpm_descend(trie, high, low, 1)
    return _lpm_descend(trie, high, low, 0)


cdef inline uint32_t lpm_lookup4(const lpm_t* lpm, uint32_t addr) noexcept nogil:
    """Return the value for an IPv4 address in host order."""
    return _lpm_lookup(&lpm.v4, <uint64_t>addr << 32, 0)


cdef inline uint32_t lpm_lookup6(const lpm_t* lpm, const uint8_t* addr16) noexcept nogil:
    """Return the value for an IPv6 address: 16 bytes in network order, at any alignment."""
    return _lpm_lookup(&lpm.v6, load_be64(addr16), load_be64(addr16 + 8))


# Build

cdef inline uint64_t _lpm_bits(
    const route_t* route, unsigned int off, unsigned int n
) noexcept nogil:
    """Return n (1..63) bits of the destination from bit ``off`` (0..127) on. Bits behind the end of
    the address are zeros."""
    cdef uint64_t high = load_be64(route.dst), low = load_be64(route.dst + 8)
    if off >= 64:
        high = low << (off - 64)
    elif off:
        high = high << off | low >> (64 - off)
    return high >> (64 - n)


cdef inline uint32_t _lpm_new_nodes(lpm_trie_t* trie, size_t n) noexcept nogil:
    """Allocate n consecutive nodes. Return the first index, or LPM_LEAF if there is no memory."""
    cdef size_t at = trie.nodes_n, cap = trie.nodes_cap
    cdef lpm_node_t* nodes
    if at + n > cap:
        cap = 2 * cap + n
        nodes = <lpm_node_t*>realloc(trie.nodes, cap * sizeof(lpm_node_t))
        if nodes == NULL or cap >= LPM_LEAF:
            if nodes != NULL:
                trie.nodes = nodes
            return LPM_LEAF
        trie.nodes = nodes
        trie.nodes_cap = cap
    trie.nodes_n = at + n
    return <uint32_t>at


cdef inline int _lpm_new_leaf(lpm_trie_t* trie, uint32_t value) noexcept nogil:
    """Append a leaf. Return 0, or -1 if there is no memory."""
    cdef uint32_t* leaves
    cdef size_t cap
    if trie.leaves_n == trie.leaves_cap:
        cap = 2 * trie.leaves_cap + 64
        leaves = <uint32_t*>realloc(trie.leaves, cap * sizeof(uint32_t))
        if leaves == NULL:
            return -1
        trie.leaves = leaves
        trie.leaves_cap = cap
    trie.leaves[trie.leaves_n] = value
    trie.leaves_n += 1
    return 0


cdef inline int _lpm_fill(
    lpm_trie_t* trie, uint32_t at, unsigned int depth, const route_t* routes,
    size_t low, size_t high, uint32_t value
) noexcept nogil:
    """Fill node ``at``, which decides the bits from ``depth`` on. Return 0, or -1 if there is no
    memory.

    low, high  routes[low:high] are the routes inside this node's prefix that are longer than
               ``depth``
    value      the value of the longest prefix that covers the whole node

    Recurses at most 128 / LPM_STRIDE deep. In table order, a prefix comes before the prefixes
    inside it. So a later, longer prefix overwrites the slots of an earlier one.
    """
    cdef uint32_t values[64]
    cdef size_t starts[64]
    cdef size_t ends[64]
    cdef lpm_node_t node
    cdef size_t i, slot, span
    cdef unsigned int edge = depth + LPM_STRIDE
    cdef uint32_t child, last = 0
    cdef bint open_run = False
    memset(&node, 0, sizeof(node))
    for slot in range(64):
        values[slot] = value
    for i in range(low, high):
        slot = _lpm_bits(&routes[i], depth, LPM_STRIDE)
        if routes[i].dst_len <= edge:
            span = <size_t>1 << (edge - routes[i].dst_len)
            while span:
                values[slot] = <uint32_t>i + 1
                slot += 1
                span -= 1
        else:
            if not node.children >> slot & 1:
                node.children |= <uint64_t>1 << slot
                starts[slot] = i
            ends[slot] = i + 1
    node.first_leaf = <uint32_t>trie.leaves_n
    for slot in range(64):
        if node.children >> slot & 1:
            continue
        if not open_run or values[slot] != last:
            last = values[slot]
            open_run = True
            node.runs |= <uint64_t>1 << slot
            if _lpm_new_leaf(trie, last) < 0:
                return -1
    if node.children:
        node.first_child = _lpm_new_nodes(trie, popcount64(node.children, 0))
        if node.first_child == LPM_LEAF:
            return -1
    trie.nodes[at] = node
    child = node.first_child
    for slot in range(64):
        if node.children >> slot & 1:
            if _lpm_fill(trie, child, edge, routes, starts[slot], ends[slot],
                         values[slot]) < 0:
                return -1
            child += 1
    return 0


cdef inline void _lpm_share(
    lpm_trie_t* trie, const route_t* first, const route_t* last
) noexcept nogil:
    """Find the bits that all routes from ``first`` to ``last`` share.

    trie.shared_n  in: the shortest prefix length; out: the number of shared bits

    The routes are sorted. So bits that the first and the last route share are shared by all routes.
    """
    cdef uint64_t a[2]
    cdef uint64_t b[2]
    cdef unsigned int n = 0
    a[0], a[1] = load_be64(first.dst), load_be64(first.dst + 8)
    b[0], b[1] = load_be64(last.dst), load_be64(last.dst + 8)
    while n < trie.shared_n and not (a[n >> 6] ^ b[n >> 6]) >> (63 - (n & 63)) & 1:
        trie.shared_mask[n >> 6] |= <uint64_t>1 << (63 - (n & 63))
        n += 1
    trie.shared_n = n
    trie.shared[0] = a[0] & trie.shared_mask[0]
    trie.shared[1] = a[1] & trie.shared_mask[1]


cdef inline unsigned int _lpm_direct_width(
    size_t n, unsigned int most_frequent, unsigned int shared
) noexcept nogil:
    """Return the width of the direct table in bits.

    The table has at most 16 entries per route. The most frequent prefix length ends at the boundary
    of the table or of a node below the table.
    """
    cdef unsigned int widest = LPM_STRIDE, rest = most_frequent - shared
    while widest < LPM_DIRECT_MAX and <size_t>1 << widest < 8 * n:
        widest += 1
    if rest <= widest:
        return rest
    return widest - (widest + LPM_STRIDE * 22 - rest) % LPM_STRIDE


cdef inline int _lpm_build_trie(
    lpm_trie_t* trie, const route_t* routes, size_t low, size_t high
) noexcept nogil:
    """Build the trie of routes[low:high], all of one family. Return 0, or -1 if there is no memory.
    """
    cdef size_t lengths[129]
    cdef size_t i, slot, first, entries
    cdef unsigned int length, edge
    cdef uint32_t at
    cdef void* shrunk
    trie.fast_popcount = cpu_has_popcount()
    trie.direct_n = 1
    if low < high and routes[low].dst_len == 0:
        trie.default_value = <uint32_t>low + 1
        low += 1
    if low < high:
        memset(lengths, 0, sizeof(lengths))
        for i in range(low, high):
            lengths[routes[i].dst_len] += 1
        length = 1
        while not lengths[length]:
            length += 1
        trie.shared_n = length - 1  # the direct table needs at least one bit
        _lpm_share(trie, &routes[low], &routes[high - 1])
        for i in range(1, 129):
            if lengths[i] >= lengths[length]:
                length = <unsigned int>i
        trie.direct_n = _lpm_direct_width(high - low, length, trie.shared_n)
    entries = <size_t>1 << trie.direct_n
    edge = trie.shared_n + trie.direct_n
    trie.direct = <uint32_t*>malloc(entries * sizeof(uint32_t))
    trie.nodes_cap = (high - low) // 2 + 4
    trie.nodes = <lpm_node_t*>malloc(trie.nodes_cap * sizeof(lpm_node_t))
    if trie.direct == NULL or trie.nodes == NULL:
        return -1
    for slot in range(entries):
        trie.direct[slot] = trie.default_value | LPM_LEAF
    i = low
    while i < high:
        slot = _lpm_bits(&routes[i], trie.shared_n, trie.direct_n)
        if routes[i].dst_len <= edge:
            entries = <size_t>1 << (edge - routes[i].dst_len)
            for first in range(slot, slot + entries):
                trie.direct[first] = (<uint32_t>i + 1) | LPM_LEAF
            i += 1
            continue
        first = i
        while (i < high and routes[i].dst_len > edge
               and _lpm_bits(&routes[i], trie.shared_n, trie.direct_n) == slot):
            i += 1
        at = _lpm_new_nodes(trie, 1)
        if at == LPM_LEAF:
            return -1
        if _lpm_fill(trie, at, edge, routes, first, i,
                     trie.direct[slot] & ~<uint32_t>LPM_LEAF) < 0:
            return -1
        trie.direct[slot] = at
    # Shrink the arrays to their content. If realloc fails, the larger block stays valid.
    shrunk = realloc(trie.nodes, (trie.nodes_n + 1) * sizeof(lpm_node_t))
    if shrunk != NULL:
        trie.nodes = <lpm_node_t*>shrunk
        trie.nodes_cap = trie.nodes_n + 1
    shrunk = realloc(trie.leaves, (trie.leaves_n + 1) * sizeof(uint32_t))
    if shrunk != NULL:
        trie.leaves = <uint32_t*>shrunk
        trie.leaves_cap = trie.leaves_n + 1
    return 0


cdef inline void _lpm_free_trie(lpm_trie_t* trie) noexcept nogil:
    free(trie.direct)
    free(trie.nodes)
    free(trie.leaves)


cdef inline void lpm_free(lpm_t* lpm) noexcept nogil:
    """Free the look-up structure. NULL is allowed."""
    if lpm != NULL:
        _lpm_free_trie(&lpm.v4)
        _lpm_free_trie(&lpm.v6)
        free(lpm)


cdef inline lpm_t* lpm_build(const route_t* routes, size_t n) noexcept nogil:
    """Build the look-up structure of a sorted table without repeated prefixes.

    routes   borrowed during the call
    returns  the structure, owned by the caller; NULL if there is no memory, or if there are 2**31
             or more routes
    """
    cdef size_t n4 = 0, high = n, middle
    cdef lpm_t* lpm
    if n >= LPM_LEAF - 1:
        return NULL
    while n4 < high:
        middle = n4 + (high - n4) // 2
        if routes[middle].dst_family == 4:
            n4 = middle + 1
        else:
            high = middle
    lpm = <lpm_t*>calloc(1, sizeof(lpm_t))
    if lpm == NULL:
        return NULL
    if (_lpm_build_trie(&lpm.v4, routes, 0, n4) < 0
            or _lpm_build_trie(&lpm.v6, routes, n4, n) < 0):
        lpm_free(lpm)
        return NULL
    return lpm


cdef inline size_t _lpm_trie_bytes(const lpm_trie_t* trie) noexcept nogil:
    return ((sizeof(uint32_t) << trie.direct_n) + trie.nodes_cap * sizeof(lpm_node_t)
            + trie.leaves_cap * sizeof(uint32_t))


cdef inline size_t lpm_bytes(const lpm_t* lpm) noexcept nogil:
    """Return the bytes of memory that the structure uses."""
    return sizeof(lpm_t) + _lpm_trie_bytes(&lpm.v4) + _lpm_trie_bytes(&lpm.v6)
