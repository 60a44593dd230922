"""TUN to UDP: parse, look up, cut, and let the datagrams wait for the next flush.

Owns the road of one frame out (``encap_frame``) and the draining of the TUN (``drain_tun``).
Counted in inner IP packets: a super-packet counts as the packets it is cut into.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset

from wire.cut cimport (
    SEG_HDR_ROOM, complete_checksum, cut_header, cut_payload_len, cut_segment, cut_start, cut_t,
    is_super, plan_cut,
)
from drops cimport (
    DROP_NO_BUFFER, DROP_NO_ROUTE, DROP_SHORT_PACKET, DROP_TOO_BIG, DROP_TTL_EXCEEDED,
    DROP_TUN_WRITE, PASS, drop_t,
)
from wire.fragment cimport frag_t, fragment_at, fragment_n
from wire.icmp cimport (
    ICMP_KINDS_N, ICMP_MAX, ICMP_NO_ROUTE, ICMP_TOO_BIG, ICMP_TTL_EXCEEDED, icmp_allow, icmp_error,
)
from sys cimport read, write
from wire.packet cimport (
    check_total_len, decrement_hop_limit, hop_limit_spent, ip_src, ip_t, parse_ip,
)
from table.peers cimport find_hop, hop_t, peer_t
from path.send cimport flush, queue_full, queue_packet, queue_segment, segment_room
from path.worker cimport (
    EVENT_TUN_GONE, TX_FRAME, TX_FRAME_SEGS, TX_SEGS, count_drop,
    raise_event, worker_t,
)


cdef enum:
    TUN_FRAMES = 256            # of one turn
    TUN_BYTES = 262144


cdef inline size_t make_icmp(
    worker_t* w, const uint8_t* p, size_t n, const ip_t* ip, int kind, uint32_t mtu,
    uint32_t limit, uint8_t* out
) noexcept nogil:
    """An ICMP error about p[0:n] from our TUN address, at most limit bytes; 0: none is due, it does
    not fit, or too many were sent."""
    cdef const uint8_t* source
    cdef size_t made
    if not (w.shared.has_addr4 if ip.version == 4 else w.shared.has_addr6):
        return 0
    source = &w.shared.tun_addr4[0] if ip.version == 4 else &w.shared.tun_addr6[0]
    made = icmp_error(p, n, kind, source, mtu, out)
    if made == 0 or made > limit:
        return 0
    if not icmp_allow(&w.icmp_buckets[kind + (0 if ip.version == 4 else ICMP_KINDS_N)], w.now):
        w.icmp_suppressed += 1
        return 0
    w.icmp_sent += 1
    return made


cdef inline void icmp_to_tun(
    worker_t* w, const uint8_t* p, size_t n, const ip_t* ip, int kind, uint32_t mtu
) noexcept nogil:
    """Answer the inner sender on this side."""
    cdef size_t made = make_icmp(w, p, n, ip, kind, mtu, ICMP_MAX, w.icmp_out + 10)
    if made == 0:
        return
    memset(w.icmp_out, 0, 10)
    w.decap.generated += 1
    w.syscalls_write += 1
    if write(w.tun_fd, w.icmp_out + 10 - w.vnet_len, made + w.vnet_len) < 0:
        count_drop(&w.decap, DROP_TUN_WRITE, 1)
    else:
        w.decap.delivered += 1


cdef inline bint room_for(worker_t* w, uint32_t segs) noexcept nogil:
    """Make room for more segments of the frame at hand."""
    if segs > TX_SEGS:
        return False
    return w.segs_n + segs <= TX_SEGS or flush(w)


cdef inline void queue_fragments(
    worker_t* w, peer_t* peer, uint8_t* hdr, uint32_t ip_hdr_len, uint32_t lead_len,
    uint8_t* data, uint32_t data_len, uint32_t limit
) noexcept nogil:
    """Send one IPv4 packet, given as headers and data, as fragments of at most limit bytes."""
    cdef int n = fragment_n(ip_hdr_len, lead_len, data_len, limit)
    cdef frag_t frag
    cdef int i
    if n <= 0:
        count_drop(&w.encap, DROP_TOO_BIG, 1)
        return
    if not room_for(w, n):
        count_drop(&w.encap, DROP_NO_BUFFER, 1)
        return
    w.encap.generated += n - 1
    for i in range(n):
        fragment_at(hdr, ip_hdr_len, lead_len, data, data_len, limit, i, segment_room(w), &frag)
        memcpy(segment_room(w) + frag.hdr_len, frag.data, frag.data_len)
        queue_segment(w, peer, frag.hdr_len + frag.data_len)


cdef inline void queue_cut(
    worker_t* w, peer_t* peer, const uint8_t* p, cut_t* cut
) noexcept nogil:
    """Send a super-packet's segments."""
    cdef uint32_t i
    cut_start(cut, p)
    if not room_for(w, cut.n):
        count_drop(&w.encap, DROP_NO_BUFFER, cut.n)
        return
    for i in range(cut.n):
        queue_segment(w, peer, cut_segment(cut, p, i, segment_room(w)))


cdef inline void queue_last(
    worker_t* w, peer_t* peer, const uint8_t* p, cut_t* cut
) noexcept nogil:
    """Of a super-packet whose full segments do not fit the path, send the last one, which does."""
    cdef uint32_t n
    cut_start(cut, p)
    n = cut_segment(cut, p, cut.n - 1, segment_room(w))
    decrement_hop_limit(segment_room(w), cut.version)
    queue_segment(w, peer, n)


