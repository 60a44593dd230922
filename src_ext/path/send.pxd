"""The sending end: segments that wait, gathered into as few system calls as the kernel allows.

Owns the queue between reading the TUN and sendmmsg: a datagram is written at ``segment_room`` and
counted in by ``queue_segment``; ``flush`` sends what waits. Segments to one peer keep their order;
a run of equal size (the last may be shorter) becomes one UDP_SEGMENT message. What the kernel
refuses as a run is sent again one by one; nothing is lost to a probe.

Datagrams lie one behind the other in tx_out, until the flush that sends them ends: a run to one
peer is one piece of memory, which the kernel takes several times faster than a gather list of its
headers and payloads (docs/performance.md).
Source: udp(7), ip(7) (IP_RECVERR), linux net/ipv4/udp.c (UDP_SEGMENT's limits), RFC 1191, RFC 8201.
"""

from libc.errno cimport (
    EAGAIN, EINTR, EINVAL, EIO, EMSGSIZE, ENOBUFS, ENOMEM, EOPNOTSUPP, errno,
)
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from drops cimport DROP_NO_BUFFER, DROP_SEND_ERROR, DROP_TOO_BIG, PASS, drop_t
from sys cimport (
    AF_INET, CMSG_DATA, CMSG_FIRSTHDR, CMSG_LEN, CMSG_NXTHDR, CMSG_SPACE, IP_RECVERR,
    IPPROTO_IP, IPPROTO_IPV6, IPPROTO_UDP, IPV6_RECVERR, MSG_DONTWAIT, MSG_ERRQUEUE,
    MSG_NOSIGNAL, SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6, SO_EE_ORIGIN_LOCAL, UDP_SEGMENT,
    cmsghdr, msghdr, recvmsg, sendmmsg, sock_extended_err, sockaddr_in, sockaddr_in6,
)
from table.peers cimport addr_map_find, peer_counters_t, peer_t

from path.worker cimport (
    EVENT_PATH_MTU, EVENT_UDP_GSO, TX_FULL, TX_MSGS, TX_PEERS, TX_SEGS, bucket_t, count_drop,
    raise_event,
    run_t, seg_t, worker_t,
)


cdef enum:
    MAX_UDP_PAYLOAD = 65507     # of one send, all segments together
    RETRIES = 4                 # of a send that reports somebody else's ICMP error
    MIN_PATH_MTU4 = 552         # Linux's net.ipv4.route.min_pmtu: a forged ICMP error may not
    MIN_PATH_MTU6 = 1280        # throttle us to nothing
    UNKNOWN_MTU4 = 576          # a router that does not say (RFC 1191 5)


cdef inline bint waiting(const worker_t* w) noexcept nogil:
    return w.segs_n != 0


cdef inline bint queue_full(const worker_t* w, uint32_t segs) noexcept nogil:
    """Whether a flush must come before ``segs`` more segments and one more frame."""
    return w.segs_n + segs > TX_SEGS or w.tx_used > TX_FULL or w.buckets_n == TX_PEERS


cdef inline uint8_t* segment_room(worker_t* w) noexcept nogil:
    """Where the next datagram is to be written."""
    return w.tx_out + w.tx_used


cdef inline void queue_segment(worker_t* w, peer_t* peer, uint32_t n) noexcept nogil:
    """Let the datagram of n bytes at ``segment_room`` wait; not queue_full."""
    cdef seg_t* seg = &w.segs[w.segs_n]
    cdef bucket_t* bucket = NULL
    cdef uint32_t i
    for i in range(w.buckets_n):
        if w.buckets[i].peer == peer:
            bucket = &w.buckets[i]
            break
    if bucket == NULL:
        bucket = &w.buckets[w.buckets_n]
        w.buckets_n += 1
        bucket.peer = peer
        bucket.first = -1
    if bucket.first < 0:  # new, or emptied by a flush that another peer's segments ended
        bucket.first = w.segs_n
    else:
        w.segs[bucket.last].next = w.segs_n
    bucket.last = w.segs_n
    seg.data = segment_room(w)
    seg.len = n
    seg.next = -1
    w.tx_used += n
    w.segs_n += 1
    w.encap.queued += 1


cdef inline void queue_packet(
    worker_t* w, peer_t* peer, const uint8_t* p, uint32_t n
) noexcept nogil:
    """Let a copy of the packet wait; not queue_full."""
    memcpy(segment_room(w), p, n)
    queue_segment(w, peer, n)


cdef inline int udp_fd(const worker_t* w, const peer_t* peer) noexcept nogil:
    return w.udp_fd4 if peer.addr_len == 4 else w.udp_fd6


