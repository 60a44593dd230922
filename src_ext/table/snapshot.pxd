"""The snapshot: the immutable tables in which a worker looks up addresses.

Owns ``snapshot_t`` (routes, next hops, peers by address, own addresses) and the look-ups in it.
Does not depend on how a snapshot is built or replaced (publish.pxd).

Threading: a published snapshot does not change, except for the ``same_addr`` links and the path
MTUs of its peers. A worker loads the pointer to the snapshot once per turn and takes no lock.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free

from limits cimport MIN_MTU6
from sys cimport load_ptr, peek32
from table.addr_map cimport addr_map_find, addr_map_free, addr_map_t, addr_slot_t
from table.lpm cimport lpm_free, lpm_lookup4, lpm_lookup6, lpm_t
from table.peer cimport peer_t
from wire.headers cimport load_be32


cdef struct hop_t:              # the next hop of one route
    peer_t* peer
    uint16_t mtu                # MTU of the route, in inner bytes; 0 = not set
    uint16_t source_first       # the peer may also send from these ports; none if first > last
    uint16_t source_last
    uint8_t has_endpoint        # the endpoint of a peer is routed here: see encap.pxd, recursion


cdef struct snapshot_t:
    lpm_t* lpm                  # maps a destination to 1 + index into hops
    hop_t* hops                 # one per route, in table order
    size_t hops_n
    addr_map_t peers            # maps an outer address to its first peer; see same_addr
    addr_map_t own              # inner source addresses that only this host may use
    size_t peers_n
    uint64_t generation         # rises by 1 with each published snapshot


cdef inline hop_t* find_hop(
    const snapshot_t* s, const uint8_t* addr, size_t addr_len
) noexcept nogil:
    """Return the next hop for an inner address, or NULL if there is no route."""
    cdef uint32_t value
    if addr_len == 4:
        value = lpm_lookup4(s.lpm, load_be32(addr))
    else:
        value = lpm_lookup6(s.lpm, addr)
    return &s.hops[value - 1] if value != 0 else NULL


cdef inline uint32_t path_limit(const hop_t* hop) noexcept nogil:
    """Return the largest inner packet that the route and the path to its peer allow."""
    cdef uint32_t limit = peek32(&hop.peer.path_mtu) - hop.peer.overhead
    return hop.mtu if hop.mtu != 0 and hop.mtu < limit else limit


cdef inline uint32_t packet_limit(const hop_t* hop, uint8_t version) noexcept nogil:
    """Return the largest inner packet of this IP version that the route takes. IPv6 packets of 1280
    bytes must arrive (RFC 8200 5). If the path has less space, their datagrams are fragmented."""
    cdef uint32_t limit = path_limit(hop)
    return MIN_MTU6 if version == 6 and limit < MIN_MTU6 else limit


cdef inline peer_t* first_peer_at(
    const snapshot_t* s, const uint8_t* addr, size_t addr_len
) noexcept nogil:
    """Return the peer with the lowest port at an outer address, or NULL."""
    return addr_map_find(&s.peers, addr, addr_len).peer


cdef inline peer_t* next_at_address(peer_t* peer) noexcept nogil:
    """Return the peer with the next port at the same address, or NULL. The control side may change
    the link at the same time (see peer.pxd)."""
    return <peer_t*>load_ptr(<void**>&peer.same_addr)


cdef inline peer_t* find_peer(
    const snapshot_t* s, const uint8_t* addr, size_t addr_len, uint16_t port
) noexcept nogil:
    """Return the peer with this outer address and port. If there is none, return the peer with this
    address and the lowest port; NULL if no peer has this address."""
    cdef peer_t* first = first_peer_at(s, addr, addr_len)
    cdef peer_t* peer = first
    while peer != NULL:
        if peer.port == port:
            return peer
        peer = next_at_address(peer)
    return first


cdef inline bint hop_admits(const hop_t* hop, uint16_t port) noexcept nogil:
    """Return whether the peer of a route may send packets of this route's prefix from this port."""
    return port == hop.peer.port or hop.source_first <= port <= hop.source_last


cdef inline bint may_send_from(
    const snapshot_t* s, const uint8_t* addr, size_t addr_len, uint16_t port
) noexcept nogil:
    """Return whether routes to an outer address name this port as one from which peers may send.
    The peers' own ports are not considered."""
    cdef addr_slot_t* slot = addr_map_find(&s.peers, addr, addr_len)
    return slot.source_first <= port <= slot.source_last


cdef inline bint is_own(
    const snapshot_t* s, const uint8_t* addr, size_t addr_len
) noexcept nogil:
    """Return whether an inner source address is one of this host's own addresses."""
    return addr_map_find(&s.own, addr, addr_len).addr_len != 0


cdef inline peer_t* next_peer(
    const snapshot_t* s, uint32_t* slot, const peer_t* peer
) noexcept nogil:
    """Iterate over all peers, for the control side. Return the peer after ``peer``, or NULL.

    slot  0 at the start; updated by each call
    peer  NULL at the start, then the result of the last call
    """
    if peer != NULL and peer.same_addr != NULL:
        return peer.same_addr
    while slot[0] <= s.peers.mask:
        slot[0] += 1
        if s.peers.slots[slot[0] - 1].peer != NULL:
            return s.peers.slots[slot[0] - 1].peer
    return NULL


cdef inline void snapshot_free(snapshot_t* s) noexcept nogil:
    """Free a snapshot that no worker can see, but not its peers. NULL is allowed."""
    if s != NULL:
        lpm_free(s.lpm)
        free(s.hops)
        addr_map_free(&s.peers)
        addr_map_free(&s.own)
        free(s)
