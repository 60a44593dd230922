"""ICMP errors about packets that the worker drops, sent to the packet's inner source.

Owns the choice of source address, the rate limit, and the sending of the error. A local sender gets
the error through the TUN. A sender behind a peer gets it in a datagram. wire/icmp.pxd builds the
error, and has the rules that forbid an error.
Threading: the worker's thread.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memset

from drops cimport DROP_TUN_WRITE
from path.queue cimport queue_append, queue_is_full, queue_room
from path.worker cimport (
    capture_from_tun, capture_from_udp, count_drop, is_capturing, worker_t,
)
from sys cimport write
from table.snapshot cimport find_hop, hop_t, path_limit
from wire.headers cimport VNET_LEN
from wire.icmp cimport ICMP_KINDS_N, ICMP_MAX, ICMP_TTL_EXCEEDED, icmp_allow, icmp_error
from wire.packet cimport ip_src, ip_t


cdef inline size_t build_reply(
    worker_t* w, const uint8_t* p, size_t n, uint8_t version, int kind, uint32_t mtu,
    uint32_t limit, uint8_t* out
) noexcept nogil:
    """Write an ICMP error about p[0:n], from the TUN's address.

    limit    the maximum length of the error in bytes
    returns  bytes written. 0: the RFCs forbid an error, the error is longer than limit, or the rate
             limit applies
    """
    cdef const uint8_t* source
    cdef size_t reply_len
    if not (w.shared.has_addr4 if version == 4 else w.shared.has_addr6):
        return 0
    source = &w.shared.tun_addr4[0] if version == 4 else &w.shared.tun_addr6[0]
    reply_len = icmp_error(p, n, kind, source, mtu, out)
    if reply_len == 0 or reply_len > limit:
        return 0
    if not icmp_allow(&w.icmp_buckets[kind + (0 if version == 4 else ICMP_KINDS_N)], w.now):
        w.icmp_suppressed += 1
        return 0
    w.icmp_sent += 1
    return reply_len


cdef inline void reply_to_tun(
    worker_t* w, const uint8_t* p, size_t n, uint8_t version, int kind, uint32_t mtu
) noexcept nogil:
    """Send an ICMP error about p[0:n], a packet read from the TUN, to the packet's local sender."""
    cdef uint8_t* reply = w.icmp_out + VNET_LEN
    cdef size_t reply_len = build_reply(w, p, n, version, kind, mtu, ICMP_MAX, reply)
    if reply_len == 0:
        return
    memset(w.icmp_out, 0, VNET_LEN)
    w.decap.generated += 1
    if is_capturing(w):
        capture_from_udp(w, reply, reply_len, NULL, 0, 0, True)
    w.syscalls_write += 1
    if write(w.tun_fd, reply - w.vnet_len, reply_len + w.vnet_len) < 0:
        count_drop(&w.decap, DROP_TUN_WRITE, 1)
    else:
        w.decap.delivered += 1


cdef inline void reply_to_peer(
    worker_t* w, const uint8_t* p, size_t n, const ip_t* ip
) noexcept nogil:
    """Queue a "time exceeded" error about p[0:n], a packet received from a peer, for its sender."""
    cdef hop_t* hop = find_hop(w.snapshot, ip_src(p, ip), ip.addr_len)
    cdef size_t reply_len
    if hop == NULL or queue_is_full(&w.queue, 1):
        return
    reply_len = build_reply(
        w, p, n, ip.version, ICMP_TTL_EXCEEDED, 0, path_limit(hop), queue_room(&w.queue)
    )
    if reply_len == 0:
        return
    w.encap.generated += 1
    if is_capturing(w):
        capture_from_tun(w, 1, queue_room(&w.queue), reply_len, 0, hop.peer, True)
    queue_append(&w.queue, hop.peer, False, <uint32_t>reply_len)
