"""The traffic class of the outer header: DSCP and ECN (TOS in IPv4).

Owns which traffic class a datagram gets, and what the ECN field of a received datagram changes in
its packet. Does not depend on sockets or peers.
Source: RFC 6040 (ECN in tunnels; table of 4.2), RFC 2983 (DSCP in tunnels), RFC 3168 5 (ECN field),
RFC 1624 eqn 3 (incremental checksum).
Threading: any.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from drops cimport DROP_CONGESTION, PASS, drop_t
from wire.headers cimport IP4_CSUM, IP4_TOS, load_be16, load_u16, store_u16


cdef enum:
    ECN_BITS = 3                # of the traffic class; the other bits are the DSCP
    ECN_NOT_ECT = 0             # the sender of the packet does not use ECN
    ECN_ECT1 = 1
    ECN_ECT0 = 2
    ECN_CE = 3                  # a router had congestion


cdef struct ecn_counts_t:
    uint64_t marked             # packets that got CE from their datagram
    # packets with a combination that is not in use. It is a fault, or an attack, on the path.
    uint64_t unexpected


cdef inline uint8_t traffic_class(const uint8_t* p) noexcept nogil:
    """Return the traffic class of an IPv6 packet, or the TOS of an IPv4 packet. p[0:2] is valid."""
    cdef uint32_t word = load_be16(p)
    return <uint8_t>(word if word >> 12 == 4 else word >> 4)


cdef inline void set_ecn(uint8_t* p, uint8_t version, uint8_t ecn) noexcept nogil:
    """Set the ECN field, and update the IPv4 header checksum incrementally."""
    cdef uint32_t acc
    if version == 6:
        p[1] = <uint8_t>((p[1] & ~(ECN_BITS << 4)) | ecn << 4)
        return
    acc = <uint16_t>~load_u16(p + IP4_CSUM)
    acc += <uint16_t>~load_u16(p)
    p[IP4_TOS] = <uint8_t>((p[IP4_TOS] & ~ECN_BITS) | ecn)
    acc += load_u16(p)
    acc = (acc & 0xFFFF) + (acc >> 16)
    acc = (acc & 0xFFFF) + (acc >> 16)
    store_u16(p + IP4_CSUM, <uint16_t>~acc)


cdef inline drop_t take_ecn(
    uint8_t* p, uint8_t version, uint8_t outer, ecn_counts_t* counts
) noexcept nogil:
    """Apply the ECN field of a datagram to its packet, whose IP header is valid.

    outer  the ECN field of the datagram, not ECN_NOT_ECT: that one changes nothing
    drops  CONGESTION: CE, but the sender of the packet does not use ECN, so it must see a loss
    """
    cdef uint8_t inner = traffic_class(p) & ECN_BITS
    if inner == outer:
        return PASS
    if inner == ECN_NOT_ECT and outer == ECN_CE:
        return DROP_CONGESTION
    if outer == ECN_CE:
        set_ecn(p, version, ECN_CE)
        counts.marked += 1
    elif inner == ECN_ECT0:
        set_ecn(p, version, ECN_ECT1)
    elif inner != ECN_CE or outer != ECN_ECT0:
        counts.unexpected += 1
    return PASS