cdef inline void learn_path_mtu(worker_t* w, peer_t* peer, uint32_t mtu) noexcept nogil:
    """Lower the peer's path MTU (outer bytes). Raising it is left to the control side's clock."""
    cdef uint32_t low = MIN_PATH_MTU4 if peer.addr_len == 4 else MIN_PATH_MTU6
    if mtu == 0:
        mtu = UNKNOWN_MTU4
    if mtu < low:
        mtu = low
    if mtu >= peer.path_mtu:
        return
    peer.path_mtu = mtu
    peer.path_mtu_ns = w.now
    raise_event(w, EVENT_PATH_MTU)


cdef inline bint read_errors(worker_t* w, int fd) noexcept nogil:
    """Empty the socket's error queue, and learn path MTUs from it. False: it was empty."""
    cdef msghdr msg
    cdef sockaddr_in6 dest
    cdef uint8_t control[512]
    cdef cmsghdr* c
    cdef sock_extended_err err
    cdef const uint8_t* addr
    cdef size_t addr_len
    cdef uint32_t mtu
    cdef bint found
    cdef peer_t* peer
    cdef int i
    for i in range(1024):
        memset(&msg, 0, sizeof(msg))
        msg.msg_name = &dest
        msg.msg_namelen = sizeof(dest)
        msg.msg_control = control
        msg.msg_controllen = sizeof(control)
        if recvmsg(fd, &msg, MSG_ERRQUEUE | MSG_DONTWAIT) < 0:
            if errno == EINTR:
                continue
            return i != 0
        found = False
        mtu = 0
        c = CMSG_FIRSTHDR(&msg)
        while c != NULL:
            if (
                (c.cmsg_level == IPPROTO_IP and c.cmsg_type == IP_RECVERR)
                or (c.cmsg_level == IPPROTO_IPV6 and c.cmsg_type == IPV6_RECVERR)
            ) and c.cmsg_len >= CMSG_LEN(sizeof(err)):
                memcpy(&err, CMSG_DATA(c), sizeof(err))
                if err.ee_errno == EMSGSIZE and (
                    err.ee_origin == SO_EE_ORIGIN_LOCAL or err.ee_origin == SO_EE_ORIGIN_ICMP
                    or err.ee_origin == SO_EE_ORIGIN_ICMP6
                ):
                    mtu = err.ee_info
                    found = True
            c = CMSG_NXTHDR(&msg, c)
        if not found or msg.msg_namelen == 0:
            continue
        if dest.sin6_family == AF_INET:
            addr = <const uint8_t*>&(<sockaddr_in*>&dest).sin_addr
            addr_len = 4
        else:
            addr = <const uint8_t*>&dest.sin6_addr
            addr_len = 16
        peer = addr_map_find(&w.snapshot.peers, addr, addr_len).peer
        while peer != NULL:
            learn_path_mtu(w, peer, mtu)
            peer = peer.same_addr
    return True


cdef inline uint32_t build_messages(
    worker_t* w, int fd, uint32_t bucket_i, int32_t seg_i, uint32_t run_max
) noexcept nogil:
    """Describe waiting segments as at most TX_MSGS messages, from segment seg_i of bucket
    bucket_i on, for the peers of one socket. Returns how many messages."""
    cdef uint32_t n = 0, iov_n = 0, run, total, size
    cdef uint8_t* end               # of the last piece
    cdef bucket_t* bucket
    cdef seg_t* seg
    cdef msghdr* msg
    cdef cmsghdr* c
    cdef uint16_t gso
    while bucket_i < w.buckets_n and n < TX_MSGS:
        bucket = &w.buckets[bucket_i]
        bucket_i += 1
        if udp_fd(w, bucket.peer) != fd:
            continue
        if seg_i < 0:
            seg_i = bucket.first
        while seg_i >= 0 and n < TX_MSGS:
            msg = &w.tx_msgs[n].msg_hdr
            msg.msg_name = &bucket.peer.sa
            msg.msg_namelen = bucket.peer.sa_len
            msg.msg_iov = &w.tx_iov[iov_n]
            msg.msg_iovlen = 0
            msg.msg_control = NULL
            msg.msg_controllen = 0
            msg.msg_flags = 0
            run = total = 0
            size = w.segs[seg_i].len
            end = NULL
            while seg_i >= 0 and run < run_max:
                seg = &w.segs[seg_i]
                if run != 0 and (seg.len > size or total + seg.len > MAX_UDP_PAYLOAD):
                    break
                if seg.data == end:
                    w.tx_iov[iov_n - 1].iov_len += seg.len
                else:
                    w.tx_iov[iov_n].iov_base = seg.data
                    w.tx_iov[iov_n].iov_len = seg.len
                    iov_n += 1
                end = seg.data + seg.len
                run += 1
                total += seg.len
                seg_i = seg.next
                if seg.len < size:
                    break
            msg.msg_iovlen = &w.tx_iov[iov_n] - msg.msg_iov
            if run > 1:
                msg.msg_control = &w.tx_cmsg[n][0]
                msg.msg_controllen = CMSG_SPACE(sizeof(gso))
                c = CMSG_FIRSTHDR(msg)
                c.cmsg_level = IPPROTO_UDP
                c.cmsg_type = UDP_SEGMENT
                c.cmsg_len = CMSG_LEN(sizeof(gso))
                gso = <uint16_t>size
                memcpy(CMSG_DATA(c), &gso, sizeof(gso))
            w.tx_runs[n].n = run
            w.tx_runs[n].bytes_ = total
            w.tx_runs[n].next = seg_i
            n += 1
        if seg_i >= 0:
            break
    return n


