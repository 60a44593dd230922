"""UDP to TUN: split what arrived together, admit, merge, and write.

Owns the road in. Every datagram is hostile until ``admit`` has let its sender and its inner source
pass. Counted in inner IP packets: after splitting and before merging.
"""

from libc.errno cimport EAGAIN, EINVAL, errno
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from drops cimport (
    DROP_OWN_SOURCE, DROP_SOURCE_NOT_ROUTED, DROP_TRUNCATED, DROP_TTL_EXCEEDED, DROP_TUN_WRITE,
    DROP_UNKNOWN_PEER, PASS, drop_t,
)
from path.encap cimport make_icmp, path_limit
from wire.icmp cimport ICMP_TTL_EXCEEDED
from sys cimport (
    AF_INET, CMSG_DATA, CMSG_FIRSTHDR, CMSG_NXTHDR, IPPROTO_UDP, MSG_DONTWAIT, MSG_TRUNC, UDP_GRO,
    cmsghdr, mmsghdr, msghdr, recvmmsg, sockaddr_in, sockaddr_in6, write,
)
from wire.merge cimport (
    MERGE_PACKETS, merge_add, merge_frame, merge_packet_t, merge_reset, output_t,
)
from wire.packet cimport check_total_len, decrement_hop_limit, ip_src, ip_t, parse_ip
from table.peers cimport find_hop, find_peer, hop_t, is_own, peer_t
from path.send cimport queue_full, queue_segment, read_errors, segment_room
from wire.headers cimport load_be16
from path.worker cimport (
    CMSG_ROOM, EVENT_TCP_MERGE, EVENT_UDP_MERGE, RX_SET, RX_SLOT, RX_SLOTS, count_drop,
    raise_event,
    worker_t,
)


cdef enum:
    CHECK_OFF = 0               # source checks: flannel's way,
    CHECK_PEER = 1              # the outer source is a peer,
    CHECK_STRICT = 2            # and the inner source is routed to it
    RX_SLOTS_MIN = 4
    TRICKLE = 6                 # so many datagrams in a batch, none of them a run by its size,
    SINGLE = 2000               # say that more are on their way


cdef struct sender_t:           # of one datagram, and the inner source last looked at
    const uint8_t* addr         # outer, network order
    uint8_t addr_len
    peer_t* peer                # NULL: not a peer
    uint8_t seen_len            # 0: none yet
    uint8_t seen[16]
    drop_t verdict


cdef inline drop_t judge_source(
    const worker_t* w, const sender_t* from_, const uint8_t* src, size_t addr_len
) noexcept nogil:
    cdef hop_t* hop
    if is_own(w.snapshot, src, addr_len):
        return DROP_OWN_SOURCE
    if w.shared.source_check != CHECK_STRICT:
        return PASS
    hop = find_hop(w.snapshot, src, addr_len)
    if (
        hop != NULL and hop.peer.addr_len == from_.addr_len
        and memcmp(hop.peer.addr, from_.addr, from_.addr_len) == 0
    ):
        return PASS
    if addr_len == from_.addr_len and memcmp(src, from_.addr, addr_len) == 0:
        return PASS
    return DROP_SOURCE_NOT_ROUTED


cdef inline drop_t admit(
    const worker_t* w, sender_t* from_, const uint8_t* src, size_t addr_len
) noexcept nogil:
    """Whether this sender may send from this inner source. The packets of one datagram are mostly
    from one source, so the last answer is kept."""
    if from_.peer == NULL and w.shared.source_check != CHECK_OFF:
        return DROP_UNKNOWN_PEER
    if from_.seen_len != addr_len or memcmp(from_.seen, src, addr_len) != 0:
        from_.verdict = judge_source(w, from_, src, addr_len)
        from_.seen_len = <uint8_t>addr_len
        memcpy(from_.seen, src, addr_len)
    return from_.verdict


cdef inline void icmp_to_peer(
    worker_t* w, const uint8_t* p, size_t n, const ip_t* ip
) noexcept nogil:
    """Tell an inner sender behind a peer that its packet's hops ended here."""
    cdef hop_t* hop = find_hop(w.snapshot, ip_src(p, ip), ip.addr_len)
    cdef size_t made
    if hop == NULL or queue_full(w, 1):
        return
    made = make_icmp(w, p, n, ip, ICMP_TTL_EXCEEDED, 0, path_limit(hop), segment_room(w))
    if made == 0:
        return
    w.encap.generated += 1
    queue_segment(w, hop.peer, <uint32_t>made)


cdef inline void decap_packet(
    worker_t* w, sender_t* from_, uint8_t* p, size_t n
) noexcept nogil:
    """One inner packet: the road in, up to the coalescer. p is borrowed until the write. What
    stands behind the declared length is padding and goes no further."""
    cdef ip_t ip
    cdef drop_t verdict
    w.decap.read += 1
    verdict = parse_ip(p, n, &ip)
    if verdict == PASS:
        verdict = check_total_len(&ip, n)
    if verdict == PASS:
        verdict = admit(w, from_, ip_src(p, &ip), ip.addr_len)
    if verdict == PASS:
        verdict = decrement_hop_limit(p, ip.version)
        if verdict == DROP_TTL_EXCEEDED:
            icmp_to_peer(w, p, ip.total_len, &ip)
    if verdict != PASS:
        count_drop(&w.decap, verdict, 1)
        return
    merge_add(&w.merge, p, ip.total_len, &ip)


