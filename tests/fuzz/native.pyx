"""The libFuzzer harnesses of the compiled core: one program, which tests/fuzz/native.py builds.

Owns the decoding of an input and the checks after it. kernel.h replaces the system calls. The
program never starts Python: all functions here run without the GIL, as the steps do.

The environment variable FUZZ_HARNESS selects the harness:

encap    frames from the TUN, with answers of the kernel
decap    datagrams, also runs that UDP_GRO joined, and probes
merge    segments of a few flows: cutting what was merged has to return the same packets
flush    many frames to many peers, while the kernel refuses sends
errors   messages of the error queue
publish  table changes while three workers borrow and release snapshots; look-ups against a list
text     route files: what is accepted is written and parsed again
json     tables of the control API, in the same way

After each input, read + generated = delivered + consumed + dropped + queued, the counters are those
of kernel.h, and all memory and descriptors are free.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport atoi, calloc, free, getenv, malloc
from libc.string cimport memcmp, memcpy, memset, strcmp, strlen

from drops cimport DROP_REASONS_N, PASS
from path.capture cimport (
    CAPTURE_IN, CAPTURE_OUT, capture_free, capture_new, capture_record_t, capture_t,
    ring_take_bytes, ring_waiting, switch_capture,
)
from path.own_socket cimport close_senders
from path.probe cimport add_token
from path.queue cimport queue_is_empty
from path.send cimport read_errors
from path.turn cimport assume_ready, borrow, oldest_generation, release, turn
from path.worker cimport direction_t, init_worker, shared_t, worker_t
from table.addr_map cimport addr_map_init, addr_map_put
from table.json cimport parse_json, write_route_json
from table.parser cimport PARSE_BODY, PARSE_OK, ROUTE_TEXT_MAX, parse_fn, parse_routes, parser_t
from table.peer cimport peer_counters_t, peer_free, peer_t
from table.publish cimport (
    activate_snapshot, build_snapshot, discard_snapshot, reclaim, retired_t,
)
from table.route cimport (
    route_same, route_t, route_vec_t, routes_find, routes_free, routes_insert,
)
from table.snapshot cimport (
    find_hop, find_peer, first_peer_at, hop_t, next_at_address, next_peer, snapshot_free,
    snapshot_t,
)
from table.text cimport parse_text, write_route_text
from wire.checksum cimport csum_add, csum_not, csum_pseudo, ip4_set_csum
from wire.cut cimport SEG_HDR_ROOM, cut_segment, cut_start, cut_t, plan_cut
from wire.headers cimport VNET_LEN, load_be32, store_be16, store_be32, store_u16
from wire.merge cimport merge_add, merge_frame, merge_reset, merge_t, output_t
from wire.packet cimport ip_t, parse_ip


cdef extern from * nogil:
    """
    /* kernel.h is included by the compiler's option -include. */
    """
    ctypedef struct kernel_t:
        const uint8_t* script
        size_t script_n
        const uint8_t* tun
        size_t frame_n
        size_t tun_n
        unsigned int frames
        const uint8_t* udp
        size_t udp_n
        int udp_fd
        uint64_t now
        uint64_t sent
        uint64_t written
        size_t vnet_len
        uint32_t longest
        int open_n
    kernel_t kernel
    int fuzz_planted
    void fuzz_fail(const char* what)
    enum: FD_TUN
    enum: FD_UDP4
    enum: FD_UDP6
    enum: FD_NOTIFY


cdef enum:
    WORKERS = 3
    LINK_MTU = 1500
    LEAST_MTU = 68              # the smallest path MTU that kernel.h reports
    LONGEST = LINK_MTU - 28     # the longest payload over IPv4
    TEST_NET = 0x0A000000       # 10.0.0.0, in which ``publish`` has its routes
    CAPTURED = 2                # captures of each input: of all packets, and of some flows
    RING = 4096                 # bytes of a capture's ring
    SNAPLEN = 300
    GENERATIONS = 250           # snapshots of one input of ``publish``
    TURNS_MAX = 4096            # turns after which a worker must have sent everything


cdef struct input_t:            # the part of the input that is not read yet
    const uint8_t* p
    size_t n


cdef struct rig_t:              # the state of one input
    shared_t shared
    worker_t* workers[WORKERS]
    retired_t* retired
    peer_counters_t gone


cdef route_vec_t ROUTES         # the table of all harnesses except ``publish``


cdef bint take(input_t* rest, void* to, size_t n) noexcept nogil:
    """Move n bytes of the input to ``to``; zeros if the input is too short. Return whether the
    input had them."""
    cdef bint enough = rest.n >= n
    memset(to, 0, n)
    if not enough:
        n = rest.n
    memcpy(to, rest.p, n)
    rest.p += n
    rest.n -= n
    return enough


cdef void take_script(input_t* rest) noexcept nogil:
    """Make the next bytes, whose number the first one says, the script of the kernel's answers."""
    cdef uint8_t n
    take(rest, &n, 1)
    kernel.script = rest.p
    kernel.script_n = n if n < rest.n else rest.n
    rest.p += kernel.script_n
    rest.n -= kernel.script_n


