"""UDP to TUN: split received runs, consume probes, admit each packet, merge packets, write them.

Owns the path of a received datagram. A datagram is untrusted until ``admit`` accepts its sender and
its inner source. The counters count inner IP packets, after splitting and before merging.
Threading: the worker's thread.
"""

from libc.errno cimport EAGAIN, EINVAL, errno
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from drops cimport (
    DROP_BAD_VERSION, DROP_DESTINATION_NOT_OWN, DROP_OWN_SOURCE, DROP_SOURCE_NOT_ROUTED,
    DROP_SOURCE_PORT, DROP_TRUNCATED, DROP_TTL_EXCEEDED, DROP_TUN_WRITE, DROP_UNKNOWN_PEER, PASS,
    drop_t,
)
from limits cimport MIN_MTU6
from path.icmp_reply cimport reply_to_peer
from path.probe cimport take_probe
from path.send cimport read_errors
from path.refused_senders cimport count_refused_sender
from path.worker cimport (
    CMSG_ROOM, EVENT_TCP_MERGE, EVENT_UDP_MERGE, RX_BATCH_BYTES, RX_SLOT, RX_SLOTS,
    capture_from_udp, drop_from_udp, is_capturing, raise_event, worker_t,
)
from sys cimport (
    AF_INET, CMSG_DATA, CMSG_FIRSTHDR, CMSG_NXTHDR, IP_TOS, IPPROTO_IP, IPPROTO_IPV6, IPPROTO_UDP,
    IPV6_TCLASS, MSG_DONTWAIT, MSG_TRUNC, UDP_GRO, cmsghdr, mmsghdr, msghdr, peek32, recvmmsg,
    sockaddr_in, sockaddr_in6, write,
)
from table.peer cimport peer_counters_t, peer_t
from table.snapshot cimport find_hop, find_peer, hop_admits, hop_t, is_own, may_send_from
from wire.cut cimport MAX_SEG_HDR, cut_segment, cut_start, cut_t, plan_cut
from wire.ecn cimport ECN_BITS, ECN_NOT_ECT, take_ecn
from wire.finish cimport finish_checksum
from wire.headers cimport (
    GSO_TCPV4, GSO_TCPV6, PROTO_TCP, VNET_GSO_SIZE, VNET_GSO_TYPE, VNET_LEN, load_be16, store_u16,
)
from wire.merge cimport (
    MERGE_PACKETS, merge_add, merge_frame, merge_packet_t, merge_reset, output_t,
)
from wire.packet cimport check_total_len, decrement_hop_limit, ip_src, ip_t, parse_ip
from wire.net cimport in_net
from wire.probe cimport is_probe


cdef enum:
    CHECK_OFF = 0               # no source check, as in flannel
    CHECK_PEER = 1              # the outer source address must belong to a peer
    # also, the outer source port must be the peer's, and the inner source must be routed to it
    CHECK_STRICT = 2
    RX_SLOTS_MIN = 4
    # The batching delay (turn.pxd) can follow a batch only if both conditions are true:
    SMALL_BATCH_MIN = 6         # the batch has at least this number of datagrams
    SMALL_DATAGRAM = 2000       # the average datagram has fewer bytes than this


cdef struct sender_t:           # the sender of one datagram; caches the last result of admit
    const uint8_t* addr         # outer source address, network order
    uint8_t addr_len
    peer_t* peer                # NULL: the sender is not a peer
    mmsghdr* message            # the datagram
    drop_t refusal              # PASS, or why nothing from this sender is accepted
    uint16_t port               # host order
    uint8_t ecn                 # the ECN field of the outer header
    bint express                # the peer's kernel may have sent the packet
    bint heard                  # the datagram has an accepted packet or probe, or is a keepalive
    uint32_t probes_n           # probes in the message
    uint32_t probes_bytes       # bytes of these probes
    uint64_t cut_bytes          # bytes of the headers that cuts of super-packets have added
    uint8_t inner_len           # bytes of one inner address; 0: no result is cached yet
    uint8_t inner[32]           # inner source and destination of the cached result
    drop_t verdict


# Write to the TUN


cdef inline void write_packet(worker_t* w, const uint8_t* p, size_t n) noexcept nogil:
    """Write the first w.vnet_len + n bytes of w.wr_frame, which have the packet p[0:n]."""
    w.syscalls_write += 1
    if write(w.tun_fd, w.wr_frame, w.vnet_len + n) < 0:
        drop_from_udp(w, DROP_TUN_WRITE, p, n, NULL, 0, 0)
    else:
        w.decap.delivered += 1


