"""TUN to UDP: parse a frame, look up its route, cut it, and queue the datagrams.

Owns the path of a frame (``encap_frame``) and the draining of the TUN (``drain_tun``). The counters
count inner IP packets: a super-packet counts as the packets into which it is cut.
Threading: the worker's thread.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

from drops cimport (
    DROP_NO_BUFFER, DROP_NO_ROUTE, DROP_RECURSION, DROP_SHORT_PACKET, DROP_TOO_BIG,
    DROP_TTL_EXCEEDED, PASS, drop_t,
)
from path.icmp_reply cimport reply_to_tun
from path.own_socket cimport open_fragmenting
from path.queue cimport (
    QUEUE_FRAME_DATAGRAMS, queue_append, queue_append_copy, queue_is_full, queue_room,
)
from path.send cimport flush, make_room
from path.worker cimport (
    EVENT_TUN_GONE, TX_FRAME, capture_from_tun, drop_from_tun, is_capturing, raise_event, worker_t,
)
from sys cimport peek32, read
from table.peer cimport peer_t
from table.snapshot cimport find_hop, first_peer_at, hop_t, is_own, next_at_address, packet_limit
from wire.cut cimport (
    SEG_HDR_ROOM, complete_checksum, cut_header, cut_payload_len, cut_segment, cut_start, cut_t,
    is_super, plan_cut,
)
from wire.fragment cimport frag_t, fragment_at, fragment_n
from wire.headers cimport (
    IP4_FRAG, IP4_OFFSET, PROTO_UDP, UDP_LEN, UDP_LENGTH, VNET_GSO_SIZE, VNET_LEN, load_be16,
    load_u16, store_be16,
)
from wire.icmp cimport ICMP_NO_ROUTE, ICMP_TOO_BIG, ICMP_TTL_EXCEEDED
from wire.packet cimport (
    EXT_FRAGMENT, check_total_len, decrement_hop_limit, hop_limit_spent, ip_src, ip_t, parse_ip,
)


cdef enum:
    # A turn ends after this number of frames, or, if they go to more than FEW_PEERS peers, after
    # LONG_TURN_FRAMES: otherwise the runs to each peer would be short.
    TURN_FRAMES = 256
    FEW_PEERS = 16
    LONG_TURN_FRAMES = 1024
    TURN_BYTES = 262144         # a turn ends after this number of bytes


cdef struct frame_t:            # one frame from the TUN; each step sets its fields
    uint8_t* p                  # the IP packet, borrowed until the next read
    size_t n                    # bytes of the packet
    bint is_super
    ip_t ip
    cut_t cut                   # cut.n: packets in the frame; other fields: only if is_super
    hop_t* hop
    uint32_t limit              # the largest inner packet on the path to the peer
    bint too_big                # a packet exceeds the limit: it is dropped (DF) or fragmented
    bint fragments              # the datagrams may be fragmented, see own_socket.pxd


# The steps of encap_frame


cdef inline drop_t parse_frame(
    frame_t* f, uint8_t* frame, size_t n, uint32_t vnet_len
) noexcept nogil:
    """Validate the vnet header and the IP packet of frame[0:n]. Complete the checksum if the kernel
    left this to the device."""
    cdef drop_t verdict
    f.cut.n = 1
    f.limit = 0
    if n < vnet_len:
        f.p, f.n, f.is_super = frame, n, False
        return DROP_SHORT_PACKET
    f.p = frame + vnet_len
    f.n = n - vnet_len
    f.is_super = vnet_len != 0 and is_super(frame)
    verdict = parse_ip(f.p, f.n, &f.ip)
    if verdict != PASS:
        return verdict
    if f.is_super:
        return plan_cut(frame, f.p, f.n, &f.ip, &f.cut)
    verdict = check_total_len(&f.ip, f.n)
    if verdict != PASS:
        return verdict
    f.n = f.ip.total_len
    return complete_checksum(frame, f.p, f.n, &f.ip) if vnet_len != 0 else PASS


cdef inline drop_t find_route(worker_t* w, frame_t* f) noexcept nogil:
    f.hop = find_hop(w.snapshot, ip_src(f.p, &f.ip) + f.ip.addr_len, f.ip.addr_len)
    return PASS if f.hop != NULL else DROP_NO_ROUTE


cdef inline bint is_for_peer(const worker_t* w, const frame_t* f) noexcept nogil:
    """Return whether the packet is UDP from this host to the endpoint of a peer, which only a
    forwarder sends. Of a fragment other than the first, only the addresses are known."""
    cdef const uint8_t* src = ip_src(f.p, &f.ip)
    cdef size_t at = f.ip.hdr_len
    cdef uint8_t proto = f.ip.proto
    cdef bint first = True
    cdef peer_t* peer
    if f.ip.version == 4:
        first = load_be16(f.p + IP4_FRAG) & IP4_OFFSET == 0
    elif proto == EXT_FRAGMENT and f.n >= at + 8:
        proto = f.p[at]
        first = load_be16(f.p + at + 2) >> 3 == 0
        at += 8
    if proto != PROTO_UDP or (first and f.n < at + UDP_LEN):
        return False
    if not is_own(w.snapshot, src, f.ip.addr_len):
        return False
    peer = first_peer_at(w.snapshot, src + f.ip.addr_len, f.ip.addr_len)
    while peer != NULL and first and peer.port != load_be16(f.p + at + 2):
        peer = next_at_address(peer)
    return peer != NULL


cdef inline drop_t check_recursion(const worker_t* w, const frame_t* f) noexcept nogil:
    """Drop a datagram of our own that was routed back into the TUN. Without this check, it would be
    sent again, in a datagram that comes back again. It can come back only if a route covers the
    endpoint of its peer. The source port is not compared: masquerading may have changed it."""
    return DROP_RECURSION if f.hop.has_endpoint and is_for_peer(w, f) else PASS


cdef inline drop_t check_hop_limit(const frame_t* f) noexcept nogil:
    return DROP_TTL_EXCEEDED if hop_limit_spent(f.p, f.ip.version) else PASS


cdef inline drop_t check_size(worker_t* w, frame_t* f) noexcept nogil:
    """Drop a packet that is too long. Whether its datagrams may be fragmented depends on the limit,
    not on the packet: datagrams of one flow must leave from one socket, to stay in order."""
    cdef uint32_t longest = <uint32_t>f.n
    if f.is_super:
        longest = f.cut.hdr_len + f.cut.gso_size
    f.limit = packet_limit(f.hop, f.ip.version)
    f.too_big = longest > f.limit
    f.fragments = f.limit + f.hop.peer.overhead > peek32(&f.hop.peer.df_mtu) \
        and open_fragmenting(w, f.hop.peer.addr_len)
    return DROP_TOO_BIG if f.too_big and f.ip.dont_fragment else PASS


cdef inline uint16_t segment_of(const frame_t* f) noexcept nogil:
    """Return the payload bytes of each segment of a super-packet, as the kernel declares them; 0
    for a packet."""
    return load_u16(f.p - VNET_LEN + VNET_GSO_SIZE) if f.is_super else 0


cdef inline void set_udp_length(frame_t* f, bint restore) noexcept nogil:
    """Restore the length field of a UDP super-packet, or set it to zero again, as ``plan_cut`` has
    done. Wireshark does not accept a super-packet with zero."""
    if f.is_super and not f.cut.tcp:
        store_be16(
            f.p + f.cut.ip_hdr_len + UDP_LENGTH,
            <uint16_t>(UDP_LEN + f.cut.payload_len) if restore else 0,
        )


# A packet that is dropped


cdef inline uint32_t queue_last_segment(worker_t* w, frame_t* f) noexcept nogil:
    """Queue only the last segment of a super-packet, if this segment is within the limit. The full
    segments exceed the limit. Return the number of packets queued (0 or 1)."""
    cdef uint8_t* out = queue_room(&w.queue)
    cdef uint32_t last = f.cut.n - 1
    cdef uint32_t n
    if not f.is_super or f.cut.hdr_len + cut_payload_len(&f.cut, last) > f.limit:
        return 0
    cut_start(&f.cut, f.p)
    n = cut_segment(&f.cut, f.p, last, out)
    decrement_hop_limit(out, f.cut.version)
    queue_append(&w.queue, f.hop.peer, f.fragments, n)
    return 1


cdef inline void keep_first_segment(frame_t* f) noexcept nogil:
    """Replace a super-packet by its first segment, in place. An ICMP error must quote a packet as
    it would be on the wire, not a super-packet."""
    cdef uint8_t hdr[SEG_HDR_ROOM]
    cut_start(&f.cut, f.p)
    cut_header(&f.cut, f.p + f.cut.hdr_len, 0, hdr)
    memcpy(f.p, hdr, f.cut.hdr_len)
    f.n = f.cut.hdr_len + cut_payload_len(&f.cut, 0)


cdef inline int icmp_kind(drop_t reason) noexcept nogil:
    """Return the kind of ICMP error that reports a drop to the sender; -1: no error is sent."""
    if reason == DROP_NO_ROUTE:
        return ICMP_NO_ROUTE
    if reason == DROP_TTL_EXCEEDED:
        return ICMP_TTL_EXCEEDED
    if reason == DROP_TOO_BIG:
        return ICMP_TOO_BIG
    return -1


cdef inline void refuse(worker_t* w, frame_t* f, drop_t reason) noexcept nogil:
    """Drop the frame's packets. Send at most one ICMP error to the sender, about the first packet.
    """
    cdef uint32_t dropped = f.cut.n
    cdef int kind = icmp_kind(reason)
    cdef peer_t* peer = NULL
    if reason == DROP_RECURSION or reason == DROP_TTL_EXCEEDED or reason == DROP_TOO_BIG:
        peer = f.hop.peer  # these steps come after find_route
    if reason == DROP_TOO_BIG:
        dropped -= queue_last_segment(w, f)
    if peer != NULL or kind >= 0:  # the steps after ``plan_cut``
        set_udp_length(f, True)
        drop_from_tun(w, reason, dropped, f.p, f.n, peer, segment_of(f))
        set_udp_length(f, False)
    else:
        drop_from_tun(w, reason, dropped, f.p, f.n, NULL, segment_of(f))
    if kind < 0:
        return
    if f.is_super:
        keep_first_segment(f)
    reply_to_tun(w, f.p, f.n, f.ip.version, kind, f.limit)


# A packet that passes


cdef inline void capture_frame(worker_t* w, frame_t* f) noexcept nogil:
    set_udp_length(f, True)
    capture_from_tun(w, f.cut.n, f.p, f.n, segment_of(f), f.hop.peer, False)
    set_udp_length(f, False)


cdef inline void queue_segments(worker_t* w, frame_t* f) noexcept nogil:
    """Queue the segments of a super-packet."""
    cdef uint32_t i
    cut_start(&f.cut, f.p)
    if not make_room(w, f.cut.n):
        drop_from_tun(w, DROP_NO_BUFFER, f.cut.n, f.p, f.n, f.hop.peer, segment_of(f))
        return
    for i in range(f.cut.n):
        queue_append(
            &w.queue, f.hop.peer, f.fragments, cut_segment(&f.cut, f.p, i, queue_room(&w.queue))
        )


cdef inline void queue_fragments(
    worker_t* w, const frame_t* f, const uint8_t* hdr, uint32_t lead_len,
    const uint8_t* data, uint32_t data_len
) noexcept nogil:
    """Queue one IPv4 packet as fragments within the limit.

    hdr   the IP header, then lead_len bytes of transport header
    data  the rest of the packet
    """
    cdef uint32_t ip_hdr_len = f.ip.hdr_len
    cdef int n = fragment_n(ip_hdr_len, lead_len, data_len, f.limit)
    cdef uint8_t* out
    cdef frag_t frag
    cdef int i
    if n <= 0:
        drop_from_tun(w, DROP_TOO_BIG, 1, f.p, f.n, f.hop.peer)
        return
    if not make_room(w, n):
        drop_from_tun(w, DROP_NO_BUFFER, 1, f.p, f.n, f.hop.peer)
        return
    w.encap.generated += n - 1
    for i in range(n):
        out = queue_room(&w.queue)
        fragment_at(hdr, ip_hdr_len, lead_len, data, data_len, f.limit, i, out, &frag)
        memcpy(out + frag.hdr_len, frag.data, frag.data_len)
        queue_append(&w.queue, f.hop.peer, f.fragments, frag.hdr_len + frag.data_len)


cdef inline void queue_segment_fragments(worker_t* w, frame_t* f) noexcept nogil:
    """Queue the segments of a super-packet as fragments (IPv4 without DF). If the last segment is
    within the limit, queue it whole."""
    cdef uint8_t hdr[SEG_HDR_ROOM]
    cdef const uint8_t* payload
    cdef uint32_t i
    cut_start(&f.cut, f.p)
    for i in range(f.cut.n):
        payload = f.p + f.cut.hdr_len + i * f.cut.gso_size
        cut_header(&f.cut, payload, i, hdr)
        queue_fragments(
            w, f, hdr, f.cut.hdr_len - f.ip.hdr_len, payload, cut_payload_len(&f.cut, i)
        )


cdef inline void queue_frame(worker_t* w, frame_t* f) noexcept nogil:
    """Queue the frame's packets: one whole packet, segments of a super-packet, or fragments."""
    if f.is_super:
        if f.too_big:
            queue_segment_fragments(w, f)
        else:
            queue_segments(w, f)
    elif f.too_big:
        queue_fragments(w, f, f.p, 0, f.p + f.ip.hdr_len, <uint32_t>f.n - f.ip.hdr_len)
    else:
        queue_append_copy(&w.queue, f.hop.peer, f.fragments, f.p, <uint32_t>f.n)


