"""The last refused senders: who caused the drops UNKNOWN_PEER and SOURCE_PORT.

Owns ``strangers_t``: a few outer source addresses, each with its last port, a count and a time. A
new address replaces the one that was silent for the longest time.

Threading: the worker's thread writes. The control side reads a copy (the sequence
lock of sys.pxd).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from sys cimport begin_write, copy_record, end_write, write_part


cdef enum:
    STRANGERS = 8


cdef struct stranger_t:
    uint8_t addr[16]
    uint8_t addr_len            # 0 = an empty entry
    uint16_t port               # of the last datagram, host order
    uint8_t reason              # drop_t of the last datagram
    uint64_t packets            # since the address is in the list
    uint64_t last_ns            # monotonic


cdef struct strangers_t:
    uint64_t changes            # odd while the list is written
    stranger_t items[STRANGERS]


cdef inline void note_stranger(
    strangers_t* strangers, const uint8_t* addr, uint8_t addr_len, uint16_t port, uint8_t reason,
    uint64_t packets, uint64_t now
) noexcept nogil:
    """Count packets that were dropped because of their sender."""
    cdef stranger_t* item = &strangers.items[0]
    cdef stranger_t noted
    cdef uint32_t i
    for i in range(STRANGERS):
        if strangers.items[i].addr_len == addr_len \
                and memcmp(strangers.items[i].addr, addr, addr_len) == 0:
            item = &strangers.items[i]
            break
        if strangers.items[i].last_ns < item.last_ns:
            item = &strangers.items[i]
    noted = item[0]
    if item.addr_len != addr_len or memcmp(item.addr, addr, addr_len) != 0:
        memset(&noted, 0, sizeof(stranger_t))
        memcpy(noted.addr, addr, addr_len)
        noted.addr_len = addr_len
    noted.port = port
    noted.reason = reason
    noted.packets += packets
    noted.last_ns = now
    begin_write(&strangers.changes)
    write_part(item, &noted, sizeof(stranger_t))
    end_write(&strangers.changes)


cdef inline bint copy_strangers(strangers_t* strangers, strangers_t* copy) noexcept nogil:
    """Copy the list. Return False if the worker wrote all the time."""
    return copy_record(&strangers.changes, strangers, copy, sizeof(strangers_t))
