"""The last dropped packets: for each direction and drop reason, their first bytes.

Owns ``dropped_t``. Runs only for packets that are dropped. In one turn, a reason gets at most
DROPPED_N records, so a flood of such packets costs little more than counting them. A record has the
first bytes of the packet, its length, and the endpoint at the other end: for received packets the
sender, for packets to a peer the peer. The control side parses the bytes. Packets that
the forwarder has made itself (ICMP errors, probes) have no record.

Threading: the worker's thread writes. The control side reads a copy (the sequence lock of sys.pxd).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from sys cimport begin_write, copy_record, end_write, write_part


cdef extern from * nogil:
    """
    /* The code for dropped packets stays out of the functions for the packets that pass: otherwise,
       the compiler inlines less of the rest. */
    static __attribute__((cold, noinline))
    void udptun_rarely(void (*work)(const void*), const void* arguments) { work(arguments); }
    """
    void rarely "udptun_rarely"(void (*work)(const void*) noexcept nogil, const void* arguments)


cdef enum:
    DROPPED_N = 16              # records kept for each direction and reason
    DROPPED_HEAD = 64           # first bytes of a packet: addresses and ports


cdef struct dropped_packet_t:
    uint64_t time_ns            # monotonic; 0 = an empty record
    uint64_t number             # 1 for the first record of this direction and reason, and so on
    uint32_t packets            # dropped together: segments of one super-packet, or of one run
    uint32_t len                # bytes of the packet, or of the super-packet
    uint8_t addr[16]            # of the other end
    uint8_t addr_len            # 0 = there is none
    uint8_t head_len
    uint16_t port               # of the other end, host order
    uint8_t padding[4]
    uint8_t head[DROPPED_HEAD]


cdef struct dropped_t:
    uint64_t changes            # odd while a record is written
    uint64_t n                  # records written so far
    uint64_t turn_ns            # time of the turn of the last record
    uint64_t turn_n             # records of this turn
    dropped_packet_t items[DROPPED_N]


cdef inline void note_dropped(
    dropped_t* dropped, uint64_t now, uint64_t packets, const uint8_t* p, size_t n,
    const uint8_t* addr, uint8_t addr_len, uint16_t port
) noexcept nogil:
    """Record the dropped packet p[0:n]. now: time of the turn. addr_len 0: no other end."""
    cdef dropped_packet_t record
    if dropped.turn_ns == now and dropped.turn_n == DROPPED_N:
        return
    memset(&record, 0, sizeof(record))
    record.time_ns = now
    record.number = dropped.n + 1
    record.packets = <uint32_t>packets
    record.len = <uint32_t>n
    record.head_len = <uint8_t>min(n, <size_t>DROPPED_HEAD)
    memcpy(record.head, p, record.head_len)
    record.addr_len = addr_len
    record.port = port
    if addr_len != 0:
        memcpy(record.addr, addr, addr_len)
    begin_write(&dropped.changes)
    write_part(&dropped.items[dropped.n % DROPPED_N], &record, sizeof(record))
    dropped.turn_n = dropped.turn_n + 1 if dropped.turn_ns == now else 1
    dropped.turn_ns = now
    dropped.n += 1
    end_write(&dropped.changes)


cdef inline bint copy_dropped(
    dropped_t* dropped, dropped_packet_t* items
) noexcept nogil:
    """Copy the DROPPED_N records. Return False if the worker wrote all the time."""
    cdef size_t n = DROPPED_N * sizeof(dropped_packet_t)
    return copy_record(&dropped.changes, dropped.items, items, n)
