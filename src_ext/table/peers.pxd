"""Peers, and the snapshot of everything a worker looks up.

Owns ``peer_t`` (one underlay endpoint, alive while a route or a worker may still point to it) and
``snapshot_t`` (routes, next hops, peers by address, our own addresses: immutable once published).

Threading: the control side builds a snapshot aside and swaps one pointer; workers load that
pointer once a turn and never lock. ``path_mtu`` is the one field of a peer that workers write;
each worker counts in its own ``peer_counters_t``.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

from sys cimport AF_INET, AF_INET6, load_ptr, sockaddr_in, sockaddr_in6
from table.lpm cimport lpm_free, lpm_lookup4, lpm_lookup6, lpm_t
from wire.headers cimport load_be32, load_u32, load_u64, swap16


cdef struct peer_counters_t:
    uint64_t encap_packets
    uint64_t encap_bytes
    uint64_t decap_packets
    uint64_t decap_bytes
    uint64_t last_seen_ns       # monotonic; 0 = never
    uint64_t unused[3]          # a cache line of its own


cdef struct peer_t:
    uint8_t addr[16]            # network order; IPv4 in the first four, the rest zero
    uint8_t addr_len            # 4 or 16
    uint16_t port               # host order
    uint32_t overhead           # outer IP and UDP header: 28 or 48
    uint32_t link_mtu           # of the underlay interface, outer bytes
    uint32_t path_mtu           # outer bytes; <= link_mtu
    uint64_t path_mtu_ns        # when it was learned; 0 = it is the link's
    uint32_t said_mtu           # control side: the path MTU last told to subscribers
    uint64_t mark               # control side: the generation that last used it
    uint32_t ordinal            # control side: its place among that generation's peers
    uint32_t sa_len
    sockaddr_in6 sa             # large enough for sockaddr_in
    # The next peer at this address, by rising port: whatever mix of old and new links a reader
    # meets, the walk ends.
    peer_t* same_addr
    peer_t* building            # control side: same_addr of the snapshot being built
    peer_counters_t* counters   # one a worker


cdef struct hop_t:
    peer_t* peer
    uint32_t mtu                # inner bytes; 0 = none given


cdef struct addr_slot_t:
    uint8_t addr[16]
    uint8_t addr_len            # 0 = empty
    peer_t* peer                # NULL in a set of plain addresses


cdef struct addr_map_t:
    addr_slot_t* slots
    uint32_t mask               # slots - 1; a power of two, at most half full


cdef struct snapshot_t:
    lpm_t* lpm
    hop_t* hops                 # by look-up value - 1
    size_t hops_n
    addr_map_t peers            # by outer address: the first of same_addr
    addr_map_t own              # inner sources that only we may have
    size_t peers_n
    uint64_t generation         # of publishing; rises by 1


cdef inline uint32_t addr_hash(const uint8_t* addr, size_t addr_len) noexcept nogil:
    """Mix an address; only addresses that an operator configured are ever inserted."""
    cdef uint64_t h
    if addr_len == 4:
        h = load_u32(addr)
    else:
        h = load_u64(addr) ^ (load_u64(addr + 8) * <uint64_t>0x9E3779B97F4A7C15)
    h *= <uint64_t>0xD6E8FEB86659FD93
    return <uint32_t>(h >> 32)


cdef inline int addr_map_init(addr_map_t* m, size_t n) noexcept nogil:
    """Room for n addresses. Returns -1 without memory."""
    cdef uint32_t size = 8
    while size < 2 * n:
        size *= 2
    m.slots = <addr_slot_t*>calloc(size, sizeof(addr_slot_t))
    m.mask = size - 1
    return 0 if m.slots != NULL else -1


cdef inline addr_slot_t* addr_map_find(
    const addr_map_t* m, const uint8_t* addr, size_t addr_len
) noexcept nogil:
    """The slot that holds the address, or the empty one where it would go."""
    cdef uint32_t i = addr_hash(addr, addr_len) & m.mask
    cdef addr_slot_t* slot
    while True:
        slot = &m.slots[i]
        if slot.addr_len == 0:
            return slot
        if slot.addr_len == addr_len and memcmp(slot.addr, addr, addr_len) == 0:
            return slot
        i = (i + 1) & m.mask


cdef inline addr_slot_t* addr_map_put(
    addr_map_t* m, const uint8_t* addr, size_t addr_len
) noexcept nogil:
    """The address's slot, taken now if it was empty."""
    cdef addr_slot_t* slot = addr_map_find(m, addr, addr_len)
    if slot.addr_len == 0:
        memcpy(slot.addr, addr, addr_len)
        slot.addr_len = <uint8_t>addr_len
    return slot