cdef inline void account(
    worker_t* w, bucket_t* bucket, const run_t* run, drop_t verdict
) noexcept nogil:
    """A run has left the queue: sent (PASS), or dropped."""
    cdef peer_counters_t* counters = &bucket.peer.counters[w.index]
    w.encap.queued -= run.n
    bucket.first = run.next
    if verdict != PASS:
        count_drop(&w.encap, verdict, run.n)
        return
    w.encap.delivered += run.n
    counters.encap_packets += run.n
    counters.encap_bytes += run.bytes_


cdef inline bint flush_socket(worker_t* w, int fd) noexcept nogil:
    """Send what waits for the peers of one socket. False: the socket is full, the rest waits."""
    cdef uint32_t n, i, bucket_i = 0, run_max, tries = 0
    cdef int sent, e
    cdef bucket_t* bucket
    cdef bint one_by_one = False        # until something was sent
    cdef bint doubt = False             # a run was refused: will its packets go singly?
    while True:
        while bucket_i < w.buckets_n and (
            w.buckets[bucket_i].first < 0 or udp_fd(w, w.buckets[bucket_i].peer) != fd
        ):
            bucket_i += 1
        if bucket_i == w.buckets_n:
            return True
        run_max = w.gso_max_segs if w.udp_gso and not one_by_one else 1
        n = build_messages(w, fd, bucket_i, w.buckets[bucket_i].first, run_max)
        w.syscalls_send += 1
        sent = sendmmsg(fd, w.tx_msgs, n, MSG_DONTWAIT | MSG_NOSIGNAL)
        e = errno
        for i in range(<uint32_t>sent if sent > 0 else 0):
            while w.buckets[bucket_i].first < 0 or udp_fd(w, w.buckets[bucket_i].peer) != fd:
                bucket_i += 1
            account(w, &w.buckets[bucket_i], &w.tx_runs[i], PASS)
        if sent > 0:
            if <uint32_t>sent < n:
                read_errors(w, fd)  # why the next one stopped is told there only
            if doubt:
                w.udp_gso = False
                raise_event(w, EVENT_UDP_GSO)
            tries = 0
            one_by_one = doubt = False
            continue

        bucket = &w.buckets[bucket_i]
        if e == EINTR:
            continue
        if e == EAGAIN:
            return False
        if w.tx_runs[0].n > 1:
            # a run was refused: the device cannot (EIO), the kernel does not know how, or its
            # segments are too long for the path (EMSGSIZE, on older kernels EINVAL too). The same
            # packets go again singly: when they do go, it was the run that was not wanted.
            if e == EIO or e == EINVAL or e == EOPNOTSUPP:
                one_by_one = doubt = True
                continue
            if e == EMSGSIZE:
                read_errors(w, fd)
                one_by_one = True
                continue
        doubt = False
        if e == ENOBUFS or e == ENOMEM:
            account(w, bucket, &w.tx_runs[0], DROP_NO_BUFFER)
        elif (read_errors(w, fd) and tries < RETRIES) or tries == 0:
            # an ICMP error about an earlier datagram, perhaps another peer's, is reported by the
            # next call and then forgotten: this datagram was not tried yet
            tries += 1
            continue
        else:
            account(
                w, bucket, &w.tx_runs[0], DROP_TOO_BIG if e == EMSGSIZE else DROP_SEND_ERROR
            )
        tries = 0


cdef inline bint flush(worker_t* w) noexcept nogil:
    """Send all that waits. False: a socket is full (which, says full4 and full6); call again when
    it is writable."""
    w.full4 = w.full6 = False
    if w.segs_n != 0:
        w.full4 = w.udp_fd4 >= 0 and not flush_socket(w, w.udp_fd4)
        w.full6 = w.udp_fd6 >= 0 and not flush_socket(w, w.udp_fd6)
    if w.full4 or w.full6:
        return False
    w.segs_n = w.buckets_n = w.tx_used = 0
    return True
