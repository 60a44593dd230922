"""The send queue: datagrams that wait for the next flush, in order for each peer.

Owns ``queue_t``. A caller writes a datagram at ``queue_room`` and adds this datagram with
``queue_append``. send.pxd sends the datagrams and empties the queue. Does not depend on workers or
sockets.

The datagrams are contiguous in memory, so a run to one peer is one block. The kernel copies one
block several times faster than a gather list of headers and payloads (docs/performance.md). A
datagram keeps its place in memory until the flush that sends the datagram ends.
Threading: one queue per worker; the control side reads ``waiting_n``.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from table.peer cimport peer_t
from wire.cut cimport SEG_HDR_ROOM
from wire.headers cimport VNET_LEN


cdef enum:
    QUEUE_DATAGRAMS = 1536      # maximum number of datagrams in the queue
    QUEUE_FRAME_DATAGRAMS = 512  # slots kept free for the next frame; also the TUN's gso_max_segs
    QUEUE_FRAME_BYTES = VNET_LEN + 65536
    QUEUE_PEERS = 256           # maximum number of peers with datagrams in the queue
    QUEUE_FULL_BYTES = 262144   # flush above this size, so that the queue stays in the CPU cache
    QUEUE_BYTES = QUEUE_FULL_BYTES + QUEUE_FRAME_BYTES + QUEUE_DATAGRAMS * SEG_HDR_ROOM


cdef struct datagram_t:
    uint8_t* data
    uint32_t len
    int32_t next                # index of the next datagram to the same peer; -1: this is the last


cdef struct peer_queue_t:       # the datagrams that wait for one peer, in order
    peer_t* peer
    bint fragments              # the datagrams may be fragmented
    int32_t first               # index in queue_t.datagrams; -1: no datagram waits for this peer
    int32_t last


cdef struct queue_t:
    uint8_t* memory             # a block of QUEUE_BYTES bytes
    uint32_t used               # bytes of memory that hold datagrams
    uint32_t n                  # datagrams in memory: waiting, or sent by an incomplete flush
    uint32_t peers_n
    uint32_t worker             # index of the queue's worker in ``peer_t.counters``
    uint64_t waiting_n          # datagrams not yet sent or dropped
    datagram_t datagrams[QUEUE_DATAGRAMS]
    peer_queue_t peers[QUEUE_PEERS]


cdef inline bint queue_is_empty(const queue_t* q) noexcept nogil:
    return q.n == 0


cdef inline bint queue_is_full(const queue_t* q, uint32_t datagrams) noexcept nogil:
    """Return whether a flush is needed before up to ``datagrams`` more datagrams are added (of a
    frame, or of an ICMP error)."""
    return (
        q.n + datagrams > QUEUE_DATAGRAMS or q.used > QUEUE_FULL_BYTES
        or q.peers_n == QUEUE_PEERS
    )


cdef inline uint8_t* queue_room(queue_t* q) noexcept nogil:
    """Return the address at which to write the next datagram."""
    return q.memory + q.used


cdef inline void queue_append(
    queue_t* q, peer_t* peer, bint fragments, uint32_t n
) noexcept nogil:
    """Add the datagram of n bytes at ``queue_room``. The queue must not be full.

    fragments  whether the datagram may be fragmented
    """
    cdef datagram_t* datagram = &q.datagrams[q.n]
    cdef uint32_t* place = &peer.counters[q.worker].queue_places[fragments]
    cdef peer_queue_t* waiting = &q.peers[place[0]]
    # The place is left from an earlier queue, unless the entry at this place is the peer's.
    if place[0] >= q.peers_n or waiting.peer != peer or waiting.fragments != fragments:
        place[0] = q.peers_n
        waiting = &q.peers[q.peers_n]
        q.peers_n += 1
        waiting.peer = peer
        waiting.fragments = fragments
        waiting.first = -1
    if waiting.first < 0:  # a new peer, or an incomplete flush sent all its datagrams
        waiting.first = q.n
    else:
        q.datagrams[waiting.last].next = q.n
    waiting.last = q.n
    datagram.data = queue_room(q)
    datagram.len = n
    datagram.next = -1
    q.used += n
    q.n += 1
    q.waiting_n += 1


cdef inline void queue_append_copy(
    queue_t* q, peer_t* peer, bint fragments, const uint8_t* p, uint32_t n
) noexcept nogil:
    """Add a copy of p[0:n]. The queue must not be full."""
    memcpy(queue_room(q), p, n)
    queue_append(q, peer, fragments, n)


cdef inline void queue_clear(queue_t* q) noexcept nogil:
    """Empty the queue. All its datagrams must be sent or dropped."""
    q.n = q.peers_n = q.used = 0
