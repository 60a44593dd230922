"""Probes on the UDP path: consume those that arrive, answer requests, report both kinds.

Owns the ring in which a worker reports probes to the control side, and the sending of a probe. The
worker answers a request at once, from the shared sender of the family. So the round-trip time does
not include other threads of this host. Only peers whose route has ROUTE_PROBE get replies: one
reply per request, of the same size.

The source address of a probe may be forged. So a reply gets a record only if its token is that of
a request of ours, and only once. Requests get at most REQUESTS_MAX records per peer in
REQUEST_WINDOW_NS, and at most half of the ring. A probe without a record is counted as lost.

Counting: a probe that arrives is read and consumed. A probe that is sent is generated, and then
delivered or dropped. The counters of a peer do not count probes. The control side decides when
requests are sent; this file does not depend on it.

Threading: the worker's thread, with three exceptions. The control side takes records from the ring,
which has one writer and one reader. It adds the tokens of its requests. ``send_datagram`` runs in
any thread: it touches only its arguments.
"""

from libc.errno cimport EAGAIN, EINTR, EMSGSIZE, ENOBUFS, ENOMEM, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from drops cimport (
    DROP_BAD_VERSION, DROP_NO_BUFFER, DROP_SEND_ERROR, DROP_TOO_BIG, DROP_UNKNOWN_PEER, PASS,
    drop_t,
)
from path.own_socket cimport RETRY_OPEN_NS, open_socket
from path.send cimport keep_refusal
from path.worker cimport (
    EVENT_PROBE, PROBE_RING, TOKEN_SETS, TOKEN_WAYS, count_drop, direction_t, probe_record_t,
    probe_ring_t, raise_event, spare_t, tokens_t, worker_t,
)
from sys cimport (
    MSG_DONTWAIT, MSG_NOSIGNAL, load_flag, now_ns, peek32, replace_flag, sendto, sockaddr,
    sockaddr_in6, store_flag,
)
from table.peer cimport peer_counters_t, peer_t
from wire.probe cimport PROBE_REPLY, PROBE_REQUEST, build_probe, parse_probe, probe_t


cdef enum:
    SEND_TRIES = 8              # a send may fail with the ICMP error of an earlier datagram
    REQUESTS_MAX = 8            # records of requests, per peer and worker, in one window
    REQUEST_WINDOW_NS = 100000000


# The ring


cdef inline uint64_t ring_fill(const probe_ring_t* ring) noexcept nogil:
    """Return the number of records in the ring. Only the writer calls this."""
    return ring.put - load_flag(&ring.taken)


cdef inline void ring_put(probe_ring_t* ring, const probe_record_t* record) noexcept nogil:
    """Add a record, or count it as lost if the ring is full. Only the writer calls this."""
    if ring_fill(ring) == PROBE_RING:
        ring.lost += 1
        return
    ring.records[ring.put % PROBE_RING] = record[0]
    store_flag(&ring.put, ring.put + 1)


cdef inline bint ring_take(probe_ring_t* ring, probe_record_t* record) noexcept nogil:
    """Take the oldest record. Return whether there was one. Only the reader calls this."""
    if load_flag(&ring.put) == ring.taken:
        return False
    record[0] = ring.records[ring.taken % PROBE_RING]
    store_flag(&ring.taken, ring.taken + 1)
    return True


# What gets a record


cdef inline void add_token(tokens_t* tokens, uint64_t token) noexcept nogil:
    """Accept a reply with this token. The control side."""
    cdef uint32_t row = <uint32_t>(token % TOKEN_SETS)
    store_flag(&tokens.sets[row][tokens.next_[row]], token)
    tokens.next_[row] = (tokens.next_[row] + 1) % TOKEN_WAYS


cdef inline bint take_token(tokens_t* tokens, uint64_t token) noexcept nogil:
    """Return whether a reply with this token is accepted. A second one is not. Any worker."""
    cdef uint64_t* row = tokens.sets[token % TOKEN_SETS]
    cdef int i
    if token == 0:
        return False
    for i in range(TOKEN_WAYS):
        if load_flag(&row[i]) == token:
            return replace_flag(&row[i], token, 0)
    return False


cdef inline bint admit_request(worker_t* w, const peer_t* peer, uint64_t now) noexcept nogil:
    """Return whether one more request of this peer gets a record now, and count it."""
    cdef peer_counters_t* counters = &peer.counters[w.index]
    if now - counters.requests_ns >= REQUEST_WINDOW_NS:
        counters.requests_ns = now
        counters.requests_n = 0
    if counters.requests_n == REQUESTS_MAX or ring_fill(&w.probes) >= PROBE_RING // 2:
        return False
    counters.requests_n += 1
    return True


# Sending