# A rig


cdef void parse_table() noexcept nogil:
    cdef const char* text = (
        b"10.244.1.0/24 via 192.0.2.1\n10.244.2.0/24 via 192.0.2.2 mtu 1300 probe\n"
        b"10.244.3.0/24 via 192.0.2.3 port 8286\n10.244.3.128/25 via 192.0.2.3 port 8285\n"
        b"10.244.4.0/24 via 2001:db8::1\n10.244.5.0/24 via 192.0.2.5 mtu 68\n"
        b"192.0.2.0/24 via 192.0.2.1\nfd00:1::/64 via 192.0.2.1 probe\n"
        b"fd00:2::/64 via 2001:db8::2 probe\n"
        b"fd00:3::/64 via 192.0.2.3 port 8286 mtu 1280\n2001:db8::/32 via 2001:db8::1\n"
        b"10.244.6.0/24 via 192.0.2.6\n10.244.7.0/24 via 192.0.2.7\n10.244.8.0/24 via 2001:db8::3\n"
    )
    cdef parser_t p
    global ROUTES
    memset(&p, 0, sizeof(p))
    p.text = <const uint8_t*>text
    p.n = strlen(text)
    parse_routes(&p, parse_text)
    if p.error != PARSE_OK:
        fuzz_fail(b"the table of the harness is wrong")
    ROUTES = p.routes


# WORKERS workers, and copies of them as they were at the start: to copy a worker costs less than to
# allocate its buffers.
cdef worker_t* WORKER
cdef worker_t* UNUSED_WORKER


cdef void make_workers() noexcept nogil:
    global WORKER, UNUSED_WORKER
    cdef uint32_t i
    WORKER = <worker_t*>calloc(WORKERS, sizeof(worker_t))
    UNUSED_WORKER = <worker_t*>calloc(WORKERS, sizeof(worker_t))
    for i in range(WORKERS):
        if not init_worker(&WORKER[i], FD_TUN, FD_UDP4, FD_UDP6):
            fuzz_fail(b"no memory")
        UNUSED_WORKER[i] = WORKER[i]


cdef void publish(rig_t* rig, snapshot_t* new) noexcept nogil:
    cdef uint8_t own[4]
    store_be32(own, 0x0AF40000)  # 10.244.0.0
    if addr_map_init(&new.own, 4) < 0:
        fuzz_fail(b"no memory")
    addr_map_put(&new.own, own, 4)
    store_be32(own, 0xC0000264)  # 192.0.2.100
    addr_map_put(&new.own, own, 4)
    rig.retired = activate_snapshot(&rig.shared.snapshot, new, rig.retired)


cdef snapshot_t* build(
    const snapshot_t* active, const route_t* routes, size_t n, uint64_t generation
) noexcept nogil:
    cdef snapshot_t* new = build_snapshot(
        active, routes, n, generation, LINK_MTU, LINK_MTU, WORKERS
    )
    if new == NULL:
        fuzz_fail(b"no memory")
    return new