cdef inline void write_packets(worker_t* w, int32_t i) noexcept nogil:
    """Write packet i and all later packets of the same output, unchanged, one frame each."""
    cdef merge_packet_t* packet
    memset(w.wr_frame, 0, w.vnet_len)
    while i >= 0:
        packet = &w.merge.packets[i]
        memcpy(w.wr_frame + w.vnet_len, packet.data, packet.len)
        write_packet(w, packet.data, packet.len)
        i = packet.next


cdef inline void disable_merge(worker_t* w, bint tcp) noexcept nogil:
    if tcp:
        w.merge.tcp = False
        raise_event(w, EVENT_TCP_MERGE)
    else:
        w.merge.udp = False
        raise_event(w, EVENT_UDP_MERGE)


cdef inline void write_outputs(worker_t* w) noexcept nogil:
    """Write all outputs of the merge step to the TUN, in order. If the kernel refuses a merged
    frame, write the frame's packets one by one. If the error is EINVAL, also turn merging off for
    the protocol of the frame (TCP or UDP)."""
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
            disable_merge(w, out.tcp)
        write_packets(w, out.first)
    merge_reset(&w.merge)


cdef inline bint write_cut(
    worker_t* w, sender_t* sender, uint8_t* p, const ip_t* ip
) noexcept nogil:
    """Cut the super-packet p[0:ip.total_len] and write its segments. Return False, and write
    nothing, if it is not TCP or its headers do not parse. Count the segments as read, except one,
    which the caller has counted.

    The sender's size of the segments is not known. Each segment here is short enough for all links
    that carry IPv6 (RFC 8200 5).
    """
    cdef uint8_t[VNET_LEN] vnet
    cdef cut_t cut
    cdef uint32_t i, n
    if ip.proto != PROTO_TCP:
        return False
    memset(vnet, 0, VNET_LEN)
    vnet[VNET_GSO_TYPE] = GSO_TCPV4 if ip.version == 4 else GSO_TCPV6
    store_u16(vnet + VNET_GSO_SIZE, MIN_MTU6 - MAX_SEG_HDR)
    if plan_cut(vnet, p, ip.total_len, ip, &cut) != PASS:
        return False
    cut_start(&cut, p)
    write_outputs(w)  # the packets that arrived earlier come first
    w.decap.read += cut.n - 1
    sender.cut_bytes += (cut.n - 1) * cut.hdr_len
    memset(w.wr_frame, 0, w.vnet_len)
    for i in range(cut.n):
        n = cut_segment(&cut, p, i, w.wr_frame + w.vnet_len)
        write_packet(w, w.wr_frame + w.vnet_len, n)
    return True


# Each packet


cdef inline bint is_from(const sender_t* sender, const peer_t* peer) noexcept nogil:
    """Return whether the sender has the address of this peer."""
    return sender.peer == peer or (
        peer.addr_len == sender.addr_len
        and memcmp(peer.addr, sender.addr, sender.addr_len) == 0
    )


cdef inline drop_t check_source(
    const worker_t* w, const sender_t* sender, const uint8_t* src, size_t addr_len
) noexcept nogil:
    """Return PASS if the peer may use this inner source address, else the drop reason. A peer may
    always use its own outer address as the inner source address."""
    cdef hop_t* hop
    if is_own(w.snapshot, src, addr_len):
        return DROP_OWN_SOURCE
    if w.shared.source_check != CHECK_STRICT:
        return PASS
    hop = find_hop(w.snapshot, src, addr_len)
    if hop != NULL and is_from(sender, hop.peer) and hop_admits(hop, sender.port):
        return PASS
    if addr_len == sender.addr_len and memcmp(src, sender.addr, addr_len) == 0:
        return PASS
    return DROP_SOURCE_NOT_ROUTED


cdef inline drop_t check_destination(
    const worker_t* w, const uint8_t* dst, size_t addr_len
) noexcept nogil:
    """Return PASS if packets to this inner address are delivered, else the drop reason."""
    cdef uint32_t i
    for i in range(w.shared.own_nets_n):
        if in_net(&w.shared.own_nets[i], dst, addr_len):
            return PASS
    return DROP_DESTINATION_NOT_OWN


cdef inline drop_t admit(
    const worker_t* w, sender_t* sender, const uint8_t* addrs, size_t addr_len
) noexcept nogil:
    """Return PASS if this sender may use this inner source address and this host delivers to this
    inner destination address, else the drop reason. Most packets of one run have the same
    addresses, so the last result is cached.

    addrs  the inner source address, then the inner destination address
    """
    if sender.refusal != PASS:
        return sender.refusal
    if sender.inner_len != addr_len or memcmp(sender.inner, addrs, 2 * addr_len) != 0:
        sender.verdict = check_source(w, sender, addrs, addr_len)
        if sender.verdict == PASS and w.shared.admit_own:
            sender.verdict = check_destination(w, addrs + addr_len, addr_len)
        sender.inner_len = <uint8_t>addr_len
        memcpy(sender.inner, addrs, 2 * addr_len)
    return sender.verdict