# The path


cdef inline void encap_frame(worker_t* w, uint8_t* frame, size_t n) noexcept nogil:
    """Send one frame from the TUN to a peer, or drop it.

    frame  a vnet header (only if the TUN uses vnet headers), then an IP packet; overwritten
    """
    cdef frame_t f
    cdef drop_t verdict = parse_frame(&f, frame, n, w.vnet_len)
    w.encap.read += f.cut.n
    if verdict == PASS:
        verdict = find_route(w, &f)
    if verdict == PASS:
        verdict = check_recursion(w, &f)
    if verdict == PASS:
        verdict = check_hop_limit(&f)
    if verdict == PASS:
        verdict = check_size(w, &f)
    if verdict != PASS:
        refuse(w, &f, verdict)
        return
    if is_capturing(w):
        capture_frame(w, &f)
    decrement_hop_limit(f.p, f.ip.version)
    queue_frame(w, &f)


cdef inline uint32_t turn_frames(const worker_t* w) noexcept nogil:
    return TURN_FRAMES if w.queue.peers_n <= FEW_PEERS else LONG_TURN_FRAMES


cdef inline bint drain_tun(worker_t* w) noexcept nogil:
    """Read frames until the TUN is empty, a socket's buffer is full, or the turn's limit is
    reached. Return whether the TUN may hold more frames."""
    cdef uint32_t frames = 0
    cdef size_t bytes_ = 0
    cdef ssize_t n
    while frames < turn_frames(w) and bytes_ < TURN_BYTES:
        if queue_is_full(&w.queue, QUEUE_FRAME_DATAGRAMS) and not flush(w):
            return False
        w.syscalls_read += 1
        n = read(w.tun_fd, w.tx_frame, TX_FRAME)
        if n < 0:
            if errno == EINTR:
                continue
            if errno != EAGAIN:
                raise_event(w, EVENT_TUN_GONE)
            flush(w)
            return False
        if n == 0:
            raise_event(w, EVENT_TUN_GONE)
            return False
        frames += 1
        bytes_ += n
        encap_frame(w, w.tx_frame, n)
        if not w.batch and not flush(w):
            return False
    return flush(w)
