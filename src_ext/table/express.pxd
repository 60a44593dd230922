"""The entries of the express path's table: the routes of a snapshot, for programs in the kernel.

Owns the layout of the entries in the compiled core; src_ext/express/maps.h describes it. Does not
depend on bpf(2). Threading: as route.pxd.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from table.peer cimport peer_t
from table.route cimport ROUTE_ECN, ROUTE_EXPRESS, route_t, route_vec_t
from table.snapshot cimport hop_t


cdef enum:
    KIND_ROUTE = 0x00
    KIND_OWN = 0x10
    KIND_ADMIT = 0x20
    KIND_BITS = 32
    ENTRY_EXPRESS = 1           # bits of entry_t.flags
    ENTRY_ENDPOINT = 2
    ENTRY_ECN = 4


cdef struct prefix_t:
    uint32_t bits
    uint8_t kind
    uint8_t zero[3]
    uint8_t addr[16]


cdef struct entry_t:
    uint8_t addr[16]
    uint16_t port
    uint8_t family
    uint8_t zero
    uint16_t mtu
    uint8_t flags
    uint8_t zero2


cdef struct endpoint_t:
    uint8_t addr[16]
    uint16_t port
    uint8_t family
    uint8_t zero


cdef struct express_counters_t:
    uint64_t sent_packets
    uint64_t sent_bytes
    uint64_t received_packets
    uint64_t received_bytes
    uint64_t last_seen_ns


cdef inline express_counters_t summed(
    const express_counters_t* counted, uint32_t cpus_n
) noexcept nogil:
    """Return the counters of one peer, summed over the CPUs."""
    cdef express_counters_t total
    cdef uint32_t i
    memset(&total, 0, sizeof(total))
    for i in range(cpus_n):
        total.sent_packets += counted[i].sent_packets
        total.sent_bytes += counted[i].sent_bytes
        total.received_packets += counted[i].received_packets
        total.received_bytes += counted[i].received_bytes
        if counted[i].last_seen_ns > total.last_seen_ns:
            total.last_seen_ns = counted[i].last_seen_ns
    return total


cdef inline void set_prefix(
    prefix_t* key, uint8_t kind, const uint8_t* addr, uint8_t family, uint32_t length
) noexcept nogil:
    """Set a key. ``addr`` has 4 or 16 bytes."""
    memset(key, 0, sizeof(prefix_t))
    key.kind = kind | family
    key.bits = KIND_BITS + length
    memcpy(key.addr, addr, 4 if family == 4 else 16)


cdef inline bint any_express(const route_vec_t* routes) noexcept nogil:
    """Return whether a peer of any route can receive in the kernel."""
    cdef size_t i
    for i in range(routes.n):
        if routes.items[i].flags & ROUTE_EXPRESS:
            return True
    return False


cdef inline void route_entries(
    const route_vec_t* routes, const hop_t* hops, prefix_t* keys, entry_t* entries
) noexcept nogil:
    """Write the key and the entry of each route. hops, keys and entries have one element each per
    route."""
    cdef const route_t* route
    cdef entry_t* entry
    cdef size_t i
    for i in range(routes.n):
        route = &routes.items[i]
        entry = &entries[i]
        set_prefix(&keys[i], KIND_ROUTE, route.dst, route.dst_family, route.dst_len)
        memset(entry, 0, sizeof(entry_t))
        memcpy(entry.addr, route.via, 16)
        entry.port = route.port
        entry.family = route.via_family
        entry.mtu = route.mtu
        if route.flags & ROUTE_EXPRESS:
            entry.flags |= ENTRY_EXPRESS
        if route.flags & ROUTE_ECN:
            entry.flags |= ENTRY_ECN
        if hops[i].has_endpoint:
            entry.flags |= ENTRY_ENDPOINT
