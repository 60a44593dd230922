"""Build a snapshot from a route table, and let go of what it replaces.

Owns the control side of ``snapshot_t``: finding or making the peers that routes name, the swap,
and the limbo in which retired snapshots and peers wait until no worker can see them.
Threading: one control thread, without the GIL for the long parts; workers are never waited for.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp

from sys cimport full_fence, load_flag, store_ptr
from table.lpm cimport lpm_build
from table.peers cimport (
    addr_map_find, addr_map_grow, addr_map_init, addr_map_put, addr_slot_t, hop_t, peer_free,
    peer_new, peer_t, snapshot_free, snapshot_t,
)
from table.route cimport route_t
from path.worker cimport shared_t, worker_t


cdef struct limbo_t:            # a retired thing: exactly one of the two
    snapshot_t* snapshot
    peer_t* peer
    uint64_t until              # free when every worker has seen this generation
    limbo_t* next


cdef inline peer_t* want_peer(
    const snapshot_t* old, snapshot_t* new, const route_t* route, uint32_t link_mtu,
    uint32_t workers_n
) noexcept nogil:
    """The peer of a route in the snapshot being built: already there, kept from the one in force,
    or new. Chains stay sorted by port. NULL without memory."""
    cdef size_t addr_len = 4 if route.via_family == 4 else 16
    cdef addr_slot_t* slot
    cdef peer_t** link
    cdef peer_t* peer = NULL
    slot = addr_map_put(&new.peers, route.via, addr_len)
    link = &slot.peer
    while link[0] != NULL and link[0].port < route.port:
        link = &link[0].building
    if link[0] != NULL and link[0].port == route.port:
        return link[0]
    if old != NULL:
        peer = addr_map_find(&old.peers, route.via, addr_len).peer
        while peer != NULL and peer.port != route.port:
            peer = peer.same_addr
    if peer == NULL:
        peer = peer_new(route.via, addr_len, route.port, link_mtu, workers_n)
        if peer == NULL:
            return NULL
    peer.building = link[0]
    link[0] = peer
    peer.mark = new.generation
    new.peers_n += 1
    return peer


cdef inline void drop_unpublished(snapshot_t* new, const snapshot_t* old) noexcept nogil:
    """Undo a build that failed: peers that only it had go, the others are as they were."""
    cdef uint32_t i
    cdef peer_t* peer
    cdef peer_t* next_
    cdef peer_t* kept
    for i in range(new.peers.mask + 1 if new.peers.slots != NULL else 0):
        peer = new.peers.slots[i].peer
        while peer != NULL:
            next_ = peer.building
            kept = NULL
            if old != NULL:
                kept = addr_map_find(&old.peers, peer.addr, peer.addr_len).peer
                while kept != NULL and kept != peer:
                    kept = kept.same_addr
            if kept == NULL:
                peer_free(peer)
            else:
                kept.mark = old.generation
            peer = next_
    snapshot_free(new)


cdef inline snapshot_t* build_snapshot(
    const snapshot_t* old, const route_t* routes, size_t n, uint64_t generation,
    uint32_t link_mtu4, uint32_t link_mtu6, uint32_t workers_n
) noexcept nogil:
    """A snapshot of these routes, not yet in force, without its ``own`` set. NULL: no memory."""
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
        drop_unpublished(new, old)
        return NULL
    for i in range(n):
        route = &routes[i]
        if before == NULL or before.port != route.port or before.via_family != route.via_family \
                or memcmp(before.via, route.via, 16) != 0:
            if 2 * (new.peers_n + 1) > new.peers.mask and addr_map_grow(&new.peers) < 0:
                drop_unpublished(new, old)
                return NULL
            peer = want_peer(
                old, new, route, link_mtu4 if route.via_family == 4 else link_mtu6, workers_n
            )
            if peer == NULL:
                drop_unpublished(new, old)
                return NULL
            before = route
        new.hops[i].peer = peer
        new.hops[i].mtu = route.mtu
    return new


cdef inline limbo_t* retire(
    limbo_t* limbo, snapshot_t* snapshot, peer_t* peer, uint64_t until
) noexcept nogil:
    """Put one thing at the head of the list. Without memory it leaks: never freed early."""
    cdef limbo_t* item = <limbo_t*>calloc(1, sizeof(limbo_t))
    if item == NULL:
        return limbo
    item.snapshot = snapshot
    item.peer = peer
    item.until = until
    item.next = limbo
    return item


cdef inline limbo_t* put_in_force(
    shared_t* shared, snapshot_t* new, limbo_t* limbo
) noexcept nogil:
    """Swap the pointer; returns the limbo with what the old snapshot leaves behind."""
    cdef snapshot_t* old = shared.snapshot
    cdef uint32_t i, ordinal = 0
    cdef peer_t* peer
    if old != NULL:
        # before any link changes: the old chains are still whole
        for i in range(old.peers.mask + 1):
            peer = old.peers.slots[i].peer
            while peer != NULL:
                if peer.mark != new.generation:
                    limbo = retire(limbo, NULL, peer, new.generation)
                peer = peer.same_addr
        limbo = retire(limbo, old, NULL, new.generation)
    for i in range(new.peers.mask + 1):
        peer = new.peers.slots[i].peer
        while peer != NULL:
            peer.ordinal = ordinal
            ordinal += 1
            store_ptr(<void**>&peer.same_addr, peer.building)
            peer = peer.building
    store_ptr(<void**>&shared.snapshot, new)
    full_fence()
    return limbo


cdef inline limbo_t* reclaim(
    limbo_t* limbo, worker_t** workers, uint32_t workers_n
) noexcept nogil:
    """Free what no worker can still see; returns what must go on waiting."""
    cdef uint64_t seen = <uint64_t>-1
    cdef uint64_t at
    cdef limbo_t** link = &limbo
    cdef limbo_t* item
    cdef uint32_t i
    for i in range(workers_n):
        if load_flag(&workers[i].busy):
            at = load_flag(&workers[i].seen)
            if at < seen:
                seen = at
    while link[0] != NULL:
        item = link[0]
        if item.until > seen:
            link = &item.next
            continue
        link[0] = item.next
        if item.peer != NULL:
            peer_free(item.peer)
        snapshot_free(item.snapshot)
        free(item)
    return limbo
