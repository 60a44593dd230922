"""A network: an address and a mask. Owns ``net_t``. Pure functions, any thread."""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset

from wire.headers cimport load_u32, load_u64


cdef struct net_t:
    uint8_t addr[16]
    uint8_t mask[16]
    uint8_t addr_len            # 4 or 16


cdef inline void set_net(
    net_t* net, const uint8_t* addr, size_t addr_len, uint32_t length
) noexcept nogil:
    """Set the network with a prefix of ``length`` bits."""
    cdef uint32_t i
    memset(net, 0, sizeof(net_t))
    memcpy(net.addr, addr, addr_len)
    net.addr_len = <uint8_t>addr_len
    for i in range(length):
        net.mask[i // 8] |= <uint8_t>(0x80 >> i % 8)


cdef inline bint in_net(
    const net_t* net, const uint8_t* addr, size_t addr_len
) noexcept nogil:
    """Return whether the network contains an address."""
    if net.addr_len != addr_len:
        return False
    if addr_len == 4:
        return (load_u32(addr) ^ load_u32(net.addr)) & load_u32(net.mask) == 0
    return (
        (load_u64(addr) ^ load_u64(net.addr)) & load_u64(net.mask) == 0
        and (load_u64(addr + 8) ^ load_u64(net.addr + 8)) & load_u64(net.mask + 8) == 0
    )
