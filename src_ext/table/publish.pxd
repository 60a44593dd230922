"""Build a snapshot from routes, activate the snapshot, and free the snapshot that it replaces.

Owns the control side of ``snapshot_t``: finds or creates the peers that the routes name, swaps the
pointer, and keeps the list of retired snapshots and peers until no worker can see them.

A retired object is freed when every worker is idle or has borrowed a newer generation (as in RCU).
Neither the control side nor a worker blocks. Does not depend on workers: the caller passes the
oldest generation in use.

Threading: one control thread. The functions that can take long run without the GIL.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp

from sys cimport poke32, store_ptr, store_ptr_ordered
from table.addr_map cimport (
    addr_map_find, addr_map_grow, addr_map_init, addr_map_put, addr_slot_t,
)
from table.lpm cimport lpm_build
from table.peer cimport add_counters, peer_counters_t, peer_free, peer_new, peer_t
from table.route cimport ROUTE_ECN, ROUTE_EXPRESS, ROUTE_PROBE, route_t
from table.snapshot cimport (
    find_hop, first_peer_at, hop_t, next_peer, snapshot_free, snapshot_t,
)


cdef struct retired_t:          # a retired object: either a snapshot or a peer
    snapshot_t* snapshot
    peer_t* peer
    uint64_t generation         # generation of the first snapshot without the object
    retired_t* next


# Build


cdef inline bint has_peer(const snapshot_t* s, const peer_t* peer) noexcept nogil:
    """Return whether the snapshot uses this peer object. s may be NULL; the result is then False.
    """
    cdef peer_t* known
    if s == NULL:
        return False
    known = first_peer_at(s, peer.addr, peer.addr_len)
    while known != NULL and known != peer:
        known = known.same_addr
    return known != NULL


cdef inline void discard_snapshot(snapshot_t* new, const snapshot_t* active) noexcept nogil:
    """Free a snapshot that was not activated, and the peers that only this snapshot uses."""
    cdef uint32_t i
    cdef peer_t* peer
    cdef peer_t* next_
    for i in range(new.peers.mask + 1 if new.peers.slots != NULL else 0):
        peer = new.peers.slots[i].peer
        while peer != NULL:
            next_ = peer.new_same_addr
            if has_peer(active, peer):
                peer.generation = active.generation
            else:
                peer_free(peer)
            peer = next_
    snapshot_free(new)


cdef inline peer_t* peer_of_route(
    const snapshot_t* active, snapshot_t* new, const route_t* route, uint32_t link_mtu,
    uint32_t workers_n
) noexcept nogil:
    """Return the peer of a route in the new snapshot; add the peer if it is missing.

    If the active snapshot has the peer, the same object is used, which keeps the counters and the
    path MTU. Peers at one address stay sorted by port. Return NULL if there is no memory.
    """
    cdef size_t addr_len = 4 if route.via_family == 4 else 16
    cdef addr_slot_t* slot
    cdef peer_t** link
    cdef peer_t* peer = NULL
    slot = addr_map_put(&new.peers, route.via, addr_len)
    if slot.peer == NULL:
        slot.source_first = 1  # no port: first > last
    link = &slot.peer
    while link[0] != NULL and link[0].port < route.port:
        link = &link[0].new_same_addr
    if link[0] != NULL and link[0].port == route.port:
        return link[0]
    if active != NULL:
        peer = first_peer_at(active, route.via, addr_len)
        while peer != NULL and peer.port != route.port:
            peer = peer.same_addr
    if peer == NULL:
        peer = peer_new(route.via, addr_len, route.port, link_mtu, workers_n)
        if peer == NULL:
            return NULL
    peer.new_same_addr = link[0]
    link[0] = peer
    peer.generation = new.generation
    peer.new_probe = False
    peer.new_express = False
    peer.new_ecn = False
    new.peers_n += 1
    return peer


cdef inline void set_source_ports(
    snapshot_t* new, hop_t* hop, const route_t* route
) noexcept nogil:
    """Store the ports of a route in its next hop, and add them to those of its peer's address."""
    cdef addr_slot_t* slot
    hop.source_first = 1  # no port: first > last
    if route.source_last == 0:
        return
    hop.source_first = route.source_first
    hop.source_last = route.source_last
    slot = addr_map_find(&new.peers, hop.peer.addr, hop.peer.addr_len)
    if slot.source_last == 0:
        slot.source_first = route.source_first
    slot.source_first = min(slot.source_first, route.source_first)
    slot.source_last = max(slot.source_last, route.source_last)


cdef inline void mark_endpoints(snapshot_t* new) noexcept nogil:
    """Mark the next hops of routes that cover the endpoint of a peer."""
    cdef hop_t* hop
    cdef peer_t* peer
    cdef uint32_t i
    for i in range(new.peers.mask + 1):
        peer = new.peers.slots[i].peer
        if peer != NULL:
            hop = find_hop(new, peer.addr, peer.addr_len)
            if hop != NULL:
                hop.has_endpoint = True