cdef inline void queue_cut_fragments(
    worker_t* w, peer_t* peer, uint8_t* p, const ip_t* ip, cut_t* cut, uint32_t limit
) noexcept nogil:
    """Send a super-packet whose segments do not fit the path and may be fragmented (IPv4, no DF).
    A last segment that fits comes out of the fragmenting whole."""
    cdef uint8_t hdr[SEG_HDR_ROOM]
    cdef uint8_t* payload
    cdef uint32_t i
    cut_start(cut, p)
    for i in range(cut.n):
        payload = p + cut.hdr_len + i * cut.gso_size
        cut_header(cut, payload, i, hdr)
        queue_fragments(
            w, peer, hdr, ip.hdr_len, cut.hdr_len - ip.hdr_len, payload, cut_payload_len(cut, i),
            limit,
        )


cdef inline void encap_frame(worker_t* w, uint8_t* frame, size_t n) noexcept nogil:
    """One frame from the TUN: the road out.

    frame  a vnet header if the TUN has them, and an IP packet; overwritten
    """
    cdef uint8_t* p = frame + w.vnet_len
    cdef ip_t ip
    cdef cut_t cut
    cdef drop_t verdict
    cdef hop_t* hop
    cdef uint32_t limit, count
    cdef bint super_packet, too_big
    if n < w.vnet_len:
        w.encap.read += 1
        count_drop(&w.encap, DROP_SHORT_PACKET, 1)
        return
    n -= w.vnet_len
    super_packet = w.vnet_len != 0 and is_super(frame)
    cut.n = 1
    verdict = parse_ip(p, n, &ip)
    if verdict == PASS:
        if super_packet:
            verdict = plan_cut(frame, p, n, &ip, &cut)
        else:
            verdict = check_total_len(&ip, n)
            if verdict == PASS:
                n = ip.total_len
                if w.vnet_len != 0:
                    verdict = complete_checksum(frame, p, n, &ip)
    if verdict != PASS:
        w.encap.read += 1
        count_drop(&w.encap, verdict, 1)
        return
    w.encap.read += cut.n

    hop = find_hop(w.snapshot, ip_src(p, &ip) + ip.addr_len, ip.addr_len)
    if hop == NULL:
        refuse(w, p, n, &ip, &cut, super_packet, cut.n, DROP_NO_ROUTE, ICMP_NO_ROUTE, 0)
        return
    if hop_limit_spent(p, ip.version):
        refuse(
            w, p, n, &ip, &cut, super_packet, cut.n, DROP_TTL_EXCEEDED, ICMP_TTL_EXCEEDED, 0
        )
        return
    limit = path_limit(hop)
    if super_packet:
        too_big = cut.hdr_len + cut.gso_size > limit
    else:
        too_big = n > limit
    if too_big and ip.dont_fragment:
        count = cut.n
        if super_packet and cut.hdr_len + cut_payload_len(&cut, cut.n - 1) <= limit:
            queue_last(w, hop.peer, p, &cut)
            count -= 1
        refuse(w, p, n, &ip, &cut, super_packet, count, DROP_TOO_BIG, ICMP_TOO_BIG, limit)
        return
    decrement_hop_limit(p, ip.version)
    if super_packet:
        if too_big:
            queue_cut_fragments(w, hop.peer, p, &ip, &cut, limit)
        else:
            queue_cut(w, hop.peer, p, &cut)
    elif too_big:
        queue_fragments(
            w, hop.peer, p, ip.hdr_len, 0, p + ip.hdr_len, <uint32_t>n - ip.hdr_len, limit
        )
    else:
        queue_packet(w, hop.peer, p, <uint32_t>n)


cdef inline uint32_t path_limit(const hop_t* hop) noexcept nogil:
    """The largest inner packet that the route and the peer's path take."""
    cdef uint32_t limit = hop.peer.path_mtu - hop.peer.overhead
    return hop.mtu if hop.mtu != 0 and hop.mtu < limit else limit


cdef inline void refuse(
    worker_t* w, uint8_t* p, size_t n, const ip_t* ip, cut_t* cut, bint super_packet,
    uint32_t count, drop_t reason, int kind, uint32_t mtu
) noexcept nogil:
    """Drop ``count`` of the packets read and tell their sender, about the first of them."""
    cdef uint8_t hdr[SEG_HDR_ROOM]
    count_drop(&w.encap, reason, count)
    if super_packet:
        cut_start(cut, p)
        cut_header(cut, p + cut.hdr_len, 0, hdr)
        memcpy(p, hdr, cut.hdr_len)
        n = cut.hdr_len + cut_payload_len(cut, 0)
    icmp_to_tun(w, p, n, ip, kind, mtu)


cdef inline bint drain_tun(worker_t* w) noexcept nogil:
    """Read frames until the TUN is empty, the sockets are full, or the turn's share is used.
    True: there may be more to read."""
    cdef uint32_t frames = 0
    cdef size_t bytes_ = 0
    cdef ssize_t n
    while frames < TUN_FRAMES and bytes_ < TUN_BYTES:
        if queue_full(w, TX_FRAME_SEGS) and not flush(w):
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
