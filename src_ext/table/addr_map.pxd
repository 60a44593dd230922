"""A hash map from addresses to peers, also used as a set of addresses.

A map owns its slots, but not the peers. Does not depend on ports or routes.

Threading: no locks. Any number of threads may read a map while no thread changes the map.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

from table.peer cimport peer_t
from wire.headers cimport load_u32, load_u64


cdef struct addr_slot_t:
    uint8_t addr[16]
    uint8_t addr_len            # 4 or 16; 0 = empty
    # The peers at this address may also send from these ports: from the lowest to the highest port
    # that the routes to the address name; none if first > last. Unused in a set
    uint16_t source_first
    uint16_t source_last
    peer_t* peer                # NULL in a set


cdef struct addr_map_t:
    addr_slot_t* slots          # owned
    uint32_t mask               # number of slots - 1; the number is a power of two


cdef inline uint32_t addr_hash(const uint8_t* addr, size_t addr_len) noexcept nogil:
    """Hash an address. The hash needs no secret: only configured addresses are inserted, so a peer
    cannot choose the keys."""
    cdef uint64_t h
    if addr_len == 4:
        h = load_u32(addr)
    else:
        h = load_u64(addr) ^ (load_u64(addr + 8) * <uint64_t>0x9E3779B97F4A7C15)
    h *= <uint64_t>0xD6E8FEB86659FD93
    return <uint32_t>(h >> 32)


cdef inline int addr_map_init(addr_map_t* m, size_t n) noexcept nogil:
    """Allocate an empty map for n addresses, which fill at most half of the slots. Return 0, or -1
    if there is no memory."""
    cdef uint32_t size = 8
    while size < 2 * n:
        size *= 2
    m.slots = <addr_slot_t*>calloc(size, sizeof(addr_slot_t))
    m.mask = size - 1
    return 0 if m.slots != NULL else -1


cdef inline void addr_map_free(addr_map_t* m) noexcept nogil:
    """Free the slots, but not the peers."""
    free(m.slots)
    m.slots = NULL


cdef inline addr_slot_t* addr_map_find(
    const addr_map_t* m, const uint8_t* addr, size_t addr_len
) noexcept nogil:
    """Return the slot of the address, or the empty slot where it would be inserted."""
    cdef uint32_t i = addr_hash(addr, addr_len) & m.mask
    cdef addr_slot_t* slot
    while True:
        slot = &m.slots[i]
        if slot.addr_len == 0:
            return slot
        if slot.addr_len == addr_len and memcmp(slot.addr, addr, addr_len) == 0:
            return slot
        i = (i + 1) & m.mask


cdef inline addr_slot_t* addr_map_put(
    addr_map_t* m, const uint8_t* addr, size_t addr_len
) noexcept nogil:
    """Return the slot of the address; insert the address if it is missing."""
    cdef addr_slot_t* slot = addr_map_find(m, addr, addr_len)
    if slot.addr_len == 0:
        memcpy(slot.addr, addr, addr_len)
        slot.addr_len = <uint8_t>addr_len
    return slot


cdef inline int addr_map_grow(addr_map_t* m) noexcept nogil:
    """Double the number of slots. Return 0. If there is no memory, return -1 and change nothing."""
    cdef addr_map_t bigger
    cdef uint32_t i
    if addr_map_init(&bigger, m.mask + 1) < 0:
        return -1
    for i in range(m.mask + 1):
        if m.slots[i].addr_len != 0:
            addr_map_put(&bigger, m.slots[i].addr, m.slots[i].addr_len)[0] = m.slots[i]
    free(m.slots)
    m[0] = bigger
    return 0