cdef inline int addr_map_grow(addr_map_t* m) noexcept nogil:
    """Double the room. Returns -1 without memory; the map is then as it was."""
    cdef addr_map_t bigger
    cdef uint32_t i
    if addr_map_init(&bigger, m.mask + 1) < 0:
        return -1
    for i in range(m.mask + 1):
        if m.slots[i].addr_len != 0:
            addr_map_put(&bigger, m.slots[i].addr, m.slots[i].addr_len).peer = m.slots[i].peer
    free(m.slots)
    m[0] = bigger
    return 0


cdef inline hop_t* find_hop(
    const snapshot_t* s, const uint8_t* addr, size_t addr_len
) noexcept nogil:
    """The next hop towards an inner address, or NULL: no route."""
    cdef uint32_t value
    if addr_len == 4:
        value = lpm_lookup4(s.lpm, load_be32(addr))
    else:
        value = lpm_lookup6(s.lpm, addr)
    return &s.hops[value - 1] if value != 0 else NULL


cdef inline uint32_t path_limit(const hop_t* hop) noexcept nogil:
    """Return the largest inner packet that the route and the path to its peer allow."""
    cdef uint32_t limit = hop.peer.path_mtu - hop.peer.overhead
    return hop.mtu if hop.mtu != 0 and hop.mtu < limit else limit


cdef inline peer_t* find_peer(
    const snapshot_t* s, const uint8_t* addr, size_t addr_len, uint16_t port
) noexcept nogil:
    """The peer at an outer address: the one with this port, else the first; NULL if none."""
    cdef peer_t* first = addr_map_find(&s.peers, addr, addr_len).peer
    cdef peer_t* peer = first
    while peer != NULL:
        if peer.port == port:
            return peer
        peer = <peer_t*>load_ptr(<void**>&peer.same_addr)
    return first


cdef inline bint is_own(
    const snapshot_t* s, const uint8_t* addr, size_t addr_len
) noexcept nogil:
    return addr_map_find(&s.own, addr, addr_len).addr_len != 0


cdef inline peer_t* peer_new(
    const uint8_t* addr, size_t addr_len, uint16_t port, uint32_t link_mtu, uint32_t workers_n
) noexcept nogil:
    """A peer with its counters at zero; NULL without memory. Freed by ``peer_free``."""
    cdef peer_t* peer = <peer_t*>calloc(1, sizeof(peer_t))
    cdef sockaddr_in* sa4
    if peer == NULL:
        return NULL
    peer.counters = <peer_counters_t*>calloc(workers_n, sizeof(peer_counters_t))
    if peer.counters == NULL:
        free(peer)
        return NULL
    memcpy(peer.addr, addr, addr_len)
    peer.addr_len = <uint8_t>addr_len
    peer.port = port
    peer.link_mtu = peer.path_mtu = peer.said_mtu = link_mtu
    if addr_len == 4:
        peer.overhead = 28
        sa4 = <sockaddr_in*>&peer.sa
        sa4.sin_family = AF_INET
        sa4.sin_port = swap16(port)
        memcpy(&sa4.sin_addr, addr, 4)
        peer.sa_len = sizeof(sockaddr_in)
    else:
        peer.overhead = 48
        peer.sa.sin6_family = AF_INET6
        peer.sa.sin6_port = swap16(port)
        memcpy(&peer.sa.sin6_addr, addr, 16)
        peer.sa_len = sizeof(sockaddr_in6)
    return peer


cdef inline void peer_free(peer_t* peer) noexcept nogil:
    if peer != NULL:
        free(peer.counters)
        free(peer)


cdef inline void snapshot_free(snapshot_t* s) noexcept nogil:
    """Free a snapshot that no worker can see. Peers are not its own."""
    if s != NULL:
        if s.lpm != NULL:
            lpm_free(s.lpm)
        free(s.hops)
        free(s.peers.slots)
        free(s.own.slots)
        free(s)
