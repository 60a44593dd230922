"""Captures: which packets are recorded, and the rings in which the records wait for the reader.

Owns ``captures_t``, the filter, and the format of a record. Does not depend on workers: each thread
that writes records has a ring of its own. A record does not say how its packet was processed beyond
the fields of ``capture_record_t``, so another data path can write the same records.

A writer never waits. If the ring has no space, the packet is counted as lost. A record is written
in one piece; the bytes of a ring are records, one after the other.

Threading: the control side starts and ends captures. A writer loads ``captures_t.word`` once per
turn. The control side frees a capture only when no writer can use it any more (turn.pxd). Of a
ring, the writer writes ``put`` and the counters, the control side ``taken``.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from drops cimport PASS, drop_t
from sys cimport load_flag, now_ns, poke64, store_flag, store_flag_ordered
from wire.headers cimport IP4_FRAG, IP4_OFFSET, IP6_LEN, PROTO_TCP, PROTO_UDP, load_be16
from wire.packet cimport (
    EXT_AUTHENTICATION, EXT_ESP, EXT_FRAGMENT, EXT_MAX_N, ip_src, ip_t, is_extension, parse_ip,
)
from wire.net cimport in_net, net_t


cdef enum:
    CAPTURES_N = 4              # captures at the same time; at most 8
    CAPTURE_PEERS = 8           # of each kind in one filter
    CAPTURE_NETS = 8
    CAPTURE_ENDS = 2
    CAPTURE_PROTOS = 2
    CAPTURE_BITS = 8            # the lowest bits of captures_t.word: one for each capture
    CAPTURE_MASK = 0xFF

    # capture_record_t.kind
    RECORD_PACKET = 1
    # capture_record_t.direction, as in pcapng's epb_flags
    CAPTURE_IN = 1              # from a peer to this host
    CAPTURE_OUT = 2             # from this host to a peer
    # capture_record_t.flags
    RECORD_GENERATED = 1        # an ICMP error that the forwarder made

    PROTO_SCTP = 132


cdef struct capture_record_t:   # little-endian; 64 bytes, then the captured bytes and padding
    uint32_t size               # of the whole record, a multiple of 8
    uint32_t captured           # bytes of the packet in this record
    uint64_t time_ns            # monotonic
    uint64_t lost               # matching packets of this writer lost since its previous record
    uint32_t length             # bytes of the packet
    uint32_t packets            # segments of the super-packet; packets dropped together
    uint16_t segment            # payload bytes of each segment; 0 = not a super-packet
    uint16_t port               # of the other end, host order
    uint8_t kind                # RECORD_*
    uint8_t direction
    uint8_t reason              # drop_t; PASS = not dropped
    uint8_t flags
    uint8_t writer              # index of the writer
    uint8_t addr_len            # 0 = the other end is not known
    uint8_t padding[6]
    uint8_t addr[16]            # outer address of the other end


cdef struct capture_peer_t:
    uint8_t addr[16]
    uint8_t addr_len
    uint16_t port               # 0 = any


cdef struct capture_end_t:      # an inner address
    uint8_t addr[16]
    uint8_t addr_len


cdef struct capture_filter_t:   # a packet matches if it matches each part that is not empty
    uint8_t directions          # CAPTURE_IN | CAPTURE_OUT
    bint dropped_only
    uint32_t peers_n            # one of these peers
    uint32_t nets_n             # the inner address on the peer's side is in one of these
    uint32_t hosts_n            # each of these is the inner source or destination
    uint32_t ports_n            # each of these is the inner source or destination port
    uint32_t protos_n           # one of these transport protocols
    capture_peer_t peers[CAPTURE_PEERS]
    net_t nets[CAPTURE_NETS]
    capture_end_t hosts[CAPTURE_ENDS]
    uint16_t ports[CAPTURE_ENDS]
    uint8_t protos[CAPTURE_PROTOS]
    uint32_t snaplen            # maximum bytes of a packet in a record
    uint32_t sample             # record one of this number of matching packets


cdef struct capture_ring_t:
    uint8_t* memory             # capture_t.ring_size bytes
    uint64_t put                # bytes written so far
    uint64_t matched            # packets that matched the filter
    uint64_t lost               # matching packets for which the ring had no space
    uint64_t lost_before        # ``lost`` at the last record
    uint64_t apart[4]           # ``taken`` is in another cache line
    uint64_t taken              # bytes read so far
    uint64_t apart_too[7]


cdef struct capture_t:
    capture_filter_t filter
    uint32_t rings_n
    uint64_t ring_size          # a power of two
    capture_ring_t* rings       # one for each writer


cdef struct captures_t:
    uint64_t word               # a generation, and CAPTURE_BITS bits: the captures that are on
    capture_t* items[CAPTURES_N]


cdef struct captured_t:         # a packet that is offered to the captures
    const captures_t* captures
    uint64_t word               # captures_t.word, as the writer loaded it
    uint32_t writer
    uint8_t direction
    uint8_t flags
    drop_t reason
    uint16_t segment
    uint32_t packets
    const uint8_t* p
    size_t n
    const uint8_t* addr         # of the other end
    uint8_t addr_len            # 0 = not known
    uint16_t port


# The filter


cdef struct flow_t:
    const uint8_t* addrs        # source, then destination
    uint8_t addr_len            # 0 = not an IP packet
    uint8_t proto
    bint has_ports
    uint16_t ports[2]


cdef inline bint find_transport(
    const uint8_t* p, size_t n, uint8_t* proto, size_t* off
) noexcept nogil:
    """Find the transport protocol of an IPv6 packet, n >= 40, behind its extension headers. Return
    whether the packet has its header, at ``off``. Only the first fragment has it."""
    cdef int _i
    for _i in range(EXT_MAX_N):
        if not is_extension(proto[0]) or proto[0] == EXT_ESP:
            return off[0] <= n
        if off[0] + 8 > n:
            return False
        if proto[0] == EXT_FRAGMENT and load_be16(p + off[0] + 2) >> 3 != 0:
            proto[0] = p[off[0]]
            return False
        if proto[0] == EXT_AUTHENTICATION:
            proto[0], off[0] = p[off[0]], off[0] + 8 + 4 * <size_t>p[off[0] + 1]
        elif proto[0] == EXT_FRAGMENT:
            proto[0], off[0] = p[off[0]], off[0] + 8
        else:
            proto[0], off[0] = p[off[0]], off[0] + 8 + 8 * <size_t>p[off[0] + 1]
    return False


cdef inline void find_flow(const uint8_t* p, size_t n, flow_t* flow) noexcept nogil:
    """Read the addresses, the protocol and the ports of p[0:n], as far as the bytes show them."""
    cdef ip_t ip
    cdef size_t off
    cdef bint visible
    memset(flow, 0, sizeof(flow_t))
    if parse_ip(p, n, &ip) != PASS:
        return
    flow.addrs = ip_src(p, &ip)
    flow.addr_len = ip.addr_len
    flow.proto = ip.proto
    off = ip.hdr_len
    if ip.version == 4:
        visible = load_be16(p + IP4_FRAG) & IP4_OFFSET == 0
    else:
        visible = find_transport(p, n, &flow.proto, &off)
    flow.has_ports = visible and off + 4 <= n and (
        flow.proto == PROTO_TCP or flow.proto == PROTO_UDP or flow.proto == PROTO_SCTP
    )
    if flow.has_ports:
        flow.ports[0] = load_be16(p + off)
        flow.ports[1] = load_be16(p + off + 2)


cdef inline bint is_of_peer(const capture_filter_t* filter, const captured_t* c) noexcept nogil:
    cdef const capture_peer_t* peer
    cdef uint32_t i
    for i in range(filter.peers_n):
        peer = &filter.peers[i]
        if c.addr_len == peer.addr_len and (peer.port == 0 or peer.port == c.port) \
                and memcmp(c.addr, peer.addr, peer.addr_len) == 0:
            return True
    return filter.peers_n == 0


cdef inline bint is_in_nets(
    const capture_filter_t* filter, const captured_t* c, const flow_t* flow
) noexcept nogil:
    """Return whether the inner address on the peer's side is in one of the filter's prefixes."""
    cdef const uint8_t* addr = flow.addrs
    cdef uint32_t i
    if c.direction == CAPTURE_OUT:
        addr += flow.addr_len
    for i in range(filter.nets_n):
        if in_net(&filter.nets[i], addr, flow.addr_len):
            return True
    return filter.nets_n == 0


cdef inline bint is_of_flow(const capture_filter_t* filter, const flow_t* flow) noexcept nogil:
    cdef const capture_end_t* host
    cdef bint found = filter.protos_n == 0
    cdef uint32_t i
    for i in range(filter.protos_n):
        found = found or filter.protos[i] == flow.proto
    for i in range(filter.hosts_n):
        host = &filter.hosts[i]
        found = found and host.addr_len == flow.addr_len and (
            memcmp(host.addr, flow.addrs, host.addr_len) == 0
            or memcmp(host.addr, flow.addrs + host.addr_len, host.addr_len) == 0
        )
    for i in range(filter.ports_n):
        found = found and flow.has_ports and (
            filter.ports[i] == flow.ports[0] or filter.ports[i] == flow.ports[1]
        )
    return found


cdef inline bint capture_wants(const capture_filter_t* filter, const captured_t* c) noexcept nogil:
    """Return whether a packet matches the filter."""
    cdef flow_t flow
    if not filter.directions & c.direction or (filter.dropped_only and c.reason == PASS):
        return False
    if not is_of_peer(filter, c):
        return False
    if filter.nets_n + filter.hosts_n + filter.ports_n + filter.protos_n == 0:
        return True
    find_flow(c.p, c.n, &flow)
    return flow.addr_len != 0 and is_in_nets(filter, c, &flow) and is_of_flow(filter, &flow)


# Records


cdef inline void copy_in(
    capture_ring_t* ring, uint64_t size, uint64_t at, const void* value, size_t n
) noexcept nogil:
    """Copy value[0:n] to the place ``at`` of the ring, whose end continues at its beginning."""
    cdef size_t place = at & (size - 1)
    cdef size_t first = min(n, size - place)
    memcpy(ring.memory + place, value, first)
    memcpy(ring.memory, <const uint8_t*>value + first, n - first)


cdef inline void write_record(
    capture_ring_t* ring, uint64_t size, uint32_t snaplen, const captured_t* c
) noexcept nogil:
    """Write the record of a packet, or count the packet as lost."""
    cdef capture_record_t record
    cdef uint32_t captured = <uint32_t>min(c.n, <size_t>snaplen)
    cdef uint64_t put = ring.put
    cdef uint32_t total = (sizeof(record) + captured + 7) & ~<uint32_t>7
    if put + total - load_flag(&ring.taken) > size:
        poke64(&ring.lost, ring.lost + 1)
        return
    memset(&record, 0, sizeof(record))
    record.size, record.captured, record.time_ns = total, captured, now_ns()
    record.lost = ring.lost - ring.lost_before
    record.length, record.packets, record.segment = <uint32_t>c.n, c.packets, c.segment
    record.kind, record.direction, record.reason = RECORD_PACKET, c.direction, <uint8_t>c.reason
    record.flags, record.writer = c.flags, <uint8_t>c.writer
    record.addr_len, record.port = c.addr_len, c.port
    if c.addr_len != 0:
        memcpy(record.addr, c.addr, c.addr_len)
    copy_in(ring, size, put, &record, sizeof(record))
    copy_in(ring, size, put + sizeof(record), c.p, captured)
    ring.lost_before = ring.lost
    store_flag(&ring.put, put + total)


cdef inline void capture_packet(const void* arguments) noexcept nogil:
    """Offer a packet (``captured_t``) to each capture that is on."""
    cdef const captured_t* c = <const captured_t*>arguments
    cdef capture_t* capture
    cdef capture_ring_t* ring
    cdef int i
    for i in range(CAPTURES_N):
        if not c.word >> i & 1:
            continue
        capture = c.captures.items[i]
        if not capture_wants(&capture.filter, c):
            continue
        ring = &capture.rings[c.writer]
        poke64(&ring.matched, ring.matched + 1)
        if (ring.matched - 1) % capture.filter.sample == 0:
            write_record(ring, capture.ring_size, capture.filter.snaplen, c)


# The control side


cdef inline void capture_free(capture_t* capture) noexcept nogil:
    """Free a capture that no writer can use. NULL is allowed."""
    cdef uint32_t i
    if capture == NULL:
        return
    if capture.rings != NULL:
        for i in range(capture.rings_n):
            free(capture.rings[i].memory)
    free(capture.rings)
    free(capture)


cdef inline capture_t* capture_new(uint32_t rings_n, uint64_t ring_size) noexcept nogil:
    """Return a capture with an empty filter, or NULL if there is no memory. ring_size: a power of
    two."""
    cdef capture_t* capture = <capture_t*>calloc(1, sizeof(capture_t))
    cdef uint32_t i
    if capture == NULL:
        return NULL
    capture.rings_n, capture.ring_size = rings_n, ring_size
    capture.rings = <capture_ring_t*>calloc(rings_n, sizeof(capture_ring_t))
    if capture.rings == NULL:
        capture_free(capture)
        return NULL
    for i in range(rings_n):
        capture.rings[i].memory = <uint8_t*>calloc(1, ring_size)
        if capture.rings[i].memory == NULL:
            capture_free(capture)
            return NULL
    return capture


cdef inline void switch_capture(captures_t* captures, uint32_t slot, bint on) noexcept nogil:
    """Turn a capture on or off for the writers, from their next turn on."""
    cdef uint64_t bit = <uint64_t>1 << slot
    cdef uint64_t word = captures.word + (<uint64_t>1 << CAPTURE_BITS)
    store_flag_ordered(&captures.word, (word | bit) if on else (word & ~bit))


cdef inline uint64_t ring_waiting(capture_ring_t* ring) noexcept nogil:
    """Return the number of bytes that can be taken."""
    return load_flag(&ring.put) - ring.taken


cdef inline void ring_take_bytes(
    capture_ring_t* ring, uint64_t size, uint8_t* out, uint64_t n
) noexcept nogil:
    """Move the next n bytes, at most ``ring_waiting``, to ``out``."""
    cdef uint64_t place = ring.taken & (size - 1)
    cdef uint64_t first = min(n, size - place)
    memcpy(out, ring.memory + place, first)
    memcpy(out + first, ring.memory, n - first)
    store_flag(&ring.taken, ring.taken + n)
