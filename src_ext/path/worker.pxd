"""The state of one data worker: descriptors, buffers, counters and switches.

Owns the memory layout and the batch sizes. The steps that use this state are in icmp_reply.pxd,
own_socket.pxd, send.pxd, probe.pxd, encap.pxd, decap.pxd and turn.pxd. The send queue is in
queue.pxd.
Threading: the worker's thread writes a ``worker_t``. The control side reads the counters,
reads and clears ``events``, takes records from ``probes``, and writes ``wake_requested``,
``renew_requested`` and the snapshot pointer of ``shared_t``.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from drops cimport DROP_REASONS_N, PASS, drop_t
from path.affinity cimport affinity_t
from path.capture cimport (
    CAPTURE_IN, CAPTURE_MASK, CAPTURE_OUT, RECORD_GENERATED, capture_packet, captured_t, captures_t,
)
from path.dropped cimport dropped_t, note_dropped, rarely
from path.queue cimport QUEUE_BYTES, QUEUE_DATAGRAMS, QUEUE_FRAME_BYTES, queue_t
from path.refused_senders cimport refused_senders_t
from sys cimport POLLIN, POLLOUT, iovec, mmsghdr, pollfd, set_bits, sockaddr_in6, write
from table.peer cimport peer_t
from table.snapshot cimport snapshot_t
from wire.ecn cimport ecn_counts_t
from wire.headers cimport VNET_LEN
from wire.icmp cimport ICMP_KINDS_N, ICMP_MAX, icmp_bucket_t
from wire.merge cimport merge_reset, merge_t
from wire.net cimport net_t
from wire.probe cimport probe_t


cdef enum:
    TX_FRAME = QUEUE_FRAME_BYTES  # the longest read from the TUN
    TX_MSGS = 64                # maximum messages of one sendmmsg
    ERRNOS = 134                # errnos that are counted; Linux has 1 to 133. 0: any other

    RX_SLOTS = 64               # maximum messages of one recvmmsg
    RX_SLOT = 65536             # the longest UDP payload, or the longest run joined by UDP_GRO
    RX_BATCH_BYTES = 262144     # maximum bytes that one batch should receive, to stay in cache
    # the longest write to the TUN: the payload of one datagram; a merged frame is not longer
    WR_FRAME = VNET_LEN + RX_SLOT

    CMSG_ROOM = 64              # space for two control messages

    OWN_SOCKETS = 64            # maximum number of peers with an own socket (own_socket.pxd)

    OWN_NETS = 8                # maximum number of prefixes to which --admit own delivers

    # indices of worker_t.polled; the descriptors from ON_TUN to ON_UDP6 carry packets
    ON_WAKE = 0
    ON_TUN = 1
    ON_UDP4 = 2
    ON_UDP6 = 3
    ON_FULL = 4                 # the full socket for which the worker waits
    POLLED_N = 5

    # bits of worker_t.events
    EVENT_PATH_MTU = 1          # a peer has a hint (peer.pxd)
    EVENT_UDP_GSO = 2           # the kernel refused UDP_SEGMENT, which is now off
    EVENT_TCP_MERGE = 4         # the kernel refused a merged TCP frame; merging TCP is now off
    EVENT_UDP_MERGE = 8         # the kernel refused a merged UDP frame; merging UDP is now off
    EVENT_TUN_GONE = 16
    EVENT_OWN_SOCKET = 32       # an own socket could not be opened
    EVENT_PROBE = 64            # a probe is in the ring

    PROBE_RING = 512            # records of probes that the control side has not taken yet
    TOKEN_SETS = 1024           # a power of two
    TOKEN_WAYS = 8


cdef struct direction_t:        # counters of inner IP packets
    uint64_t read
    uint64_t generated
    uint64_t delivered
    uint64_t consumed           # probes from peers
    uint64_t drops[DROP_REASONS_N]


cdef struct run_t:              # the run in one message of sendmmsg; may be a single datagram
    uint32_t n                  # datagrams
    uint32_t bytes_
    int32_t next                # index of the peer's first datagram after this message; -1 = none


cdef struct own_socket_t:       # see own_socket.pxd
    int fd                      # -1: the slot has no socket
    peer_t* peer                # compare it only: the peer may have been freed
    uint8_t addr[16]            # the peer's endpoint: a new peer can have the same pointer
    uint8_t addr_len
    uint16_t port
    uint64_t given_ns           # time at which the peer got the socket
    uint32_t empty_looks        # the number of looks in a row at which the socket was empty


cdef struct spare_t:            # a socket that sends, opened when it is needed
    int fd                      # -1 = not open
    uint64_t retry_ns           # until this time, it is not opened


cdef struct probe_record_t:     # a probe that has arrived
    probe_t probe
    uint8_t addr[16]            # of the sender
    uint8_t addr_len
    uint32_t port               # of the sender, host order
    uint64_t received_ns        # monotonic


cdef struct probe_ring_t:       # see probe.pxd
    probe_record_t records[PROBE_RING]
    uint64_t put                # number of records added so far; written by the worker
    uint64_t taken              # number of records taken so far; written by the control side
    uint64_t lost               # number of probes without a record


cdef struct tokens_t:           # of the latest requests without a reply; see probe.pxd
    uint64_t sets[TOKEN_SETS][TOKEN_WAYS]  # a token is in the set of its lowest bits; 0 = free
    uint8_t next_[TOKEN_SETS]   # the next place to use; only the control side uses it


cdef struct shared_t:
    snapshot_t* snapshot        # the active one: the control side stores it, workers load it
    uint32_t workers_n
    uint32_t source_check
    bint admit_own              # deliver only to inner destinations in own_nets
    uint32_t own_nets_n
    net_t own_nets[OWN_NETS]  # see Core, own_subnets
    # The traffic class of a datagram is class_set | (class of its packet & class_copied).
    uint8_t class_set
    uint8_t class_copied
    uint8_t tun_addr4[4]
    uint8_t tun_addr6[16]
    bint has_addr4
    bint has_addr6
    uint32_t tun_mtu            # written by the control side
    bint all_express            # the kernel of every peer may have sent a packet
    int notify_fd               # eventfd of the control side
    uint64_t wake_on_probe      # written by the control side: 1 = raise EVENT_PROBE for each probe
    tokens_t tokens             # written by the control side; workers clear those that they find
    captures_t captures


cdef struct worker_t:
    shared_t* shared
    snapshot_t* snapshot        # borrowed for a turn, and while datagrams are queued
    uint64_t busy               # 1 while a snapshot is borrowed (see turn.pxd)
    uint64_t seen               # generation of the borrowed snapshot
    uint64_t capturing          # captures_t.word of this turn
    uint64_t wake_requested     # written by the control side: 1 = return to the event loop
    uint64_t renew_requested    # set by the control side: 1 = close what own_socket.pxd has opened
    uint64_t events             # EVENT_*: set by the worker, cleared by the control side
    uint64_t now                # monotonic ns, read once per turn
    affinity_t affinity
    uint32_t index

    int epoll_fd                # the event loop waits on it (see turn.pxd)
    int wake_fd
    int successor_fd            # eventfd to write when ``run`` returns for a wake-up; -1 = none
    int tun_fd
    int udp_fd4                 # receives; -1 = no listener of this family
    int udp_fd6
    int sender4                 # the shared sender (own_socket.pxd); can be udp_fd4
    int sender6
    pollfd polled[POLLED_N]
    int full_fd                 # back-pressure: the full socket that the flush waits for; -1 = none
    bint tun_paused             # back-pressure: the TUN is not polled
    bint draining               # the worker stops: a flush waits for each full socket
    uint64_t waiting_ns         # time at which the current wait began; 0 = no wait
    uint64_t no_wait_until_ns   # until this time, no flush waits: the last wait did not help
    peer_t* last_peer           # a peer of the last flush; compare it only
    uint64_t other_peer_ns      # time of the last flush for other peers than before; 0 = none yet
    bint ready                  # the last poll found a ready descriptor
    bint small_packets          # the last received batch had many small datagrams (see decap.pxd)
    bint tun_ready
    bint udp_ready4
    bint udp_ready6

    # switches
    uint32_t vnet_len           # VNET_LEN, or 0 without tun-gso
    bint udp_gso
    bint batch
    uint32_t gso_max_segs       # maximum datagrams of one UDP_SEGMENT message

    # counters
    direction_t encap
    direction_t decap
    ecn_counts_t ecn
    uint64_t icmp_sent
    uint64_t icmp_suppressed
    uint64_t icmp_received      # ICMP errors of the underlay, kept for their peers
    uint64_t sends_refused      # refused sends, kept for their peers; ``refusals`` has the errnos
    uint64_t turns
    uint64_t loop_returns
    uint64_t wakes              # writes to wake_fd that the worker has seen
    uint64_t syscalls_read
    uint64_t syscalls_write
    uint64_t syscalls_send
    uint64_t syscalls_recv
    uint64_t syscalls_wait
    icmp_bucket_t icmp_buckets[2 * ICMP_KINDS_N]

    # limit of the errors that are read (send.pxd)
    uint64_t errors_since_ns    # when the present window began
    uint32_t errors_n           # errors read in this window
    uint64_t deaf_until_ns      # until this time, the kernel queues no errors; 0 = it does
    uint64_t deaf_n             # how often the limit was reached

    spare_t spare4
    spare_t spare6
    uint64_t[ERRNOS] refusals   # refused sends by errno
    spare_t fragmenting4        # see own_socket.pxd
    spare_t fragmenting6
    own_socket_t own_sockets[OWN_SOCKETS]
    uint32_t own_sockets_n      # open now
    bint own_sockets_wanted     # the flush needs more of them than there are
    uint64_t own_sockets_given  # counter
    uint64_t own_look_ns        # time of the next look
    uint64_t own_retry_ns       # until this time, no own socket is opened
    int own_error               # errno of the last own socket that could not be opened

    # TUN to UDP
    uint8_t* tx_frame           # TX_FRAME bytes: the last frame read
    queue_t queue
    iovec tx_iov[QUEUE_DATAGRAMS]  # gather entries; at most one per datagram
    mmsghdr tx_msgs[TX_MSGS]
    uint8_t tx_cmsg[TX_MSGS][CMSG_ROOM]
    run_t tx_runs[TX_MSGS]

    # UDP to TUN
    uint8_t* rx_buf             # RX_SLOTS * RX_SLOT bytes
    uint32_t rx_slots           # slots of the next recvmmsg
    iovec rx_iov[RX_SLOTS]
    mmsghdr rx_msgs[RX_SLOTS]
    sockaddr_in6 rx_from[RX_SLOTS]
    uint8_t rx_cmsg[RX_SLOTS][CMSG_ROOM]
    merge_t merge
    uint8_t* wr_frame           # WR_FRAME bytes: the last frame written
    uint8_t icmp_out[VNET_LEN + ICMP_MAX]
    probe_ring_t probes
    refused_senders_t refused_senders
    dropped_t encap_dropped[DROP_REASONS_N]
    dropped_t decap_dropped[DROP_REASONS_N]


cdef struct handled_t:          # a packet that is dropped or captured
    worker_t* w
    uint8_t direction           # CAPTURE_*
    uint8_t flags               # RECORD_*
    drop_t reason               # PASS = not dropped
    uint16_t segment            # payload bytes of each segment; 0 = not a super-packet
    uint32_t packets            # packets that are handled together
    const uint8_t* p            # the first packet
    size_t n
    const uint8_t* addr         # the endpoint at the other end
    uint8_t addr_len            # 0 = not known
    uint16_t port


cdef inline bint init_worker(
    worker_t* w, int tun_fd, int udp_fd4, int udp_fd6
) noexcept nogil:
    """Set the descriptors and allocate the buffers of a worker_t whose bytes are zero. Return False
    if there is no memory. The caller then calls ``free_buffers``, too."""
    cdef uint32_t i
    w.epoll_fd = w.wake_fd = w.successor_fd = w.full_fd = w.spare4.fd = w.spare6.fd = -1
    w.fragmenting4.fd = w.fragmenting6.fd = -1
    w.tun_fd, w.udp_fd4, w.udp_fd6 = tun_fd, udp_fd4, udp_fd6
    w.sender4, w.sender6 = udp_fd4, udp_fd6
    for i in range(OWN_SOCKETS):
        w.own_sockets[i].fd = -1
    for i in range(POLLED_N):
        w.polled[i].fd = -1
        w.polled[i].events = POLLIN
    w.polled[ON_TUN].fd, w.polled[ON_UDP4].fd, w.polled[ON_UDP6].fd = tun_fd, udp_fd4, udp_fd6
    w.polled[ON_FULL].events = POLLOUT
    w.tx_frame = <uint8_t*>calloc(1, TX_FRAME)
    w.queue.memory = <uint8_t*>calloc(1, QUEUE_BYTES)
    w.wr_frame = <uint8_t*>calloc(1, WR_FRAME)
    w.rx_buf = <uint8_t*>calloc(RX_SLOTS, RX_SLOT)
    if w.tx_frame == NULL or w.queue.memory == NULL or w.rx_buf == NULL or w.wr_frame == NULL:
        return False
    merge_reset(&w.merge)
    for i in range(RX_SLOTS):
        w.rx_iov[i].iov_base = w.rx_buf + i * RX_SLOT
        w.rx_iov[i].iov_len = RX_SLOT
        w.rx_msgs[i].msg_hdr.msg_name = &w.rx_from[i]
        w.rx_msgs[i].msg_hdr.msg_iov = &w.rx_iov[i]
        w.rx_msgs[i].msg_hdr.msg_iovlen = 1
        w.rx_msgs[i].msg_hdr.msg_control = &w.rx_cmsg[i][0]
    return True


cdef inline void free_buffers(worker_t* w) noexcept nogil:
    free(w.tx_frame)
    free(w.queue.memory)
    free(w.rx_buf)
    free(w.wr_frame)


cdef inline void count_drop(direction_t* d, drop_t reason, uint64_t n) noexcept nogil:
    d.drops[<int>reason] += n


cdef inline void capture_handled(const handled_t* h) noexcept nogil:
    """Offer a packet to the captures that are on."""
    cdef captured_t c
    c.captures, c.word, c.writer = &h.w.shared.captures, h.w.capturing, h.w.index
    c.direction, c.flags, c.reason = h.direction, h.flags, h.reason
    c.segment, c.packets, c.p, c.n = h.segment, h.packets, h.p, h.n
    c.addr, c.addr_len, c.port = h.addr, h.addr_len, h.port
    capture_packet(&c)


cdef inline void take_drop(const void* handled) noexcept nogil:
    """Count and record the dropped packets of a ``handled_t``."""
    cdef const handled_t* h = <const handled_t*>handled
    cdef dropped_t* dropped = h.w.encap_dropped
    cdef direction_t* direction = &h.w.encap
    if h.direction == CAPTURE_IN:
        dropped, direction = h.w.decap_dropped, &h.w.decap
    count_drop(direction, h.reason, h.packets)
    note_dropped(
        &dropped[<int>h.reason], h.w.now, h.packets, h.p, h.n, h.addr, h.addr_len, h.port
    )
    if h.w.capturing & CAPTURE_MASK:
        capture_handled(h)


cdef inline void take_capture(const void* handled) noexcept nogil:
    """Capture the packet of a ``handled_t``."""
    capture_handled(<const handled_t*>handled)


cdef inline void handle_from_tun(
    worker_t* w, drop_t reason, uint32_t packets, const uint8_t* p, size_t n, uint16_t segment,
    const peer_t* peer, bint generated
) noexcept nogil:
    cdef handled_t h
    h.w, h.direction, h.flags = w, CAPTURE_OUT, RECORD_GENERATED if generated else 0
    h.reason, h.packets, h.p, h.n, h.segment = reason, packets, p, n, segment
    h.addr, h.addr_len, h.port = NULL, 0, 0
    if peer != NULL:
        h.addr = peer.addr
        h.addr_len, h.port = <uint8_t>peer.addr_len, <uint16_t>peer.port
    rarely(take_capture if reason == PASS else take_drop, &h)


cdef inline void handle_from_udp(
    worker_t* w, drop_t reason, const uint8_t* p, size_t n, const uint8_t* addr, uint8_t addr_len,
    uint16_t port, bint generated
) noexcept nogil:
    cdef handled_t h
    h.w, h.direction, h.flags = w, CAPTURE_IN, RECORD_GENERATED if generated else 0
    h.reason, h.packets, h.p, h.n, h.segment = reason, 1, p, n, 0
    h.addr, h.addr_len, h.port = addr, addr_len, port
    rarely(take_capture if reason == PASS else take_drop, &h)


cdef inline bint is_capturing(const worker_t* w) noexcept nogil:
    return w.capturing & CAPTURE_MASK != 0


cdef inline void capture_from_tun(
    worker_t* w, uint32_t packets, const uint8_t* p, size_t n, uint16_t segment, const peer_t* peer,
    bint generated
) noexcept nogil:
    """Capture a frame that goes to a peer. The caller has checked ``is_capturing``.

    segment    payload bytes of each segment of a super-packet; 0 for a packet
    generated  the forwarder made the packet
    """
    handle_from_tun(w, PASS, packets, p, n, segment, peer, generated)


cdef inline void capture_from_udp(
    worker_t* w, const uint8_t* p, size_t n, const uint8_t* addr, uint8_t addr_len, uint16_t port,
    bint generated
) noexcept nogil:
    """Capture a packet that goes to the TUN, as ``capture_from_tun``."""
    handle_from_udp(w, PASS, p, n, addr, addr_len, port, generated)


cdef inline void drop_from_tun(
    worker_t* w, drop_t reason, uint32_t packets, const uint8_t* p, size_t n, const peer_t* peer,
    uint16_t segment=0
) noexcept nogil:
    """Count packets that were read from the TUN and are dropped. Record and capture the first,
    p[0:n].

    peer     to which they would have been sent; NULL = not known
    segment  payload bytes of each segment if p[0:n] is a super-packet
    """
    handle_from_tun(w, reason, packets, p, n, segment, peer, False)


cdef inline void drop_from_udp(
    worker_t* w, drop_t reason, const uint8_t* p, size_t n, const uint8_t* addr, uint8_t addr_len,
    uint16_t port
) noexcept nogil:
    """Count a packet from this endpoint that is dropped; record and capture it. addr_len 0: the
    endpoint is not known."""
    handle_from_udp(w, reason, p, n, addr, addr_len, port, False)


cdef inline void raise_event(worker_t* w, uint64_t event) noexcept nogil:
    """Set an event bit and wake the control side. If the bit is already set, do not wake it again:
    it clears the bit before it reads what the event is about."""
    cdef uint64_t one = 1
    if not set_bits(&w.events, event) & event:
        write(w.shared.notify_fd, &one, 8)
