"""One peer: an endpoint of the underlay, its path MTU and its counters.

Owns ``peer_t``. A peer object exists while a route uses its endpoint or a worker may still have a
pointer to the object (publish.pxd). Does not depend on routes.

The control side decides the path MTU. A report that it is smaller can be forged, so a worker only
stores it as a *hint*. Exception: what this host's kernel reports about its own device is true, so a
worker applies it at once.

Threading: the control side creates, changes and frees peers. Both sides write ``path_mtu``,
``path_mtu_ns`` and ``df_mtu``. If both write at the same time, either value is valid. A worker
stores ``hint``, and the control side takes it. ``counters`` has one record per worker, which this
worker writes, and two more, which the control side writes: the counts of an earlier process, and
those of the express path.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from limits cimport OVERHEAD4, OVERHEAD6
from sys cimport AF_INET, AF_INET6, sockaddr_in, sockaddr_in6
from table.peer_errors cimport peer_errors_t
from wire.headers cimport swap16


cdef enum:
    HINT_ICMP = 1 << 30         # an ICMP error reported the path MTU
    HINT_DEVICE = 1 << 29       # the kernel refused a datagram
    HINT_MTU = 0xFFFFFF         # mask of the path MTU


cdef struct peer_counters_t:
    uint64_t encap_packets
    uint64_t encap_bytes
    uint64_t decap_packets
    uint64_t decap_bytes
    # time of the last accepted packet, probe or keepalive from the peer, monotonic; 0 = none yet
    uint64_t last_seen_ns
    # path/queue.pxd: the peer's places in the send queue: [0] for datagrams with DF, [1] for
    # datagrams that may be fragmented
    uint32_t queue_places[2]
    # path/own_socket.pxd:
    uint64_t refuse_until_ns    # until this time, the peer gets no own socket
    uint32_t own_socket         # index of the peer's own socket, if it has one
    # path/probe.pxd:
    uint32_t requests_n         # requests recorded since requests_ns
    uint64_t requests_ns


cdef struct peer_t:
    uint8_t addr[16]            # network order; IPv4 in the first 4 bytes, the others are zero
    uint8_t addr_len            # 4 or 16
    uint16_t port               # host order
    uint32_t overhead           # bytes of the outer IP and UDP headers
    uint32_t link_mtu           # of the underlay interface, outer bytes
    uint32_t path_mtu           # outer bytes; <= link_mtu
    uint64_t path_mtu_ns        # time at which df_mtu became smaller than link_mtu; 0: it is not
    # Datagrams that may be longer than this are sent without DF. <= path_mtu; smaller only if the
    # path MTU is uncertain.
    uint32_t df_mtu
    uint64_t hint               # HINT_*, and the reported path MTU (0 = not reported); 0 = no hint
    uint32_t probe              # 1: a route to the peer has ROUTE_PROBE; else 0
    bint new_probe              # control side: ``probe`` in the snapshot that is being built
    uint32_t express            # 1: a route to the peer has ROUTE_EXPRESS; else 0
    bint new_express            # control side: as new_probe
    uint32_t ecn                # 1: a route to the peer has ROUTE_ECN; else 0
    bint new_ecn                # control side: as new_probe
    uint32_t reported_mtu       # control side: the path MTU last returned by path_mtu_changes
    uint64_t generation         # control side: generation of the last snapshot with this peer
    uint32_t ordinal            # control side: index among the peers of that snapshot
    uint32_t probe_mtu          # control side: see Core.probe_peers
    uint64_t taken_sent         # control side: packets at the last Core.take_traffic
    uint64_t taken_received
    uint32_t sa_len
    sockaddr_in6 sa             # large enough for sockaddr_in
    # The next peer at the same address, in ascending port order. During a swap, a worker may follow
    # links of the old and of the new snapshot. The order guarantees that the chain ends even then.
    peer_t* same_addr
    peer_t* new_same_addr       # control side: same_addr in the snapshot that is being built
    # One per worker; one more for the control side; the last: what the express path has counted.
    peer_counters_t* counters
    peer_errors_t* errors       # one per worker; one more for the control side, the last


cdef inline void add_counters(
    peer_counters_t* total, const peer_t* peer, uint32_t workers_n
) noexcept nogil:
    """Add all records of a peer's counters. ``last_seen_ns`` becomes the latest time."""
    cdef const peer_counters_t* c
    cdef uint32_t k
    for k in range(workers_n + 2):
        c = &peer.counters[k]
        total.encap_packets += c.encap_packets
        total.encap_bytes += c.encap_bytes
        total.decap_packets += c.decap_packets
        total.decap_bytes += c.decap_bytes
        total.last_seen_ns = max(total.last_seen_ns, c.last_seen_ns)


cdef inline uint32_t set_sockaddr(
    sockaddr_in6* sa, const uint8_t* addr, size_t addr_len, uint16_t port
) noexcept nogil:
    """Set a socket address, of either family. Return its length."""
    cdef sockaddr_in* sa4 = <sockaddr_in*>sa
    memset(sa, 0, sizeof(sockaddr_in6))
    if addr_len == 4:
        sa4.sin_family = AF_INET
        sa4.sin_port = swap16(port)
        memcpy(&sa4.sin_addr, addr, 4)
        return sizeof(sockaddr_in)
    sa.sin6_family = AF_INET6
    sa.sin6_port = swap16(port)
    memcpy(&sa.sin6_addr, addr, 16)
    return sizeof(sockaddr_in6)


cdef inline void peer_free(peer_t* peer) noexcept nogil:
    """Free a peer. NULL is allowed."""
    if peer != NULL:
        free(peer.counters)
        free(peer.errors)
        free(peer)


cdef inline peer_t* peer_new(
    const uint8_t* addr, size_t addr_len, uint16_t port, uint32_t link_mtu, uint32_t workers_n
) noexcept nogil:
    """Return a new peer with all counters at zero, or NULL if there is no memory. ``peer_free``
    frees the peer."""
    cdef peer_t* peer = <peer_t*>calloc(1, sizeof(peer_t))
    if peer == NULL:
        return NULL
    peer.counters = <peer_counters_t*>calloc(workers_n + 2, sizeof(peer_counters_t))
    peer.errors = <peer_errors_t*>calloc(workers_n + 1, sizeof(peer_errors_t))
    if peer.counters == NULL or peer.errors == NULL:
        peer_free(peer)
        return NULL
    memcpy(peer.addr, addr, addr_len)
    peer.addr_len = <uint8_t>addr_len
    peer.port = port
    peer.link_mtu = peer.path_mtu = peer.df_mtu = peer.reported_mtu = link_mtu
    peer.overhead = OVERHEAD4 if addr_len == 4 else OVERHEAD6
    peer.sa_len = set_sockaddr(&peer.sa, addr, addr_len, port)
    return peer
