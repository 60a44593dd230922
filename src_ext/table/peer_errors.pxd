"""What the underlay last reported against a peer: ICMP errors, and sends that the kernel refused.

Owns ``peer_errors_t``, the record of one thread about one peer. Does not depend on where an error
comes from. A path MTU is not an error: peer.pxd has it.

Threading: each thread that sends has a record of its own; only this thread writes it. The control
side copies all. The sequence lock of sys.pxd prevents that a reader uses half of a record.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from sys cimport begin_write, copy_record, end_write, store_flag, write_part


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
    begin_write(&errors.changes)
    write_part(&errors.last, error, sizeof(peer_error_t))
    store_flag(&errors.n, errors.n + 1)
    end_write(&errors.changes)


cdef inline void record_refusal(peer_errors_t* errors, int error, uint64_t now) noexcept nogil:
    """Record a send that the kernel refused."""
    cdef peer_error_t refusal
    memset(&refusal, 0, sizeof(refusal))
    refusal.error = error
    refusal.time_ns = now
    record_error(errors, &refusal)


cdef inline bint read_errors_of(peer_errors_t* errors, peer_errors_t* copy) noexcept nogil:
    """Copy a record. Return False if its thread wrote all the time."""
    return copy_record(&errors.changes, errors, copy, sizeof(peer_errors_t))