cdef inline void write_packets(worker_t* w, int32_t i) noexcept nogil:
    """Write packets, verbatim and each alone, from packet i on along its output."""
    cdef merge_packet_t* packet
    memset(w.wr_frame, 0, w.vnet_len)
    while i >= 0:
        packet = &w.merge.packets[i]
        memcpy(w.wr_frame + w.vnet_len, packet.data, packet.len)
        w.syscalls_write += 1
        if write(w.tun_fd, w.wr_frame, w.vnet_len + packet.len) < 0:
            count_drop(&w.decap, DROP_TUN_WRITE, 1)
        else:
            w.decap.delivered += 1
        i = packet.next


cdef inline void write_outputs(worker_t* w) noexcept nogil:
    """Write all that this turn received, in order. A merged write that the kernel refuses is
    written again packet by packet, and that kind of merging stays off."""
    cdef int32_t i
    cdef size_t n
    cdef output_t* out
    for i in range(w.merge.outputs_n):
        out = &w.merge.outputs[i]
        if out.n == 1:
            write_packets(w, out.first)
            continue
        n = merge_frame(&w.merge, out, w.wr_frame)
        w.syscalls_write += 1
        if write(w.tun_fd, w.wr_frame, n) >= 0:
            w.decap.delivered += out.n
            continue
        if errno == EINVAL:
            if out.tcp:
                w.merge.tcp = False
                raise_event(w, EVENT_TCP_MERGE)
            else:
                w.merge.udp = False
                raise_event(w, EVENT_UDP_MERGE)
        write_packets(w, out.first)
    merge_reset(&w.merge)


cdef inline uint32_t gro_size(msghdr* msg) noexcept nogil:
    """What the kernel merged on receive was in pieces of this size; 0: one datagram.
    The control message is an int (linux net/ipv4/udp.c, udp_cmsg_recv)."""
    cdef cmsghdr* c = CMSG_FIRSTHDR(msg)
    cdef int size = 0
    while c != NULL:
        if c.cmsg_level == IPPROTO_UDP and c.cmsg_type == UDP_GRO:
            memcpy(&size, CMSG_DATA(c), sizeof(size))
            return size if size > 0 else 0
        c = CMSG_NXTHDR(msg, c)
    return 0


cdef inline void decap_datagram(worker_t* w, mmsghdr* m, uint8_t* p) noexcept nogil:
    """One received datagram, or a run that the kernel merged: split it and take each packet."""
    cdef size_t n = m.msg_len
    cdef sockaddr_in6* sa = <sockaddr_in6*>m.msg_hdr.msg_name
    cdef sockaddr_in* sa4 = <sockaddr_in*>sa
    cdef uint32_t size = gro_size(&m.msg_hdr)
    cdef uint64_t packets = w.decap.read
    cdef uint64_t bytes_ = n
    cdef size_t piece
    cdef sender_t from_
    cdef uint16_t port
    if m.msg_hdr.msg_flags & MSG_TRUNC:
        w.decap.read += 1
        count_drop(&w.decap, DROP_TRUNCATED, 1)
        return
    if sa.sin6_family == AF_INET:
        from_.addr = <const uint8_t*>&sa4.sin_addr
        from_.addr_len = 4
        port = load_be16(<const uint8_t*>&sa4.sin_port)
    else:
        from_.addr = <const uint8_t*>&sa.sin6_addr
        from_.addr_len = 16
        port = load_be16(<const uint8_t*>&sa.sin6_port)
    from_.peer = find_peer(w.snapshot, from_.addr, from_.addr_len, port)
    from_.seen_len = 0
    if size == 0:
        size = <uint32_t>n
    while True:
        piece = n if n < size else size
        decap_packet(w, &from_, p, piece)
        if w.merge.packets_n == MERGE_PACKETS:
            write_outputs(w)
        p += piece
        n -= piece
        if n == 0:
            break
    if from_.peer != NULL:
        from_.peer.counters[w.index].decap_packets += w.decap.read - packets
        from_.peer.counters[w.index].decap_bytes += bytes_
        from_.peer.counters[w.index].last_seen_ns = w.now


cdef inline bint receive(worker_t* w, int fd) noexcept nogil:
    """Receive a batch from one socket and write it to the TUN. True: there may be more.

    The number of slots follows the size of what came last, so that one batch stays in cache:
    64 small datagrams, or a few merged runs.
    """
    cdef uint32_t slots = w.rx_slots
    cdef uint32_t i, fitting
    cdef uint64_t bytes_ = 0
    cdef mmsghdr* m
    cdef int n
    for i in range(slots):
        m = &w.rx_msgs[i]
        m.msg_hdr.msg_namelen = sizeof(sockaddr_in6)
        m.msg_hdr.msg_controllen = CMSG_ROOM
        m.msg_hdr.msg_flags = 0
    w.syscalls_recv += 1
    n = recvmmsg(fd, w.rx_msgs, slots, MSG_DONTWAIT, NULL)
    if n < 0:
        if errno == EAGAIN:
            return False
        # an ICMP error about something we sent is reported once, in place of data
        read_errors(w, fd)
        return False
    for i in range(n):
        bytes_ += w.rx_msgs[i].msg_len
        decap_datagram(w, &w.rx_msgs[i], w.rx_buf + i * RX_SLOT)
    write_outputs(w)
    if w.batch and n > 0:
        w.trickle = n >= TRICKLE and bytes_ < <uint64_t>n * SINGLE
        fitting = <uint32_t>(RX_SET // (bytes_ // n + 1))
        w.rx_slots = min(max(fitting, <uint32_t>RX_SLOTS_MIN), <uint32_t>RX_SLOTS)
    return <uint32_t>n == slots
