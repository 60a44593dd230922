"""Capture: the Python class of one running capture. Included by _core.pyx.

Owns the size of the rings. Does not depend on how the packets are processed. path/capture.pxd has
the filter and the format of the records.

Threading: the control thread only.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from path.capture cimport (
    CAPTURE_ENDS, CAPTURE_IN, CAPTURE_NETS, CAPTURE_OUT, CAPTURE_PEERS, CAPTURE_PROTOS,
    capture_filter_t, capture_free, capture_new, capture_ring_t, capture_t, ring_take_bytes,
    ring_waiting,
)
from sys cimport peek64
from wire.net cimport set_net

CAPTURE_DIRECTIONS = {"in": CAPTURE_IN, "out": CAPTURE_OUT, "both": CAPTURE_IN | CAPTURE_OUT}
RINGS_BYTES = 4 << 20           # of all rings of a capture, but at least LEAST_RING for each
LEAST_RING = 1 << 20


cdef capture_t* new_capture(filter, uint32_t workers_n) except NULL:
    """Return a capture with a model.CaptureFilter. Raise MemoryError."""
    cdef uint64_t ring_size = LEAST_RING
    cdef capture_t* capture
    while 2 * ring_size * workers_n <= RINGS_BYTES:
        ring_size *= 2
    capture = capture_new(workers_n, ring_size)
    if capture == NULL:
        raise MemoryError
    try:
        set_filter(&capture.filter, filter)
    except BaseException:
        capture_free(capture)
        raise
    return capture


cdef set_filter(capture_filter_t* f, filter):
    cdef bytes packed
    cdef uint32_t i
    for name, given, most in (
        ("peers", filter.peers, CAPTURE_PEERS), ("networks", filter.networks, CAPTURE_NETS),
        ("hosts", filter.hosts, CAPTURE_ENDS), ("ports", filter.ports, CAPTURE_ENDS),
        ("protocols", filter.protocols, CAPTURE_PROTOS),
    ):
        if len(given) > most:
            raise ValueError(f"more than {most} {name}")
    f.directions = CAPTURE_DIRECTIONS[filter.direction]
    f.dropped_only = filter.dropped
    f.snaplen, f.sample = filter.snaplen, filter.sample
    f.peers_n, f.nets_n = len(filter.peers), len(filter.networks)
    f.hosts_n, f.ports_n = len(filter.hosts), len(filter.ports)
    f.protos_n = len(filter.protocols)
    for i, (address, port) in enumerate(filter.peers):
        packed = address.packed
        memcpy(f.peers[i].addr, <const uint8_t*>packed, len(packed))
        f.peers[i].addr_len, f.peers[i].port = <uint8_t>len(packed), port
    for i, network in enumerate(filter.networks):
        packed = network.network_address.packed
        set_net(&f.nets[i], packed, len(packed), network.prefixlen)
    for i, address in enumerate(filter.hosts):
        packed = address.packed
        memcpy(f.hosts[i].addr, <const uint8_t*>packed, len(packed))
        f.hosts[i].addr_len = <uint8_t>len(packed)
    for i, port in enumerate(filter.ports):
        f.ports[i] = port
    for i, protocol in enumerate(filter.protocols):
        f.protos[i] = protocol


@cython.no_gc_clear  # __dealloc__ uses self.core, so the garbage collector must not clear it
cdef class Capture:
    """A running capture. It ends with ``close``, or when the object is deleted."""
    cdef Core core
    cdef uint32_t slot
    cdef capture_t* capture

    def __cinit__(self, Core core, uint32_t slot):
        self.core, self.slot = core, slot
        self.capture = core.shared.captures.items[slot]

    def __dealloc__(self):
        self.close()

    def close(self):
        """End the capture. Records that were not taken are gone."""
        if self.capture != NULL:
            self.capture = NULL
            self.core.end_capture(self.slot)

    def take(self):
        """Return the records since the last call, of one worker after the other, as one block."""
        cdef bytes block
        cdef uint8_t* out
        cdef uint64_t n
        cdef uint32_t i
        blocks = []
        if self.capture != NULL:
            for i in range(self.capture.rings_n):
                n = ring_waiting(&self.capture.rings[i])
                if n == 0:
                    continue
                block = PyBytes_FromStringAndSize(NULL, n)
                out = <uint8_t*><char*>block
                with nogil:
                    ring_take_bytes(&self.capture.rings[i], self.capture.ring_size, out, n)
                blocks.append(block)
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def counts(self):
        """Return (packets that matched, packets for which there was no space)."""
        cdef uint64_t matched = 0, lost = 0
        cdef uint32_t i
        if self.capture != NULL:
            for i in range(self.capture.rings_n):
                matched += peek64(&self.capture.rings[i].matched)
                lost += peek64(&self.capture.rings[i].lost)
        return matched, lost