cdef rig_t* new_rig(uint8_t switches, uint32_t workers_n) noexcept nogil:
    """Return workers with the table ROUTES. The bits of ``switches`` turn features on."""
    cdef rig_t* rig = <rig_t*>calloc(1, sizeof(rig_t))
    cdef worker_t* w
    cdef uint32_t i
    memset(&kernel, 0, sizeof(kernel))
    kernel.now = 1000000000000
    kernel.longest = LONGEST
    rig.shared.workers_n = WORKERS
    rig.shared.notify_fd = FD_NOTIFY
    rig.shared.source_check = (switches >> 5) % 3
    rig.shared.has_addr4 = rig.shared.has_addr6 = True
    store_be32(rig.shared.tun_addr4, 0x0AF40000)
    rig.shared.tun_addr6[0] = 0xFD
    for i in range(4):
        add_token(&rig.shared.tokens, i + 1)
    for i in range(workers_n):
        w = rig.workers[i] = &WORKER[i]
        w.shared = &rig.shared
        w.index = i
        w.vnet_len = VNET_LEN if switches & 1 else 0
        kernel.vnet_len = w.vnet_len
        w.udp_gso = switches & 2 != 0
        w.merge.tcp = w.merge.udp = w.vnet_len != 0
        w.batch = switches & 4 != 0
        w.gso_max_segs = 64
        w.rx_slots = 64 if w.batch else 1
    publish(rig, build(NULL, ROUTES.items, ROUTES.n, 1))
    start_captures(rig)
    return rig


cdef void start_captures(rig_t* rig) noexcept nogil:
    cdef capture_t* capture
    cdef uint32_t slot
    for slot in range(CAPTURED):
        capture = capture_new(WORKERS, RING)
        if capture == NULL:
            fuzz_fail(b"no memory")
        capture.filter.directions = CAPTURE_IN | CAPTURE_OUT
        capture.filter.snaplen = SNAPLEN
        capture.filter.sample = 1
        capture.filter.ports_n = slot
        capture.filter.ports[0] = 80
        rig.shared.captures.items[slot] = capture
        switch_capture(&rig.shared.captures, slot, True)


cdef void check_captures(rig_t* rig) noexcept nogil:
    """Take the records of all rings, and check their sizes."""
    cdef uint8_t taken[RING]
    cdef const capture_record_t* record
    cdef uint64_t n, at
    cdef uint32_t slot, i
    for slot in range(CAPTURED):
        for i in range(WORKERS):
            n = ring_waiting(&rig.shared.captures.items[slot].rings[i])
            if n > RING:
                fuzz_fail(b"a ring has more bytes than space")
            ring_take_bytes(&rig.shared.captures.items[slot].rings[i], RING, taken, n)
            at = 0
            while at < n:
                record = <const capture_record_t*>(taken + at)
                if record.size % 8 or record.captured > SNAPLEN \
                        or record.captured > record.length \
                        or record.size < sizeof(capture_record_t) + record.captured \
                        or record.addr_len not in (0, 4, 16):
                    fuzz_fail(b"a record of a capture is wrong")
                at += record.size
            if at != n:
                fuzz_fail(b"a ring does not end with a record")


cdef void check_direction(const direction_t* d, uint64_t queued) noexcept nogil:
    cdef uint64_t dropped = 0
    cdef int i
    for i in range(DROP_REASONS_N):
        dropped += d.drops[i]
    if d.read + d.generated != d.delivered + d.consumed + dropped + queued:
        fuzz_fail(b"read + generated != delivered + consumed + dropped + queued")


cdef void work(worker_t* w) noexcept nogil:
    """One turn; then check the counters."""
    assume_ready(w)
    turn(w)
    release(w)
    check_direction(&w.encap, w.queue.waiting_n)
    check_direction(&w.decap, 0)
    if w.encap.delivered != kernel.sent:
        fuzz_fail(b"the counter of sent datagrams is wrong")
    if w.decap.delivered != kernel.written:
        fuzz_fail(b"the counter of packets written to the TUN is wrong")