cdef inline snapshot_t* build_snapshot(
    const snapshot_t* active, const route_t* routes, size_t n, uint64_t generation,
    uint32_t link_mtu4, uint32_t link_mtu6, uint32_t workers_n
) noexcept nogil:
    """Build a snapshot of these routes, with an empty ``own`` set. Return NULL if there is no
    memory.

    The caller passes the result to ``activate_snapshot`` or to ``discard_snapshot``.
    """
    cdef snapshot_t* new = <snapshot_t*>calloc(1, sizeof(snapshot_t))
    cdef const route_t* route
    cdef const route_t* before = NULL
    cdef peer_t* peer = NULL
    cdef size_t i
    if new == NULL:
        return NULL
    new.generation = generation
    new.hops_n = n
    new.lpm = lpm_build(routes, n)
    new.hops = <hop_t*>calloc(n + 1, sizeof(hop_t))
    if addr_map_init(&new.peers, 16) < 0 or new.lpm == NULL or new.hops == NULL:
        discard_snapshot(new, active)
        return NULL
    for i in range(n):
        route = &routes[i]
        if before == NULL or before.port != route.port or before.via_family != route.via_family \
                or memcmp(before.via, route.via, 16) != 0:
            if 2 * (new.peers_n + 1) > new.peers.mask and addr_map_grow(&new.peers) < 0:
                discard_snapshot(new, active)
                return NULL
            peer = peer_of_route(
                active, new, route, link_mtu4 if route.via_family == 4 else link_mtu6, workers_n
            )
            if peer == NULL:
                discard_snapshot(new, active)
                return NULL
            before = route
        if route.flags & ROUTE_PROBE:
            peer.new_probe = True
        if route.flags & ROUTE_EXPRESS:
            peer.new_express = True
        if route.flags & ROUTE_ECN:
            peer.new_ecn = True
        new.hops[i].peer = peer
        new.hops[i].mtu = route.mtu
        set_source_ports(new, &new.hops[i], route)
    mark_endpoints(new)
    return new


# Activate


cdef inline retired_t* retire(
    retired_t* list_, snapshot_t* snapshot, peer_t* peer, uint64_t generation
) noexcept nogil:
    """Prepend one object to the list. If there is no memory for the list entry, the object is never
    freed, because a worker may still use it now."""
    cdef retired_t* item = <retired_t*>calloc(1, sizeof(retired_t))
    if item == NULL:
        return list_
    item.snapshot = snapshot
    item.peer = peer
    item.generation = generation
    item.next = list_
    return item


cdef inline retired_t* activate_snapshot(
    snapshot_t** active, snapshot_t* new, retired_t* list_
) noexcept nogil:
    """Store the new snapshot in ``active``. Retire the old snapshot and the peers that only the old
    snapshot used.

    returns  the extended list of retired objects
    """
    cdef snapshot_t* old = active[0]
    cdef uint32_t i, slot = 0, ordinal = 0
    cdef peer_t* peer
    if old != NULL:
        # Retire the old peers first: the loop below overwrites the links between them.
        peer = next_peer(old, &slot, NULL)
        while peer != NULL:
            if peer.generation != new.generation:
                list_ = retire(list_, NULL, peer, new.generation)
            peer = next_peer(old, &slot, peer)
        list_ = retire(list_, old, NULL, new.generation)
    for i in range(new.peers.mask + 1):
        peer = new.peers.slots[i].peer
        while peer != NULL:
            peer.ordinal = ordinal
            ordinal += 1
            poke32(&peer.probe, peer.new_probe)
            poke32(&peer.express, peer.new_express)
            poke32(&peer.ecn, peer.new_ecn)
            store_ptr(<void**>&peer.same_addr, peer.new_same_addr)
            peer = peer.new_same_addr
    store_ptr_ordered(<void**>active, new)
    return list_


# Reclaim


cdef inline retired_t* reclaim(
    retired_t* list_, uint64_t oldest, uint32_t workers_n, peer_counters_t* gone
) noexcept nogil:
    """Free the retired objects that no worker can see. Return the list of the remaining objects.

    oldest  the oldest generation that a busy worker has borrowed; 2**64 - 1 if none is busy
    gone    the counters of the freed peers are added to these
    """
    cdef retired_t** link = &list_
    cdef retired_t* item
    while link[0] != NULL:
        item = link[0]
        if item.generation > oldest:
            link = &item.next
            continue
        link[0] = item.next
        if item.peer != NULL:
            add_counters(gone, item.peer, workers_n)
        peer_free(item.peer)
        snapshot_free(item.snapshot)
        free(item)
    return list_