cdef inline drop_t consume(worker_t* w, sender_t* sender, uint8_t* p, size_t n) noexcept nogil:
    """Consume a probe. Return PASS if it was one, else the drop reason."""
    cdef msghdr* message = &sender.message.msg_hdr
    cdef drop_t verdict = DROP_BAD_VERSION
    if is_probe(p, n):
        verdict = take_probe(
            w, sender.peer, sender.refusal, sender.port, message.msg_name, message.msg_namelen, p, n
        )
    if verdict == PASS:
        sender.heard = True
        sender.probes_n += 1
        sender.probes_bytes += <uint32_t>n
        w.decap.consumed += 1
    return verdict


cdef inline void decap_packet(
    worker_t* w, sender_t* sender, uint8_t* p, size_t n
) noexcept nogil:
    """Pass one inner packet to the merge step, consume a probe, or drop it. p[0:n] is borrowed
    until the outputs are written. Bytes after the declared length are padding and are removed."""
    cdef ip_t ip
    cdef bint unfinished
    cdef drop_t verdict = parse_ip(p, n, &ip)
    w.decap.read += 1
    if verdict == DROP_BAD_VERSION:  # not an IP packet, but it may be a probe
        verdict = consume(w, sender, p, n)
        if verdict == PASS:
            return
    if verdict == PASS:
        verdict = check_total_len(&ip, n)
    if verdict == PASS:
        verdict = admit(w, sender, ip_src(p, &ip), ip.addr_len)
    if verdict == PASS and sender.ecn != ECN_NOT_ECT:
        verdict = take_ecn(p, ip.version, sender.ecn, &w.ecn)
    if verdict == PASS:
        verdict = decrement_hop_limit(p, ip.version)
        if verdict == DROP_TTL_EXCEEDED:
            reply_to_peer(w, p, ip.total_len, &ip)
    if verdict != PASS:
        drop_from_udp(w, verdict, p, n, sender.addr, sender.addr_len, sender.port)
        return
    sender.heard = True
    unfinished = sender.express and finish_checksum(p, &ip)
    if is_capturing(w):
        capture_from_udp(w, p, ip.total_len, sender.addr, sender.addr_len, sender.port, False)
    if unfinished and ip.total_len > peek32(&w.shared.tun_mtu) and write_cut(w, sender, p, &ip):
        return
    merge_add(&w.merge, p, ip.total_len, &ip)


# Each datagram


cdef inline uint8_t read_control(msghdr* msg, uint32_t* gro_size) noexcept nogil:
    """Read the control messages of a message. Return the ECN field of its datagrams.

    gro_size  output: the size of the datagrams that UDP_GRO joined; 0: it is one datagram. The
              control message is an int (linux net/ipv4/udp.c, udp_cmsg_recv)

    UDP_GRO joins only datagrams with the same ECN field (docs/datapath.md). IP_TOS has one byte,
    IPV6_TCLASS is an int.
    """
    cdef cmsghdr* c = CMSG_FIRSTHDR(msg)
    cdef uint8_t ecn = ECN_NOT_ECT
    cdef int size = 0
    while c != NULL:
        if c.cmsg_level == IPPROTO_UDP and c.cmsg_type == UDP_GRO:
            memcpy(&size, CMSG_DATA(c), sizeof(size))
        elif (c.cmsg_level == IPPROTO_IP and c.cmsg_type == IP_TOS) \
                or (c.cmsg_level == IPPROTO_IPV6 and c.cmsg_type == IPV6_TCLASS):
            ecn = CMSG_DATA(c)[0] & ECN_BITS
        c = CMSG_NXTHDR(msg, c)
    gro_size[0] = size if size > 0 else 0
    return ecn


cdef inline drop_t check_sender(const worker_t* w, const sender_t* sender) noexcept nogil:
    """Return PASS if packets and probes from this endpoint may be accepted, else the drop reason.
    """
    if w.shared.source_check == CHECK_OFF:
        return PASS
    if sender.peer == NULL:
        return DROP_UNKNOWN_PEER
    if (
        w.shared.source_check == CHECK_STRICT and sender.port != sender.peer.port
        and not may_send_from(w.snapshot, sender.addr, sender.addr_len, sender.port)
    ):
        return DROP_SOURCE_PORT
    return PASS