cdef void finish(worker_t* w) noexcept nogil:
    """Let the kernel accept everything, and send what is queued."""
    cdef int turns = 0
    kernel.script_n = kernel.udp_n = 0
    kernel.frames = 0
    while not queue_is_empty(&w.queue):
        work(w)
        turns += 1
        if turns == TURNS_MAX:
            fuzz_fail(b"the queue does not become empty")
    if w.queue.waiting_n != 0:
        fuzz_fail(b"an empty queue counts waiting datagrams")


cdef void reclaim_unused(rig_t* rig) noexcept nogil:
    cdef uint32_t workers_n = WORKERS if rig.workers[1] != NULL else 1
    rig.retired = reclaim(
        rig.retired, oldest_generation(rig.workers, workers_n), rig.shared.workers_n,
        &rig.gone,
    )


cdef void free_rig(rig_t* rig) noexcept nogil:
    """Free all. No worker may have borrowed a snapshot."""
    cdef snapshot_t* s = rig.shared.snapshot
    cdef peer_t* peer
    cdef peer_t* next_
    cdef uint32_t slot = 0, i
    reclaim_unused(rig)
    if rig.retired != NULL:
        fuzz_fail(b"a retired object is not free, but no worker is busy")
    peer = next_peer(s, &slot, NULL)
    while peer != NULL:
        next_ = next_peer(s, &slot, peer)
        peer_free(peer)
        peer = next_
    snapshot_free(s)
    check_captures(rig)
    for i in range(CAPTURED):
        capture_free(rig.shared.captures.items[i])
    for i in range(WORKERS):
        if rig.workers[i] == NULL:
            continue
        close_senders(rig.workers[i])
        rig.workers[i][0] = UNUSED_WORKER[i]
    if kernel.open_n != 0:
        fuzz_fail(b"a socket is not closed")
    free(rig)


# encap, decap


cdef void fuzz_encap(input_t* rest) noexcept nogil:
    """Frames: bytes given (2), length (2), bytes; zeros fill a frame up to its length."""
    cdef uint8_t switches = 0
    cdef uint16_t given, total
    cdef rig_t* rig
    take(rest, &switches, 1)
    rig = new_rig(switches, 1)
    take_script(rest)
    while take(rest, &given, 2) and take(rest, &total, 2):
        if given > rest.n:
            given = <uint16_t>rest.n
        kernel.tun = rest.p
        kernel.frame_n = given
        kernel.tun_n = total
        kernel.frames = 1
        rest.p += given
        rest.n -= given
        work(rig.workers[0])
    finish(rig.workers[0])
    free_rig(rig)


cdef void fuzz_decap(input_t* rest) noexcept nogil:
    """Datagrams, in the format of fuzz_recvmmsg."""
    cdef uint8_t switches = 0
    cdef rig_t* rig
    cdef size_t before = 0
    take(rest, &switches, 1)
    rig = new_rig(switches | 1, 1)
    take_script(rest)
    kernel.udp = rest.p
    kernel.udp_n = rest.n
    kernel.udp_fd = FD_UDP6 if switches & 8 else FD_UDP4
    while kernel.udp_n != before:
        before = kernel.udp_n
        work(rig.workers[0])
    finish(rig.workers[0])
    free_rig(rig)


# merge