cdef inline int send_datagram(
    int fd, const uint8_t* p, size_t n, const void* to, uint32_t to_len
) noexcept nogil:
    """Send one datagram. Return 0 or the errno with which the kernel refused it."""
    cdef int error = 0
    cdef int _i
    for _i in range(SEND_TRIES):
        if sendto(fd, p, n, MSG_DONTWAIT | MSG_NOSIGNAL, <const sockaddr*>to, to_len) >= 0:
            return 0
        error = errno
        if error == EAGAIN or error == EMSGSIZE or error == ENOBUFS or error == ENOMEM:
            break
    return error


cdef inline int send_with_spare(
    int sender, int receiver, spare_t* spare, const uint8_t* p, size_t n, const sockaddr_in6* to,
    uint32_t to_len
) noexcept nogil:
    """Send one datagram. If the shared sender is full, send from a spare socket: no probe is lost
    because the kernel holds datagrams for other peers. Return 0 or an errno.

    receiver  the socket that receives the datagrams of this family
    spare     the spare socket of the calling thread, which is opened if needed
    """
    cdef uint64_t now
    cdef int error = send_datagram(sender, p, n, to, to_len)
    if error != EAGAIN:
        return error
    if spare.fd < 0:
        now = now_ns()
        if now < spare.retry_ns:
            return EAGAIN
        spare.fd = open_socket(receiver, to.sin6_family)
        if spare.fd < 0:
            spare.retry_ns = now + RETRY_OPEN_NS
            return EAGAIN
    return send_datagram(spare.fd, p, n, to, to_len)


cdef inline drop_t send_verdict(int error) noexcept nogil:
    """Return the drop reason of a datagram that the kernel refused with this errno; PASS for 0."""
    if error == 0:
        return PASS
    if error == EAGAIN or error == EINTR or error == ENOBUFS or error == ENOMEM:
        return DROP_NO_BUFFER
    return DROP_TOO_BIG if error == EMSGSIZE else DROP_SEND_ERROR


cdef inline void count_sent(direction_t* encap, int error) noexcept nogil:
    """Count a probe that was sent, or refused with this errno."""
    cdef drop_t verdict = send_verdict(error)
    encap.generated += 1
    if verdict == PASS:
        encap.delivered += 1
    else:
        count_drop(encap, verdict, 1)


# Receiving


cdef inline void report(
    worker_t* w, const peer_t* peer, const probe_t* probe, uint32_t port
) noexcept nogil:
    cdef probe_record_t record
    cdef uint64_t now = now_ns()
    if not (
        take_token(&w.shared.tokens, probe.token) if probe.kind == PROBE_REPLY
        else admit_request(w, peer, now)
    ):
        w.probes.lost += 1
        return
    record.probe = probe[0]
    record.addr_len = peer.addr_len
    memcpy(record.addr, peer.addr, 16)
    record.port = port
    record.received_ns = now
    ring_put(&w.probes, &record)
    # By default, a probe does not wake the control side: a wake-up costs more than the probe, and
    # the record has the time of arrival.
    if load_flag(&w.shared.wake_on_probe) or ring_fill(&w.probes) >= PROBE_RING // 4:
        raise_event(w, EVENT_PROBE)


cdef inline drop_t take_probe(
    worker_t* w, peer_t* peer, drop_t refusal, uint32_t port, const void* from_, uint32_t from_len,
    uint8_t* p, size_t n
) noexcept nogil:
    """Consume the probe p[0:n]. The reply to a request overwrites it. Return PASS or a drop reason.

    peer     the peer at the sender's address; NULL if there is none
    refusal  PASS, or why nothing from this sender is accepted
    port     of the sender, host order
    from_    the sender's socket address

    drops  those of ``parse_probe``; ``refusal``; UNKNOWN_PEER: also if the port is 0, to which no
           reply can be sent; BAD_VERSION: no route of the peer has ROUTE_PROBE
    """
    cdef probe_t probe
    cdef int sender, receiver, error
    cdef spare_t* spare
    cdef drop_t verdict = parse_probe(p, n, &probe)
    if verdict != PASS:
        return verdict
    if refusal != PASS:
        return refusal
    if peer == NULL or port == 0:
        return DROP_UNKNOWN_PEER
    if not peek32(&peer.probe):
        return DROP_BAD_VERSION
    report(w, peer, &probe, port)
    if probe.kind == PROBE_REQUEST:
        probe.kind = PROBE_REPLY
        probe.heard_ms = 0
        build_probe(p, &probe)
        sender = w.sender4 if peer.addr_len == 4 else w.sender6
        receiver = w.udp_fd4 if peer.addr_len == 4 else w.udp_fd6
        spare = &w.spare4 if peer.addr_len == 4 else &w.spare6
        w.syscalls_send += 1
        error = send_with_spare(
            sender, receiver, spare, p, n, <const sockaddr_in6*>from_, from_len
        )
        count_sent(&w.encap, error)
        if error != 0 and error != EAGAIN:
            keep_refusal(w, peer, error)
    return PASS
