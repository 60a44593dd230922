"""Finish the transport checksum of a packet that the kernel of a peer has sent.

The kernel may leave the transport checksum of a packet to the device (CHECKSUM_PARTIAL). Over a
virtual link no device computes it, so the packet arrives with the sum of the pseudo-header in the
field. A packet with a right checksum stays unchanged, and so does a packet whose field has any
other value: the receiver then verifies it. Source: linux include/linux/skbuff.h, RFC 1071, RFC 768.
Pure functions: any thread.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from wire.checksum cimport csum_add, csum_fold, csum_pseudo
from wire.headers cimport (
    PROTO_TCP, PROTO_UDP, TCP_CSUM, TCP_MIN, UDP_CSUM, UDP_LEN, load_u16, store_u16,
)
from wire.packet cimport ip_src, ip_t


cdef inline bint finish_checksum(uint8_t* p, const ip_t* ip) noexcept nogil:
    """Finish the checksum of a packet p[0:ip.total_len], if it is unfinished. Return whether the
    field had the sum of the pseudo-header.

    ip  from ``parse_ip``; the declared length is checked
    """
    cdef bint tcp = ip.proto == PROTO_TCP
    cdef uint8_t* l4 = p + ip.hdr_len
    cdef size_t n = ip.total_len - ip.hdr_len
    cdef uint64_t pseudo
    cdef uint16_t sum_
    cdef uint8_t* field = l4 + (TCP_CSUM if tcp else UDP_CSUM)
    if ip.fragment or (not tcp and ip.proto != PROTO_UDP) or \
            n < <size_t>(TCP_MIN if tcp else UDP_LEN):
        return False
    pseudo = csum_fold(csum_pseudo(ip_src(p, ip), ip.addr_len, ip.proto, <uint32_t>n))
    if load_u16(field) != pseudo or (not tcp and pseudo == 0):
        return False
    sum_ = csum_fold(csum_add(l4, n, 0))
    if csum_fold(sum_ + pseudo) == 0xFFFF:
        return True
    sum_ = <uint16_t>~sum_
    store_u16(field, 0xFFFF if sum_ == 0 and not tcp else sum_)
    return True
