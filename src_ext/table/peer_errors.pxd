"""What the underlay last reported against a peer: ICMP errors, and sends that the kernel refused.

Owns ``peer_errors_t``, the record of one thread about one peer. Does not depend on where an error
comes from. A path MTU is not an error: peer.pxd has it.

Threading: each thread that sends has a record of its own; only this thread writes it. The control
side reads all. ``changes`` is odd while the record is written (a sequence lock), so a reader never
uses half of a record.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from sys cimport full_fence, load_flag, store_flag


cdef enum:
    ERROR_READS = 100           # tries of a reader while a thread writes


cdef struct peer_error_t:
    uint64_t time_ns            # monotonic; 0 = no error yet
    uint32_t error              # errno
    uint8_t origin              # SO_EE_ORIGIN_*; 0 = a send was refused
    uint8_t kind                # ICMP type and code
    uint8_t code
    uint8_t reporter_len        # 4 or 16; 0 = not known
    uint8_t reporter[16]        # who sent the ICMP error


cdef struct peer_errors_t:
    uint64_t changes
    uint64_t n                  # errors ever recorded
    peer_error_t last


cdef inline void record_error(peer_errors_t* errors, const peer_error_t* error) noexcept nogil:
    store_flag(&errors.changes, errors.changes + 1)
    full_fence()
    errors.last = error[0]
    errors.n += 1
    store_flag(&errors.changes, errors.changes + 1)


cdef inline void record_refusal(peer_errors_t* errors, int error, uint64_t now) noexcept nogil:
    """Record a send that the kernel refused."""
    cdef peer_error_t refusal
    memset(&refusal, 0, sizeof(refusal))
    refusal.error = error
    refusal.time_ns = now
    record_error(errors, &refusal)


cdef inline bint read_errors_of(peer_errors_t* errors, peer_errors_t* copy) noexcept nogil:
    """Copy a record. Return False if its thread wrote all the time."""
    cdef uint64_t before
    cdef int _i
    for _i in range(ERROR_READS):
        before = load_flag(&errors.changes)
        memcpy(copy, errors, sizeof(peer_errors_t))
        full_fence()
        if before % 2 == 0 and load_flag(&errors.changes) == before:
            return True
    return False