cdef inline void find_sender(
    const worker_t* w, sender_t* sender, mmsghdr* m
) noexcept nogil:
    """Set the outer source endpoint of the sender, the peer that has its address, and whether the
    sender is refused."""
    cdef sockaddr_in6* sa = <sockaddr_in6*>m.msg_hdr.msg_name
    cdef sockaddr_in* sa4 = <sockaddr_in*>sa
    sender.message = m
    sender.probes_n = sender.probes_bytes = 0
    sender.cut_bytes = 0
    if sa.sin6_family == AF_INET:
        sender.addr = <const uint8_t*>&sa4.sin_addr
        sender.addr_len = 4
        sender.port = load_be16(<const uint8_t*>&sa4.sin_port)
    else:
        sender.addr = <const uint8_t*>&sa.sin6_addr
        sender.addr_len = 16
        sender.port = load_be16(<const uint8_t*>&sa.sin6_port)
    sender.peer = find_peer(w.snapshot, sender.addr, sender.addr_len, sender.port)
    sender.refusal = check_sender(w, sender)
    sender.express = w.shared.all_express or (
        sender.peer != NULL and peek32(&sender.peer.express) != 0)
    sender.heard = m.msg_len == 0  # an empty datagram is a keepalive
    sender.inner_len = 0


cdef inline void decap_datagram(worker_t* w, mmsghdr* m, uint8_t* p) noexcept nogil:
    """Pass on the packets of one received datagram, or of a run that UDP_GRO joined."""
    cdef size_t n = m.msg_len
    cdef uint32_t size
    cdef uint64_t read_before = w.decap.read
    cdef uint64_t refused_before, refused
    cdef size_t piece
    cdef sender_t sender
    cdef peer_counters_t* counters
    find_sender(w, &sender, m)
    sender.ecn = read_control(&m.msg_hdr, &size)
    if m.msg_hdr.msg_flags & MSG_TRUNC:
        w.decap.read += 1
        drop_from_udp(
            w, DROP_TRUNCATED, p, min(n, <size_t>RX_SLOT), sender.addr, sender.addr_len, sender.port
        )
        return
    refused_before = w.decap.drops[<int>sender.refusal]
    if size == 0:
        size = <uint32_t>n
    while True:
        piece = n if n < size else size
        decap_packet(w, &sender, p, piece)
        if w.merge.packets_n == MERGE_PACKETS:
            write_outputs(w)
        p += piece
        n -= piece
        if n == 0:
            break
    if sender.refusal != PASS:
        refused = w.decap.drops[<int>sender.refusal] - refused_before
        if refused != 0:
            count_refused_sender(
                &w.refused_senders, sender.addr, sender.addr_len, sender.port,
                <uint8_t>sender.refusal,
                refused, w.now
            )
    elif sender.peer != NULL:
        counters = &sender.peer.counters[w.index]
        counters.decap_packets += w.decap.read - read_before - sender.probes_n
        counters.decap_bytes += m.msg_len - sender.probes_bytes + sender.cut_bytes
        if sender.heard:
            counters.last_seen_ns = w.now


# Each batch


cdef inline void adapt_batch(worker_t* w, uint32_t n, uint64_t bytes_) noexcept nogil:
    """After a batch of n datagrams, set the number of slots of the next batch, and small_packets.
    The next batch has 64 slots after small datagrams, and few slots after joined runs, so that its
    data stays in the CPU cache."""
    cdef uint32_t fitting
    if not w.batch or n == 0:
        return
    w.small_packets = n >= SMALL_BATCH_MIN and bytes_ < <uint64_t>n * SMALL_DATAGRAM
    fitting = <uint32_t>(RX_BATCH_BYTES // (bytes_ // n + 1))
    w.rx_slots = min(max(fitting, <uint32_t>RX_SLOTS_MIN), <uint32_t>RX_SLOTS)


cdef inline bint receive(worker_t* w, int fd) noexcept nogil:
    """Receive a batch from one socket and write its packets to the TUN. Return whether the socket
    may hold more datagrams."""
    cdef uint32_t slots = w.rx_slots
    cdef uint32_t i
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
        read_errors(w, fd)  # the error belongs to a datagram that we sent (ICMP)
        return True
    for i in range(n):
        bytes_ += w.rx_msgs[i].msg_len
        decap_datagram(w, &w.rx_msgs[i], w.rx_buf + i * RX_SLOT)
    write_outputs(w)
    adapt_batch(w, n, bytes_)
    return <uint32_t>n == slots
