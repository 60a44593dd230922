"""The steps of the data path as Python functions, for tests and micro benchmarks.

Owns only the conversion of arguments and results. The functions have the same signatures as those
of ``tests.reference``. The tests compare the two. Pure functions.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from wire.cut cimport (
    SEG_HDR_ROOM, complete_checksum, cut_segment, cut_start, cut_t, is_super, plan_cut,
)
from drops cimport PASS, drop_t
from wire.ecn cimport ECN_NOT_ECT, ecn_counts_t
from wire.ecn cimport take_ecn as take
from wire.finish cimport finish_checksum as finish
from wire.merge cimport (
    MERGE_FRAME, MERGE_PACKETS, merge_add, merge_frame, merge_reset, merge_t, output_t,
)
from wire.packet cimport check_total_len, ip_t, parse_ip
from wire.packet cimport decrement_hop_limit as decrement
from wire.headers cimport VNET_LEN
from wire.probe cimport build_probe as build
from wire.probe cimport is_probe
from wire.probe cimport parse_probe as parse
from wire.probe cimport probe_t

from udptun.drops import DROP_REASONS
from tests.reference import Dropped, Probe, Taken

# Initial values for variables. They avoid gcc warnings: gcc does not see that check() raises before
# an unset field is used.
cdef ip_t NO_IP
cdef cut_t NO_CUT
cdef probe_t NO_PROBE


cdef check(drop_t verdict):
    """Raise Dropped unless the verdict is PASS."""
    if verdict != PASS:
        raise Dropped(DROP_REASONS[<int>verdict - 1].name)


cdef uint8_t* exact_copy(bytes data) except NULL:
    """Copy bytes into an allocation of exactly their size, so that a sanitizer detects any access
    outside of them. The caller frees the copy."""
    cdef uint8_t* p = <uint8_t*>malloc(len(data) or 1)
    if p == NULL:
        raise MemoryError
    memcpy(p, <const uint8_t*>data, len(data))
    return p


include "icmp.pxi"
include "lpm.pxi"


def check_packet(bytes packet):
    cdef uint8_t* p = exact_copy(packet)
    cdef ip_t ip = NO_IP
    cdef drop_t verdict
    try:
        verdict = parse_ip(p, len(packet), &ip)
        if verdict == PASS:
            verdict = check_total_len(&ip, len(packet))
        check(verdict)
        return ip.total_len
    finally:
        free(p)


def decrement_hop_limit(bytes packet):
    cdef uint8_t* p = exact_copy(packet)
    cdef ip_t ip = NO_IP
    try:
        check(parse_ip(p, len(packet), &ip))
        check(decrement(p, ip.version))
        return PyBytes_FromStringAndSize(<char*>p, len(packet))
    finally:
        free(p)


def cut(bytes frame):
    cdef uint8_t* f
    cdef uint8_t* p
    cdef uint8_t* segment = NULL
    cdef ip_t ip = NO_IP
    cdef cut_t plan = NO_CUT
    cdef size_t n
    cdef uint32_t i
    if len(frame) < VNET_LEN:
        raise Dropped("short_packet")
    f = exact_copy(frame)
    try:
        p = f + VNET_LEN
        n = len(frame) - <size_t>VNET_LEN
        check(parse_ip(p, n, &ip))
        if not is_super(f):
            check(check_total_len(&ip, n))
            check(complete_checksum(f, p, ip.total_len, &ip))
            return [PyBytes_FromStringAndSize(<char*>p, ip.total_len)]
        check(plan_cut(f, p, n, &ip, &plan))
        segment = <uint8_t*>malloc(SEG_HDR_ROOM + plan.gso_size)
        if segment == NULL:
            raise MemoryError
        cut_start(&plan, p)
        out = []
        for i in range(plan.n):
            n = cut_segment(&plan, p, i, segment)
            out.append(PyBytes_FromStringAndSize(<char*>segment, n))
        return out
    finally:
        free(segment)
        free(f)


def merge(list packets, bint tcp=True, bint udp=True):
    """Merge packets into frames. Each packet must be valid: the core drops invalid ones earlier."""
    cdef merge_t* m = <merge_t*>calloc(1, sizeof(merge_t))
    cdef uint8_t** copies = <uint8_t**>calloc(len(packets) + 1, sizeof(void*))
    cdef uint8_t* frame = <uint8_t*>malloc(MERGE_FRAME)
    cdef ip_t ip = NO_IP
    cdef int i
    cdef size_t n
    cdef output_t* out
    if m == NULL or copies == NULL or frame == NULL:
        raise MemoryError
    frames = []
    try:
        if len(packets) > MERGE_PACKETS:
            raise ValueError(f"at most {MERGE_PACKETS} packets")
        m.tcp, m.udp = tcp, udp
        merge_reset(m)
        for i, packet in enumerate(packets):
            copies[i] = exact_copy(packet)
            check(parse_ip(copies[i], len(packet), &ip))
            check(check_total_len(&ip, len(packet)))
            merge_add(m, copies[i], len(packet), &ip)
        for i in range(m.outputs_n):
            out = &m.outputs[i]
            if out.n == 1:
                frames.append(bytes(VNET_LEN) + PyBytes_FromStringAndSize(
                    <char*>m.packets[out.first].data, m.packets[out.first].len))
                continue
            n = merge_frame(m, out, frame)
            frames.append(PyBytes_FromStringAndSize(<char*>frame, n))
        return frames
    finally:
        for i in range(len(packets)):
            free(copies[i])
        free(copies)
        free(frame)
        free(m)


def take_ecn(bytes packet, uint8_t outer):
    cdef uint8_t* p
    cdef ecn_counts_t counts = [0, 0]
    check_packet(packet)
    p = exact_copy(packet)
    try:
        if outer != ECN_NOT_ECT:
            check(take(p, p[0] >> 4, outer, &counts))
        return Taken(PyBytes_FromStringAndSize(<char*>p, len(packet)),
                     counts.marked != 0, counts.unexpected != 0)
    finally:
        free(p)


def finish_checksum(bytes packet):
    cdef uint8_t* p = exact_copy(packet)
    cdef ip_t ip = NO_IP
    try:
        check(parse_ip(p, len(packet), &ip))
        check(check_total_len(&ip, len(packet)))
        finish(p, &ip)
        return PyBytes_FromStringAndSize(<char*>p, len(packet))
    finally:
        free(p)


def parse_probe(bytes datagram):
    cdef uint8_t* p = exact_copy(datagram)
    cdef probe_t probe = NO_PROBE
    try:
        if not is_probe(p, len(datagram)):
            return None
        check(parse(p, len(datagram), &probe))
        return Probe(probe.kind, probe.token, probe.heard_ms, probe.size)
    finally:
        free(p)


def build_probe(probe):
    cdef uint8_t* out = <uint8_t*>malloc(probe.size)
    cdef probe_t given
    if out == NULL:
        raise MemoryError
    given.kind, given.token, given.heard_ms, given.size = probe
    try:
        build(out, &given)
        return PyBytes_FromStringAndSize(<char*>out, given.size)
    finally:
        free(out)