cdef size_t make_segment(
    const uint8_t* op, uint32_t* seqs, uint16_t* ids, uint8_t* p
) noexcept nogil:
    """Write a TCP segment or UDP datagram. Return its length.

    op[0]  bits 0-1: the flow; bit 2: IPv6; bit 3: UDP; bit 4: PSH; bit 5: other flags; bit 6: no
           DF; bit 7: a wrong checksum
    op[1]  payload, in units of 8 bytes
    op[2]  bits 0-1: IP options, bits 2-3: TCP options, in words; bit 4: the id jumps; bit 5: the
           sequence number jumps; bits 6-7: bytes after the packet's last unit
    """
    cdef bint v6 = op[0] & 4 != 0, udp = op[0] & 8 != 0
    cdef uint32_t flow = op[0] & 3
    cdef uint32_t ip_len = 40 if v6 else 20 + 4 * (op[2] & 3)
    cdef uint32_t l4_len = 8 if udp else 20 + (op[2] & 0x0C)
    cdef uint32_t payload = 8 * <uint32_t>op[1] + (op[2] >> 6), i
    cdef uint32_t n = ip_len + l4_len + payload
    cdef uint8_t proto = 17 if udp else 6
    cdef uint8_t* l4 = p + ip_len
    cdef uint16_t csum
    memset(p, 0, ip_len + l4_len)
    if v6:
        p[0] = 0x60
        store_be16(p + 4, n - 40)
        p[6] = proto
        p[7] = 64
        p[8] = p[24] = 0xFD
        p[39] = <uint8_t>flow
    else:
        p[0] = <uint8_t>(0x40 + ip_len // 4)
        store_be16(p + 2, n)
        ids[flow] += 1 + (op[2] >> 4 & 1)
        store_be16(p + 4, ids[flow])
        p[6] = 0 if op[0] & 0x40 else 0x40
        p[8] = 64
        p[9] = proto
        p[12] = p[16] = 10
        p[19] = <uint8_t>flow
        ip4_set_csum(p, ip_len)
    store_be16(l4, 1000 + flow)
    store_be16(l4 + 2, 80)
    for i in range(payload):
        l4[l4_len + i] = <uint8_t>(i + seqs[flow])
    if udp:
        store_be16(l4 + 4, l4_len + payload)
    else:
        seqs[flow] += op[2] >> 5 & 1
        store_be32(l4 + 4, seqs[flow])
        l4[12] = <uint8_t>(l4_len // 4 << 4)
        l4[13] = 0x10 | (8 if op[0] & 0x10 else 0) | (1 if op[0] & 0x20 else 0)
        seqs[flow] += payload
    csum = csum_not(csum_add(l4, l4_len + payload, csum_pseudo(
        p + (8 if v6 else 12), 16 if v6 else 4, proto, l4_len + payload)))
    if udp and csum == 0:
        csum = 0xFFFF
    if op[0] & 0x80:
        csum += 1
    store_u16(l4 + (6 if udp else 16), csum)
    return n


cdef bint same_packet(const uint8_t* a, const uint8_t* b, size_t n) noexcept nogil:
    """Return whether two packets are equal, except for the id of an IPv4 packet with DF, which has
    no meaning (RFC 6864)."""
    if a[0] >> 4 == 6 or not a[6] & 0x40:
        return memcmp(a, b, n) == 0
    return (
        memcmp(a, b, 4) == 0 and memcmp(a + 6, b + 6, 4) == 0
        and memcmp(a + 12, b + 12, n - 12) == 0
    )


cdef void check_output(const merge_t* m, const output_t* out) noexcept nogil:
    """Cut a merged output again, and compare the segments with the packets that were merged."""
    cdef uint8_t* frame = <uint8_t*>malloc(VNET_LEN + out.total_len)
    cdef uint8_t* segment
    cdef size_t n = merge_frame(m, out, frame)
    cdef int32_t at = out.first
    cdef uint32_t i, len_
    cdef ip_t ip
    cdef cut_t cut
    if n != VNET_LEN + out.total_len:
        fuzz_fail(b"a merged frame has another length")
    if parse_ip(frame + VNET_LEN, out.total_len, &ip) != PASS \
            or plan_cut(frame, frame + VNET_LEN, out.total_len, &ip, &cut) != PASS \
            or cut.n != out.n:
        fuzz_fail(b"a merged frame cannot be cut into its packets")
    cut_start(&cut, frame + VNET_LEN)
    segment = <uint8_t*>malloc(SEG_HDR_ROOM + cut.gso_size)
    for i in range(cut.n):
        len_ = cut_segment(&cut, frame + VNET_LEN, i, segment)
        if at < 0 or len_ != m.packets[at].len \
                or not same_packet(segment, m.packets[at].data, len_):
            fuzz_fail(b"a segment of a merged frame differs from its packet")
        at = m.packets[at].next
    if at >= 0:
        fuzz_fail(b"a merged frame has fewer segments than packets")
    free(segment)
    free(frame)


cdef merge_t MERGE


cdef void fuzz_merge(input_t* rest) noexcept nogil:
    cdef uint8_t op[3]
    cdef uint8_t* packets[256]
    cdef uint8_t room[4096]
    cdef uint32_t seqs[4]
    cdef uint16_t ids[4]
    cdef uint32_t n = 0, out_n = 0, i
    cdef size_t len_
    cdef ip_t ip
    memset(seqs, 0, sizeof(seqs))
    memset(ids, 0, sizeof(ids))
    MERGE.tcp = MERGE.udp = True
    merge_reset(&MERGE)
    while n < 256 and take(rest, op, 3):
        len_ = make_segment(op, seqs, ids, room)
        packets[n] = <uint8_t*>malloc(len_)
        memcpy(packets[n], room, len_)
        if parse_ip(packets[n], len_, &ip) != PASS:
            fuzz_fail(b"the harness made a wrong packet")
        merge_add(&MERGE, packets[n], len_, &ip)
        n += 1
    for i in range(<uint32_t>MERGE.outputs_n):
        out_n += MERGE.outputs[i].n
        if MERGE.outputs[i].n > 1:
            check_output(&MERGE, &MERGE.outputs[i])
    if out_n != n:
        fuzz_fail(b"a merge lost or repeated a packet")
    for i in range(n):
        free(packets[i])


# flush, errors


cdef void fuzz_flush(input_t* rest) noexcept nogil:
    """Steps of 5 bytes: destination, size of the packets (2), their number, milliseconds."""
    cdef uint8_t op[5]
    cdef uint8_t frame[2048]
    cdef uint8_t switches = 0
    cdef uint32_t size, at, to
    cdef rig_t* rig
    take(rest, &switches, 1)
    rig = new_rig(switches | 1, 1)
    take_script(rest)
    while take(rest, op, 5):
        size = 28 + ((<uint32_t>op[1] << 8 | op[2]) % 1445)
        memset(frame, 0, VNET_LEN + 28)
        at = VNET_LEN
        frame[at] = 0x45
        store_be16(frame + at + 2, size)
        frame[at + 6] = 0x40 if op[0] & 0x80 else 0
        frame[at + 8] = 64
        frame[at + 9] = 17
        store_be32(frame + at + 12, 0x0AF40001)
        to = 0x0AF40001 + (<uint32_t>(op[0] & 0x7F) % 9 << 8) + (op[0] & 0x40) * 2
        store_be32(frame + at + 16, to)
        kernel.tun = frame
        kernel.frame_n = VNET_LEN + 28
        kernel.tun_n = VNET_LEN + size
        kernel.frames = op[3]
        kernel.now += <uint64_t>op[4] * 1000000
        while True:
            work(rig.workers[0])
            if kernel.frames == 0 or rig.workers[0].tun_paused:
                break
    finish(rig.workers[0])
    free_rig(rig)


cdef void fuzz_errors(input_t* rest) noexcept nogil:
    """The whole input is a script of fuzz_recvmsg."""
    cdef rig_t* rig = new_rig(7, 1)
    cdef worker_t* w = rig.workers[0]
    cdef peer_t* peer
    cdef uint32_t slot = 0
    kernel.script = rest.p
    kernel.script_n = rest.n
    borrow(w)
    while kernel.script_n:
        w.now += 1
        read_errors(w, FD_UDP4)
    peer = next_peer(w.snapshot, &slot, NULL)
    while peer != NULL:
        if not LEAST_MTU <= peer.path_mtu <= LINK_MTU:
            fuzz_fail(b"a path MTU out of its range")
        if peer.errors[0].n != 0 and peer.errors[0].last.reporter_len not in (0, 4, 16):
            fuzz_fail(b"a reporter of another length")
        peer = next_peer(w.snapshot, &slot, peer)
    release(w)
    free_rig(rig)


# publish


cdef void make_table(input_t* rest, route_vec_t* table) noexcept nogil:
    """Fill a table, sorted, each prefix once. A route is 3 bytes: address, prefix length, endpoint.
    """
    cdef uint8_t n
    cdef uint8_t op[3]
    cdef route_t route
    cdef uint32_t value
    cdef size_t at
    take(rest, &n, 1)
    for _ in range(n % 16):
        take(rest, op, 3)
        memset(&route, 0, sizeof(route))
        route.dst_family = 4
        route.dst_len = <uint8_t>(8 + op[1] % 25)
        value = TEST_NET | <uint32_t>(op[0] & 7) << 16 | <uint32_t>(op[0] >> 3) << 6
        store_be32(route.dst, value & ~(<uint32_t>0xFFFFFFFF >> route.dst_len - 1 >> 1))
        route.via_family = 4
        store_be32(route.via, <uint32_t>0xC0000201 + (op[2] & 1))
        route.port = <uint16_t>(1 + (op[2] >> 1 & 7))
        if not routes_find(table, &route, &at):
            routes_insert(table, at, &route)


cdef const route_t* expected_route(const route_vec_t* table, const uint8_t* addr) noexcept nogil:
    """Return the route with the longest prefix that covers the address: the slow look-up."""
    cdef const route_t* best = NULL
    cdef const route_t* route
    cdef uint32_t differ
    cdef size_t i
    for i in range(table.n):
        route = &table.items[i]
        differ = load_be32(route.dst) ^ load_be32(addr)
        if differ >> (32 - route.dst_len) == 0 and (best == NULL or route.dst_len > best.dst_len):
            best = route
    return best


cdef void look_up(worker_t* w, const route_vec_t* tables, const uint8_t* op) noexcept nogil:
    """Compare a look-up in the borrowed snapshot with the list; walk the peers of an address."""
    cdef const route_t* route
    cdef hop_t* hop
    cdef peer_t* peer
    cdef uint8_t addr[4]
    cdef uint32_t port = 0
    store_be32(addr, TEST_NET | <uint32_t>(op[0] & 7) << 16 | <uint32_t>(op[0] >> 3) << 6 | op[1])
    hop = find_hop(w.snapshot, addr, 4)
    route = expected_route(&tables[w.snapshot.generation], addr)
    if (hop == NULL) != (route == NULL):
        fuzz_fail(b"a look-up found no route, or one that does not exist")
    if hop != NULL and (
        hop.peer.port != route.port or memcmp(hop.peer.addr, route.via, 4) != 0
    ):
        fuzz_fail(b"a look-up found another route")
    store_be32(addr, <uint32_t>0xC0000201 + (op[0] & 1))
    peer = first_peer_at(w.snapshot, addr, 4)
    while peer != NULL:
        if peer.port <= port:
            fuzz_fail(b"the peers of an address are not in the order of their ports")
        port = peer.port
        peer.counters[w.index].encap_packets += 1
        peer = next_at_address(peer)
    find_peer(w.snapshot, addr, 4, op[0] >> 4)


cdef void fuzz_publish(input_t* rest) noexcept nogil:
    """Steps: 1 byte, whose lowest bits are the worker and the action."""
    cdef uint8_t op[2]
    cdef uint8_t kind
    cdef rig_t* rig = new_rig(7, WORKERS)
    cdef route_vec_t* tables = <route_vec_t*>calloc(GENERATIONS + 1, sizeof(route_vec_t))
    cdef route_vec_t* table
    cdef snapshot_t* new
    cdef worker_t* w
    cdef uint64_t generation = 2
    cdef uint32_t i
    publish(rig, build(rig.shared.snapshot, NULL, 0, generation))  # an empty table
    reclaim_unused(rig)
    while generation < GENERATIONS and take(rest, op, 1):
        kind = op[0] >> 2 & 7
        w = rig.workers[(op[0] & 3) % WORKERS]
        if kind <= 1:
            table = &tables[generation + 1]
            routes_free(table)
            make_table(rest, table)
            new = build(rig.shared.snapshot, table.items, table.n, generation + 1)
            if op[0] & 0x80:
                discard_snapshot(new, rig.shared.snapshot)
            else:
                generation += 1
                publish(rig, new)
                reclaim_unused(rig)
        elif kind == 2:
            reclaim_unused(rig)
        elif kind == 3:
            release(w)
        elif kind == 4:
            # Datagrams that wait keep the borrowed snapshot, also over the end of a turn.
            if w.busy:
                w.queue.n = 1 - w.queue.n
        else:
            borrow(w)
            take(rest, op, 2)
            look_up(w, tables, op)
    for i in range(WORKERS):
        rig.workers[i].queue.n = 0
        release(rig.workers[i])
    for i in range(GENERATIONS + 1):
        routes_free(&tables[i])
    free(tables)
    free_rig(rig)


# text, json


ctypedef size_t (*write_fn)(uint8_t*, const route_t*) noexcept nogil


cdef void parse_exact(
    const uint8_t* text, size_t n, parse_fn parse_body, parser_t* p
) noexcept nogil:
    """Parse a copy of text[0:n] of exactly this size, which the caller frees (p.text)."""
    cdef uint8_t* copy = <uint8_t*>malloc(n if n else 1)
    memcpy(copy, text, n)
    memset(p, 0, sizeof(parser_t))
    p.text = copy
    p.n = n
    parse_routes(p, parse_body)


cdef void fuzz_parser(
    input_t* rest, parse_fn parse_body, write_fn write_route, bint is_json
) noexcept nogil:
    """Parse the input. Write the routes, parse the result, and compare the routes."""
    cdef parser_t p, again
    cdef uint8_t* text
    cdef size_t n = 0, i
    parse_exact(rest.p, rest.n, parse_body, &p)
    if p.error != PARSE_OK:
        if p.error_start > p.n or (
            p.error != PARSE_BODY and (p.error_start > p.error_end or p.error_end > p.n)
        ):
            fuzz_fail(b"an error outside of the text")
    else:
        text = <uint8_t*>malloc(32 + (p.routes.n + 1) * (ROUTE_TEXT_MAX + 1))
        if is_json:
            memcpy(text, b'{"routes": [', 12)
            n = 12
        for i in range(p.routes.n):
            if is_json and i != 0:
                text[n] = c','
                n += 1
            n += write_route(text + n, &p.routes.items[i])
        if is_json:
            memcpy(text + n, b"]}", 2)
            n += 2
        parse_exact(text, n, parse_body, &again)
        if again.error != PARSE_OK or again.routes.n != p.routes.n:
            fuzz_fail(b"the written table does not parse")
        for i in range(p.routes.n):
            if not route_same(&p.routes.items[i], &again.routes.items[i]):
                fuzz_fail(b"a route changed when it was written and parsed again")
        routes_free(&again.routes)
        free(<void*>again.text)
        free(text)
    routes_free(&p.routes)
    free(<void*>p.text)


# The entry points of libFuzzer


cdef const char* HARNESS = NULL


cdef public int LLVMFuzzerInitialize(int* argc, char*** argv) noexcept nogil:
    global HARNESS, fuzz_planted
    cdef const char* planted = getenv(b"FUZZ_PLANTED")
    if planted != NULL:
        fuzz_planted = atoi(planted)
    HARNESS = getenv(b"FUZZ_HARNESS")
    if HARNESS == NULL:
        fuzz_fail(b"set FUZZ_HARNESS")
    parse_table()
    make_workers()
    return 0


cdef public int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n) noexcept nogil:
    cdef input_t rest
    rest.p = data
    rest.n = n
    if strcmp(HARNESS, b"encap") == 0:
        fuzz_encap(&rest)
    elif strcmp(HARNESS, b"decap") == 0:
        fuzz_decap(&rest)
    elif strcmp(HARNESS, b"merge") == 0:
        fuzz_merge(&rest)
    elif strcmp(HARNESS, b"flush") == 0:
        fuzz_flush(&rest)
    elif strcmp(HARNESS, b"errors") == 0:
        fuzz_errors(&rest)
    elif strcmp(HARNESS, b"publish") == 0:
        fuzz_publish(&rest)
    elif strcmp(HARNESS, b"text") == 0:
        fuzz_parser(&rest, parse_text, write_route_text, False)
    elif strcmp(HARNESS, b"json") == 0:
        fuzz_parser(&rest, parse_json, write_route_json, True)
    else:
        fuzz_fail(b"FUZZ_HARNESS names no harness")
    return 0
