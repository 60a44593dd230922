"""The last refused senders: the sources of the drops UNKNOWN_PEER and SOURCE_PORT.

Owns ``refused_senders_t``: a few outer source addresses, each with its last port, a count and a
time. A new address replaces the address whose last datagram is the oldest.

Threading: the worker's thread writes. The control side reads a copy (the sequence lock of
sys.pxd).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from sys cimport begin_write, copy_record, end_write, write_part


cdef enum:
    REFUSED_SENDERS = 8


cdef struct refused_sender_t:
    uint8_t addr[16]
    uint8_t addr_len            # 0 = an empty entry
    uint16_t port               # of the last datagram, host order
    uint8_t reason              # drop_t of the last datagram
    uint64_t packets            # since the address is in the list
    uint64_t last_ns            # monotonic


cdef struct refused_senders_t:
    uint64_t changes            # odd while the list is written
    refused_sender_t items[REFUSED_SENDERS]


cdef inline void count_refused_sender(
    refused_senders_t* senders, const uint8_t* addr, uint8_t addr_len, uint16_t port,
    uint8_t reason, uint64_t packets, uint64_t now
) noexcept nogil:
    """Count packets that were dropped because of their sender."""
    cdef refused_sender_t* item = &senders.items[0]
    cdef refused_sender_t noted
    cdef uint32_t i
    for i in range(REFUSED_SENDERS):
        if senders.items[i].addr_len == addr_len \
                and memcmp(senders.items[i].addr, addr, addr_len) == 0:
            item = &senders.items[i]
            break
        if senders.items[i].last_ns < item.last_ns:
            item = &senders.items[i]
    noted = item[0]
    if item.addr_len != addr_len or memcmp(item.addr, addr, addr_len) != 0:
        memset(&noted, 0, sizeof(refused_sender_t))
        memcpy(noted.addr, addr, addr_len)
        noted.addr_len = addr_len
    noted.port = port
    noted.reason = reason
    noted.packets += packets
    noted.last_ns = now
    begin_write(&senders.changes)
    write_part(item, &noted, sizeof(refused_sender_t))
    end_write(&senders.changes)


cdef inline bint copy_refused_senders(
    refused_senders_t* senders, refused_senders_t* copy
) noexcept nogil:
    """Copy the list. Return False if the worker changed it during every attempt."""
    return copy_record(&senders.changes, senders, copy, sizeof(refused_senders_t))
