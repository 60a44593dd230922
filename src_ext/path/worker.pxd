"""The state of one data worker: its descriptors, buffers, counters and switches.

Owns the layout; the steps that use it are in send.pxd, encap.pxd, decap.pxd and turn.pxd. One
thread writes it. The control side reads the counters, and writes only ``wake_requested`` and the
snapshot pointer of ``shared_t``.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from wire.cut cimport SEG_HDR_ROOM
from drops cimport DROP_REASONS_N, drop_t
from wire.icmp cimport ICMP_KINDS_N, ICMP_MAX, icmp_bucket_t
from sys cimport iovec, mmsghdr, pollfd, sockaddr_in6, write
from wire.merge cimport merge_t
from table.peers cimport peer_t, snapshot_t
from path.affinity cimport place_t


cdef enum:
    TX_SEGS = 1024              # datagrams that may wait for one flush
    TX_FRAME_SEGS = 512         # kept free for the next frame; the TUN's gso_max_segs
    TX_PEERS = 32               # different peers among them
    TX_MSGS = 64                # messages of one sendmmsg
    TX_FRAME = 10 + 65536       # the longest read from the TUN
    TX_FULL = 262144            # bytes that wait before a flush: keeps them in cache
    TX_OUT = TX_FULL + TX_FRAME + TX_SEGS * SEG_HDR_ROOM  # and one frame more, cut

    RX_SLOTS = 64               # datagrams of one recvmmsg
    RX_SLOT = 65536             # the longest UDP payload, or the longest GRO run
    WR_FRAME = 10 + RX_SLOT     # the longest write to the TUN: what one datagram may hold
    RX_SET = 262144             # bytes one turn should receive at most, to stay in cache

    CMSG_ROOM = 64

    ON_WAKE = 0                 # worker_t.polled
    ON_TUN = 1                  # from here on: what packets come through
    ON_UDP4 = 2
    ON_UDP6 = 3
    POLLED_N = 4

    # shown to the control side, once each, through worker_t.events
    EVENT_PATH_MTU = 1
    EVENT_UDP_GSO = 2            # switched off at run time
    EVENT_TCP_MERGE = 4
    EVENT_UDP_MERGE = 8
    EVENT_TUN_GONE = 16


cdef struct direction_t:
    uint64_t read
    uint64_t generated
    uint64_t delivered
    uint64_t queued
    uint64_t drops[DROP_REASONS_N]


cdef struct seg_t:              # one datagram
    uint8_t* data
    uint32_t len
    int32_t next                # to the same peer; -1 = last


cdef struct run_t:              # segments that go out as one message
    uint32_t n
    uint32_t bytes_
    int32_t next                # the segment behind them


cdef struct bucket_t:           # the waiting segments of one peer, in order
    peer_t* peer
    int32_t first
    int32_t last


cdef struct shared_t:
    snapshot_t* snapshot        # swapped by the control side, read once a turn
    uint32_t workers_n
    uint32_t source_check
    uint8_t tun_addr4[4]
    uint8_t tun_addr6[16]
    bint has_addr4
    bint has_addr6
    int notify_fd               # eventfd of the control side


cdef struct worker_t:
    shared_t* shared
    snapshot_t* snapshot        # borrowed for the turn, and while segments wait
    uint64_t busy               # 1 while a snapshot is borrowed: see turn.pxd
    uint64_t seen               # generation of the snapshot borrowed
    uint64_t wake_requested     # control side: 1 = return to the loop
    uint64_t events             # EVENT_*: set here, cleared by the control side
    uint64_t now
    place_t place
    uint32_t index

    int epoll_fd                # for the loop: see turn.pxd
    int wake_fd
    int tun_fd
    int udp_fd4                 # -1 = no listener of this family
    int udp_fd6
    pollfd polled[POLLED_N]
    bint full4                  # back-pressure: the last flush left segments for this socket
    bint full6
    bint tun_asleep             # and the TUN is not polled
    bint ready                  # the last poll saw something
    bint trickle                # the last batch received was of single datagrams
    bint tun_ready
    bint udp_ready4
    bint udp_ready6

    # switches: what is in use
    uint32_t vnet_len           # 10, or 0 without tun-gso
    bint udp_gso
    bint batch
    uint32_t gso_max_segs       # segments of one UDP_SEGMENT send

    direction_t encap
    direction_t decap
    uint64_t icmp_sent
    uint64_t icmp_suppressed
    uint64_t turns
    uint64_t loop_returns
    uint64_t syscalls_read
    uint64_t syscalls_write
    uint64_t syscalls_send
    uint64_t syscalls_recv
    uint64_t syscalls_wait
    icmp_bucket_t icmp_buckets[2 * ICMP_KINDS_N]

    # waiting to be sent
    uint8_t* tx_frame           # TX_FRAME bytes: the frame read last
    uint8_t* tx_out             # TX_OUT bytes: datagrams, one behind the other
    uint32_t tx_used
    uint32_t segs_n
    uint32_t buckets_n
    seg_t segs[TX_SEGS]
    bucket_t buckets[TX_PEERS]
    iovec tx_iov[TX_SEGS]
    mmsghdr tx_msgs[TX_MSGS]
    uint8_t tx_cmsg[TX_MSGS][CMSG_ROOM]
    run_t tx_runs[TX_MSGS]

    # received
    uint8_t* rx_buf             # RX_SLOTS * RX_SLOT
    uint32_t rx_slots           # for the next recvmmsg
    iovec rx_iov[RX_SLOTS]
    mmsghdr rx_msgs[RX_SLOTS]
    sockaddr_in6 rx_from[RX_SLOTS]
    uint8_t rx_cmsg[RX_SLOTS][CMSG_ROOM]
    merge_t merge
    uint8_t* wr_frame           # WR_FRAME bytes: the frame written last
    uint8_t icmp_out[10 + ICMP_MAX]


cdef inline void count_drop(direction_t* d, drop_t reason, uint64_t n) noexcept nogil:
    d.drops[<int>reason] += n


cdef inline void raise_event(worker_t* w, uint64_t event) noexcept nogil:
    """Set an event bit and wake the control side, once until it has taken the event."""
    cdef uint64_t one = 1
    if w.events & event != event:
        w.events |= event
        write(w.shared.notify_fd, &one, 8)
