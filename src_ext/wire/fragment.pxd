"""Fragment an IPv4 packet for a smaller MTU: write new headers, and point to the payload.

Owns no state and copies no payload. The caller has parsed the IP header, and has checked that the
packet is IPv4 without DF. The options are validated here.
Source: RFC 791 3.1 (options, copied flag), 3.2 (fragmentation procedure).

The packet is in two pieces. ``hdr`` has ip_hdr_len bytes of IP header, then the *lead*: lead_len
bytes of transport header, or none (0). ``data`` is the rest of the packet.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy

from wire.checksum cimport ip4_set_csum
from wire.cut cimport SEG_HDR_ROOM
from wire.headers cimport (
    IP4_FRAG, IP4_LEN, IP4_MF, IP4_MIN, IP4_OFFSET, load_be16, store_be16,
)


cdef enum:
    FRAG_HDR_MAX = SEG_HDR_ROOM  # an IP header of 60 bytes and a lead of 60 fit
    OPT_END = 0
    OPT_NOP = 1
    OPT_COPIED = 0x80


cdef struct frag_t:             # one fragment: hdr_len bytes of out_hdr, then data
    uint32_t hdr_len            # in the first fragment: including the lead
    const uint8_t* data         # points into the caller's data
    uint32_t data_len


cdef inline int fragment_n(
    size_t ip_hdr_len, size_t lead_len, size_t data_len, size_t mtu
) noexcept nogil:
    """Return the number of fragments of at most mtu bytes. 1: the packet fits. 0: after the IP
    header, the MTU has no space for 8 bytes, or (rounded down to 8) not for the lead."""
    cdef size_t payload = lead_len + data_len
    cdef size_t room, step
    if mtu < ip_hdr_len:
        return 0
    room = mtu - ip_hdr_len
    if payload <= room:
        return 1
    step = room & ~<size_t>7
    if step == 0 or step < lead_len:
        return 0
    return <int>(1 + (payload - room + step - 1) / step)


cdef inline size_t fragment_options(
    const uint8_t* hdr, size_t ip_hdr_len, uint8_t* out
) noexcept nogil:
    """Copy to out (40 bytes) the options that every fragment carries. Pad the options with
    end-of-list to a multiple of 4 bytes. Stop at an option that exceeds the header. Return the
    number of bytes written."""
    cdef size_t off = IP4_MIN
    cdef size_t used = 0
    cdef size_t opt_len
    while off < ip_hdr_len and hdr[off] != OPT_END:
        if hdr[off] == OPT_NOP:
            off += 1
            continue
        if off + 1 >= ip_hdr_len:
            break
        opt_len = hdr[off + 1]
        if opt_len < 2 or off + opt_len > ip_hdr_len:
            break
        if hdr[off] & OPT_COPIED:
            memcpy(out + used, hdr + off, opt_len)
            used += opt_len
        off += opt_len
    while used & 3:
        out[used] = OPT_END
        used += 1
    return used


cdef inline void fragment_at(
    const uint8_t* hdr, size_t ip_hdr_len, size_t lead_len,
    const uint8_t* data, size_t data_len, size_t mtu, int i, uint8_t* out_hdr, frag_t* out
) noexcept nogil:
    """Write fragment i.

    hdr      20..60 bytes of IP header, then lead_len <= 60; its length field is ignored
    i        0..fragment_n - 1. All fragments except the last have the same payload length:
             the MTU minus the full IP header, rounded down to 8 bytes. If later fragments have
             fewer options, the space that this saves is not used
    out_hdr  FRAG_HDR_MAX bytes, does not overlap hdr. Out: the first fragment's full header and
             lead, or a later fragment's header with the copied options
    out      out.data points into data

    If the packet itself is a fragment, its offset is added to each offset, and the last fragment
    keeps its MF flag. If an offset is too large for the field, the packet would reassemble to more
    than 65535 bytes. The field is then set to its maximum, and every receiver drops the fragment.
    """
    cdef size_t room = mtu - ip_hdr_len
    cdef size_t step = room & ~<size_t>7
    cdef size_t off = <size_t>i * step
    cdef size_t left = lead_len + data_len - off
    cdef bint last = left <= room
    cdef size_t take = left if last else step
    cdef uint32_t frag = load_be16(hdr + IP4_FRAG)
    cdef size_t units = (frag & IP4_OFFSET) + off / 8
    cdef size_t hdr_len = ip_hdr_len
    if i == 0:
        memcpy(out_hdr, hdr, ip_hdr_len + lead_len)
        out.hdr_len = <uint32_t>(ip_hdr_len + lead_len)
        out.data = data
        out.data_len = <uint32_t>(take - lead_len)
    else:
        memcpy(out_hdr, hdr, IP4_MIN)
        hdr_len = IP4_MIN + fragment_options(hdr, ip_hdr_len, out_hdr + IP4_MIN)
        out_hdr[0] = <uint8_t>(0x40 | (hdr_len >> 2))
        out.hdr_len = <uint32_t>hdr_len
        out.data = data + (off - lead_len)
        out.data_len = <uint32_t>take
    if units > IP4_OFFSET:
        units = IP4_OFFSET
    frag = (frag & ~<uint32_t>IP4_OFFSET) | <uint32_t>units
    if not last:
        frag |= IP4_MF
    store_be16(out_hdr + IP4_LEN, <uint32_t>(hdr_len + take))
    store_be16(out_hdr + IP4_FRAG, frag)
    ip4_set_csum(out_hdr, hdr_len)
