"""Offsets of header fields, and functions that load and store the fields.

Owns no state. The caller of ``load_*`` and ``store_*`` has checked the bounds. The pointer need
not be aligned. ``be`` in a name means network order. Each offset counts from the start of its
header. IP6_LEN, UDP_LEN, VNET_LEN and the ``_MIN`` names are header lengths. All other ``_LEN``
names are offsets of length fields.
Source: RFC 791, RFC 8200, RFC 9293, RFC 768, linux/virtio_net.h.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef enum:
    # virtio_net_hdr, ten bytes, native byte order
    VNET_LEN = 10
    VNET_FLAGS = 0
    VNET_GSO_TYPE = 1
    VNET_HDR_LEN = 2
    VNET_GSO_SIZE = 4
    VNET_CSUM_START = 6
    VNET_CSUM_OFFSET = 8
    VNET_F_NEEDS_CSUM = 1
    GSO_NONE = 0
    GSO_TCPV4 = 1
    GSO_TCPV6 = 4
    GSO_UDP_L4 = 5
    GSO_ECN = 0x80

    # IPv4
    IP4_MIN = 20
    IP4_TOS = 1
    IP4_LEN = 2             # offset of the total length field
    IP4_ID = 4
    IP4_FRAG = 6
    IP4_TTL = 8
    IP4_PROTO = 9
    IP4_CSUM = 10
    IP4_SRC = 12
    IP4_DST = 16
    IP4_DF = 0x4000
    IP4_MF = 0x2000
    IP4_OFFSET = 0x1FFF

    # IPv6
    IP6_LEN = 40            # header size
    IP6_PAYLOAD = 4
    IP6_NEXT = 6
    IP6_HOPS = 7
    IP6_SRC = 8
    IP6_DST = 24

    # TCP
    TCP_MIN = 20
    TCP_SEQ = 4
    TCP_ACK = 8
    TCP_OFF = 12
    TCP_FLAGS = 13
    TCP_WINDOW = 14
    TCP_CSUM = 16
    TCP_URGENT = 18
    TCP_F_FIN = 0x01
    TCP_F_PSH = 0x08
    TCP_F_ACK = 0x10
    TCP_F_CWR = 0x80

    # UDP
    UDP_LEN = 8             # header size
    UDP_LENGTH = 4          # offset of the length field
    UDP_CSUM = 6

    PROTO_ICMP = 1
    PROTO_TCP = 6
    PROTO_UDP = 17
    PROTO_ICMP6 = 58

    IP_MAX = 65535


cdef inline uint16_t load_be16(const uint8_t* p) noexcept nogil:
    return <uint16_t>((<uint32_t>p[0] << 8) | p[1])


cdef inline uint32_t load_be32(const uint8_t* p) noexcept nogil:
    return (<uint32_t>p[0] << 24) | (<uint32_t>p[1] << 16) | (<uint32_t>p[2] << 8) | p[3]


cdef inline uint64_t load_be64(const uint8_t* p) noexcept nogil:
    return (<uint64_t>p[0] << 56 | <uint64_t>p[1] << 48 | <uint64_t>p[2] << 40
            | <uint64_t>p[3] << 32 | <uint64_t>p[4] << 24 | <uint64_t>p[5] << 16
            | <uint64_t>p[6] << 8 | <uint64_t>p[7])


cdef inline void store_be16(uint8_t* p, uint32_t v) noexcept nogil:
    p[0] = <uint8_t>(v >> 8)
    p[1] = <uint8_t>v


cdef inline void store_be32(uint8_t* p, uint32_t v) noexcept nogil:
    p[0] = <uint8_t>(v >> 24)
    p[1] = <uint8_t>(v >> 16)
    p[2] = <uint8_t>(v >> 8)
    p[3] = <uint8_t>v


cdef inline void store_be64(uint8_t* p, uint64_t v) noexcept nogil:
    store_be32(p, <uint32_t>(v >> 32))
    store_be32(p + 4, <uint32_t>v)


cdef inline uint16_t load_u16(const uint8_t* p) noexcept nogil:
    """Load in native order, for the virtio header and for checksums."""
    cdef uint16_t v
    memcpy(&v, p, 2)
    return v


cdef inline void store_u16(uint8_t* p, uint16_t v) noexcept nogil:
    memcpy(p, &v, 2)


cdef inline uint64_t load_u64(const uint8_t* p) noexcept nogil:
    cdef uint64_t v
    memcpy(&v, p, 8)
    return v


cdef inline uint32_t load_u32(const uint8_t* p) noexcept nogil:
    cdef uint32_t v
    memcpy(&v, p, 4)
    return v


cdef inline uint16_t swap16(uint32_t v) noexcept nogil:
    """Convert between host order and network order. All supported hosts are little-endian."""
    return <uint16_t>(((v & 0xFF) << 8) | ((v >> 8) & 0xFF))
