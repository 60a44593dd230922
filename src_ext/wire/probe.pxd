"""The probe message: parse it from a datagram, and build it.

Owns the format of a probe, version 1. A probe is the payload of one datagram, between two
forwarders (or, on another path, between two node daemons). Its first byte is never that of an IP
packet: the high nibble is 7. All fields are big-endian. Does not depend on peers or on when a probe
is sent.

Threading: all functions are pure, and any thread may call them. ``p`` may be any bytes.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from drops cimport DROP_BAD_TOTAL_LEN, DROP_BAD_VERSION, DROP_SHORT_PACKET, PASS, drop_t
from wire.headers cimport (
    load_be16, load_be32, load_be64, store_be16, store_be32, store_be64,
)


cdef enum:
    PROBE_LEN = 24              # the shortest probe; longer ones are padded with zeros
    PROBE_MAGIC = 0x75747031    # "utp1"
    PROBE_MAGIC_LEN = 4

    # offsets; the bytes between the fields are zero, and are ignored on receive
    PROBE_KIND = 4
    PROBE_PATH = 5
    PROBE_TOKEN = 8
    PROBE_HEARD = 16
    PROBE_SIZE = 20

    PROBE_REQUEST = 1
    PROBE_REPLY = 2
    PROBE_PATH_UDP = 1


cdef struct probe_t:
    uint8_t kind                # PROBE_REQUEST or PROBE_REPLY
    uint32_t size               # bytes of the message
    # milliseconds since the sender last received a probe from the receiver; 2**32 - 1 = never
    uint32_t heard_ms
    uint64_t token              # identifies a request; the reply has the same token


cdef inline bint is_probe(const uint8_t* p, size_t n) noexcept nogil:
    """Return whether p[0:n] begins with the bytes of a probe. The rest may still be malformed."""
    return n >= PROBE_MAGIC_LEN and load_be32(p) == PROBE_MAGIC


cdef inline drop_t parse_probe(const uint8_t* p, size_t n, probe_t* probe) noexcept nogil:
    """Read the probe p[0:n], for which ``is_probe`` is true.

    drops  SHORT_PACKET: shorter than a probe; BAD_TOTAL_LEN: the size field is not n; BAD_VERSION:
           neither a request nor a reply, or a probe of another path
    """
    if n < PROBE_LEN:
        return DROP_SHORT_PACKET
    probe.size = load_be16(p + PROBE_SIZE)
    if probe.size != n:
        return DROP_BAD_TOTAL_LEN
    probe.kind = p[PROBE_KIND]
    if probe.kind != PROBE_REQUEST and probe.kind != PROBE_REPLY:
        return DROP_BAD_VERSION
    if p[PROBE_PATH] != PROBE_PATH_UDP:
        return DROP_BAD_VERSION
    probe.token = load_be64(p + PROBE_TOKEN)
    probe.heard_ms = load_be32(p + PROBE_HEARD)
    return PASS


cdef inline void build_probe(uint8_t* out, const probe_t* probe) noexcept nogil:
    """Write a probe of probe.size bytes, PROBE_LEN..MAX_UDP_PAYLOAD."""
    memset(out, 0, probe.size)
    store_be32(out, PROBE_MAGIC)
    out[PROBE_KIND] = probe.kind
    out[PROBE_PATH] = PROBE_PATH_UDP
    store_be64(out + PROBE_TOKEN, probe.token)
    store_be32(out + PROBE_HEARD, probe.heard_ms)
    store_be16(out + PROBE_SIZE, probe.size)
