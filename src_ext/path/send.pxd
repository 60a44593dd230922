"""Send the queue with as few system calls as the kernel allows.

Owns the flush. Consecutive datagrams of equal size to one peer form a run; the last datagram of a
run may be shorter. A run is one message with UDP_SEGMENT, and one sendmmsg sends many messages. If
the kernel refuses a run, the flush sends the datagrams of the run one by one. So no packet is lost
while the worker finds out whether UDP_SEGMENT works. A full socket buffer affects only the peers
whose datagrams fill it (``handle_full_socket``).

Also owns the reading of the sockets' error queues, which report path MTUs and ICMP errors. Anybody
can forge an ICMP error, and errors use the memory of the receive buffer. So a worker reads at most
ERRORS_MAX ICMP errors in ERRORS_NS. If there are more, the kernel queues none for DEAF_NS.
Threading: the worker's thread.
Source: udp(7), ip(7) (IP_RECVERR), linux net/ipv4/udp.c (UDP_SEGMENT's limits), RFC 1191, RFC 8201.
"""

from libc.errno cimport (
    EAGAIN, EINTR, EINVAL, EIO, EMSGSIZE, ENOBUFS, ENOMEM, EOPNOTSUPP, errno,
)
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from drops cimport (
    DROP_NO_BUFFER, DROP_SEND_ERROR, DROP_SLOW_PEER, DROP_TOO_BIG, PASS, drop_t,
)
from limits cimport MAX_UDP_PAYLOAD
from path.own_socket cimport give_own_socket, own_socket_of, set_option
from path.queue cimport (
    QUEUE_DATAGRAMS, datagram_t, peer_queue_t, queue_clear, queue_is_empty, queue_t,
)
from path.worker cimport (
    ERRNOS, EVENT_PATH_MTU, EVENT_UDP_GSO, TX_MSGS, drop_from_tun, own_socket_t, raise_event,
    run_t, worker_t,
)
from sys cimport (
    AF_INET, AF_INET6, CMSG_DATA, CMSG_FIRSTHDR, CMSG_LEN, CMSG_NXTHDR, CMSG_SPACE, IP_RECVERR,
    IP_TOS, IPPROTO_IP, IPPROTO_IPV6, IPPROTO_UDP, IPV6_RECVERR, IPV6_TCLASS, MSG_DONTWAIT,
    MSG_ERRQUEUE, MSG_NOSIGNAL, SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6, SO_EE_ORIGIN_LOCAL,
    UDP_SEGMENT, cmsghdr, iovec, msghdr, now_ns, peek32, peek64, poke32, poke64, recvmsg, sendmmsg,
    sock_extended_err, sockaddr_in, sockaddr_in6, store_flag,
)
from table.peer cimport HINT_DEVICE, HINT_ICMP, peer_counters_t, peer_t
from table.peer_errors cimport peer_error_t, record_error, record_refusal
from table.snapshot cimport find_hop, first_peer_at, hop_t, next_at_address
from wire.ecn cimport ECN_BITS, traffic_class
from wire.headers cimport IP4_DST, IP4_MIN, IP6_DST, IP6_LEN, swap16


cdef enum:
    MAX_ERRORS = 1024           # maximum number of errors that one read_errors reads
    ERRORS_MAX = 64             # maximum number of ICMP errors that a worker reads in ERRORS_NS
    ERRORS_NS = 100000000
    DEAF_NS = 1000000000
    QUOTE = 64                  # bytes that are read of the payload of a reported datagram
    # A flush waits for a full socket only if no other peer had datagrams during the last ALONE_NS.
    # It waits for at most PATIENCE_NS. If the socket is still full then, no flush waits during the
    # next NO_WAIT_NS.
    ALONE_NS = 10000000000
    PATIENCE_NS = 5000000
    NO_WAIT_NS = 1000000000


cdef inline int udp_fd(worker_t* w, const peer_queue_t* waiting) noexcept nogil:
    """Return the socket that sends these datagrams: the fragmenting one, the peer's own socket, or
    the shared sender."""
    cdef bint is4 = waiting.peer.addr_len == 4
    cdef own_socket_t* own
    if waiting.fragments:
        return w.fragmenting4.fd if is4 else w.fragmenting6.fd
    if w.own_sockets_n != 0:
        own = own_socket_of(w, waiting.peer)
        if own != NULL:
            return own.fd
    return w.sender4 if is4 else w.sender6


# Path MTUs and errors of peers, from the error queue


cdef inline void take_device_mtu(worker_t* w, peer_t* peer, uint32_t mtu) noexcept nogil:
    """Lower the peer's path MTU to the MTU of this host's device or route."""
    if mtu == 0 or mtu >= peek32(&peer.path_mtu):
        return
    poke32(&peer.path_mtu, mtu)
    poke32(&peer.df_mtu, mtu)
    if peek64(&peer.path_mtu_ns) == 0:
        poke64(&peer.path_mtu_ns, w.now)
    store_flag(&peer.hint, HINT_DEVICE | mtu)
    raise_event(w, EVENT_PATH_MTU)


cdef inline void take_hint(worker_t* w, peer_t* peer, uint32_t mtu) noexcept nogil:
    """Report the path MTU in an ICMP error to the control side (0 = the error has no MTU)."""
    if mtu < peek32(&peer.df_mtu):
        store_flag(&peer.hint, HINT_ICMP | mtu)
        raise_event(w, EVENT_PATH_MTU)


cdef inline bint is_routed_to(
    const worker_t* w, const peer_t* peer, const uint8_t* p, size_t n
) noexcept nogil:
    """Return False if the quoted packet p[0:n] is not for this peer. Return True if the router has
    quoted too little to see this."""
    cdef hop_t* hop
    if n >= IP4_MIN and p[0] >> 4 == 4:
        hop = find_hop(w.snapshot, p + IP4_DST, 4)
    elif n >= IP6_LEN and p[0] >> 4 == 6:
        hop = find_hop(w.snapshot, p + IP6_DST, 16)
    else:
        return True
    return hop != NULL and hop.peer == peer


cdef inline bint find_report(msghdr* msg, peer_error_t* report, uint32_t* info) noexcept nogil:
    """Read one message of the error queue. Return False if it is not about one of our datagrams.
    Set ``info`` to the MTU that an EMSGSIZE reports."""
    cdef sock_extended_err err
    cdef sockaddr_in6 reporter
    cdef size_t n
    cdef cmsghdr* c = CMSG_FIRSTHDR(msg)
    while c != NULL and not (
        (c.cmsg_level == IPPROTO_IP and c.cmsg_type == IP_RECVERR)
        or (c.cmsg_level == IPPROTO_IPV6 and c.cmsg_type == IPV6_RECVERR)
    ):
        c = CMSG_NXTHDR(msg, c)
    if c == NULL or c.cmsg_len < CMSG_LEN(sizeof(err)):
        return False
    memcpy(&err, CMSG_DATA(c), sizeof(err))
    if err.ee_origin != SO_EE_ORIGIN_LOCAL and err.ee_origin != SO_EE_ORIGIN_ICMP \
            and err.ee_origin != SO_EE_ORIGIN_ICMP6:
        return False
    memset(report, 0, sizeof(peer_error_t))
    report.error = err.ee_errno
    report.origin = err.ee_origin
    report.kind = err.ee_type
    report.code = err.ee_code
    info[0] = err.ee_info
    # The address of the sender follows (ip(7), SO_EE_OFFENDER); AF_UNSPEC = not known.
    n = c.cmsg_len - CMSG_LEN(sizeof(err))
    memset(&reporter, 0, sizeof(reporter))
    memcpy(&reporter, CMSG_DATA(c) + sizeof(err), n if n < sizeof(reporter) else sizeof(reporter))
    if reporter.sin6_family == AF_INET:
        report.reporter_len = 4
        memcpy(report.reporter, &(<sockaddr_in*>&reporter).sin_addr, 4)
    elif reporter.sin6_family == AF_INET6:
        report.reporter_len = 16
        memcpy(report.reporter, &reporter.sin6_addr, 16)
    return True


cdef inline size_t address_of(const sockaddr_in6* sa, const uint8_t** addr) noexcept nogil:
    """Set ``addr`` to the address in a socket address. Return its length. An IPv4-mapped address
    counts as an IPv4 address: the shared sender reports such addresses."""
    cdef const uint8_t* p = <const uint8_t*>&sa.sin6_addr
    cdef size_t i = 0
    if sa.sin6_family == AF_INET:
        addr[0] = <const uint8_t*>&(<const sockaddr_in*>sa).sin_addr
        return 4
    while i < 10 and p[i] == 0:
        i += 1
    if i == 10 and p[10] == 0xFF and p[11] == 0xFF:
        addr[0] = p + 12
        return 4
    addr[0] = p
    return 16


cdef inline void take_report(
    worker_t* w, const sockaddr_in6* dest, peer_error_t* report, uint32_t info,
    const uint8_t* quote, size_t quote_n
) noexcept nogil:
    """Use a report about a datagram to ``dest``. quote[0:quote_n] is the start of its payload."""
    cdef const uint8_t* addr
    cdef size_t addr_len = address_of(dest, &addr)
    cdef peer_t* peer = first_peer_at(w.snapshot, addr, addr_len)
    while peer != NULL:
        if report.error == EMSGSIZE and report.origin == SO_EE_ORIGIN_LOCAL:
            take_device_mtu(w, peer, info)
        elif peer.port == swap16(dest.sin6_port):  # at the same place in sockaddr_in
            if report.error != EMSGSIZE:
                report.time_ns = w.now
                record_error(&peer.errors[w.index], report)
                w.icmp_received += 1
            elif is_routed_to(w, peer, quote, quote_n):
                take_hint(w, peer, info)
        peer = next_at_address(peer)


cdef inline void queue_errors(const worker_t* w, int on) noexcept nogil:
    """Let the kernel queue errors for the sockets that receive, or let it discard them. Turning
    this off empties the queues."""
    if w.udp_fd4 >= 0:
        set_option(w.udp_fd4, IPPROTO_IP, IP_RECVERR, on)
    if w.udp_fd6 >= 0:
        set_option(w.udp_fd6, IPPROTO_IPV6, IPV6_RECVERR, on)


cdef inline bint admit_error(worker_t* w) noexcept nogil:
    """Count one ICMP error. Return False if there are too many; the kernel then queues no errors
    for DEAF_NS."""
    if w.now - w.errors_since_ns >= ERRORS_NS:
        w.errors_since_ns = w.now
        w.errors_n = 0
    w.errors_n += 1
    if w.errors_n <= ERRORS_MAX:
        return True
    if w.deaf_until_ns == 0:
        queue_errors(w, 0)
        w.deaf_n += 1
    w.deaf_until_ns = w.now + DEAF_NS
    return False


cdef inline void listen_again(worker_t* w) noexcept nogil:
    """Let the kernel queue errors again when DEAF_NS have passed."""
    if w.now >= w.deaf_until_ns:
        w.deaf_until_ns = 0
        queue_errors(w, 1)


cdef inline bint read_errors(worker_t* w, int fd) noexcept nogil:
    """Empty the socket's error queue. Use the path MTUs that the queue reports, and keep other
    errors for their peers. Return whether the queue held an ICMP error: the last call for this
    socket may then have failed because of it."""
    cdef msghdr msg
    cdef sockaddr_in6 dest
    cdef uint8_t control[512]
    cdef uint8_t quote[QUOTE]
    cdef iovec iov
    cdef ssize_t n
    cdef peer_error_t report
    cdef uint32_t info = 0
    cdef uint64_t deaf_before = w.deaf_n
    cdef bint icmp = False
    cdef int _i
    for _i in range(MAX_ERRORS):
        memset(&msg, 0, sizeof(msg))
        msg.msg_name = &dest
        msg.msg_namelen = sizeof(dest)
        msg.msg_control = control
        msg.msg_controllen = sizeof(control)
        msg.msg_iov = &iov
        msg.msg_iovlen = 1
        iov.iov_base = quote
        iov.iov_len = QUOTE
        n = recvmsg(fd, &msg, MSG_ERRQUEUE | MSG_DONTWAIT)
        if n < 0:
            if errno == EINTR:
                continue
            break
        if msg.msg_namelen == 0 or not find_report(&msg, &report, &info):
            continue
        if report.origin != SO_EE_ORIGIN_LOCAL:
            if not admit_error(w):
                break
            icmp = True
        take_report(w, &dest, &report, info, quote, n)
    return icmp or w.deaf_n != deaf_before


cdef inline void keep_refusal(worker_t* w, peer_t* peer, int error) noexcept nogil:
    """Keep the errno of a refused send for its peer, except EMSGSIZE, which is about the path MTU.
    """
    if error != EMSGSIZE:
        record_refusal(&peer.errors[w.index], error, w.now)
        w.sends_refused += 1
        w.refusals[error if 0 < error < ERRNOS else 0] += 1


# Messages


cdef inline void add_control(
    msghdr* msg, uint8_t* room, int level, int kind, const void* value, size_t n
) noexcept nogil:
    """Add a control message to those in ``room``, of which the first is at its start."""
    cdef cmsghdr* c = <cmsghdr*>(room + msg.msg_controllen)
    c.cmsg_level = level
    c.cmsg_type = kind
    c.cmsg_len = CMSG_LEN(n)
    memcpy(CMSG_DATA(c), value, n)
    msg.msg_control = room
    msg.msg_controllen += CMSG_SPACE(n)


cdef inline iovec* build_message(
    worker_t* w, uint32_t message, iovec* iov, peer_t* peer, int32_t datagram_i, uint32_t run_max
) noexcept nogil:
    """Build one message from a run that starts with datagram datagram_i and has at most run_max
    datagrams. Return the first unused gather entry (iovec). All datagrams of a run have the same
    traffic class."""
    cdef const queue_t* q = &w.queue
    cdef msghdr* msg = &w.tx_msgs[message].msg_hdr
    cdef const datagram_t* datagram
    cdef uint8_t* end = NULL        # end of the memory of the last gather entry
    cdef uint32_t n = 0, total = 0
    cdef uint32_t size = q.datagrams[datagram_i].len
    cdef uint16_t gso_size = <uint16_t>size
    cdef uint8_t copied = w.shared.class_copied | (ECN_BITS if peek32(&peer.ecn) else 0)
    cdef uint8_t inner = traffic_class(q.datagrams[datagram_i].data) & copied
    cdef int outer = w.shared.class_set | inner
    msg.msg_name = &peer.sa
    msg.msg_namelen = peer.sa_len
    msg.msg_iov = iov
    msg.msg_control = NULL
    msg.msg_controllen = 0
    msg.msg_flags = 0
    while datagram_i >= 0 and n < run_max:
        datagram = &q.datagrams[datagram_i]
        if n != 0:
            if datagram.len > size or total + datagram.len > MAX_UDP_PAYLOAD:
                break
            if copied != 0 and traffic_class(datagram.data) & copied != inner:
                break
        if datagram.data == end:
            (iov - 1).iov_len += datagram.len
        else:
            iov.iov_base = datagram.data
            iov.iov_len = datagram.len
            iov += 1
        end = datagram.data + datagram.len
        n += 1
        total += datagram.len
        datagram_i = datagram.next
        if datagram.len < size:
            break
    msg.msg_iovlen = iov - msg.msg_iov
    if n > 1:
        add_control(
            msg, w.tx_cmsg[message], IPPROTO_UDP, UDP_SEGMENT, &gso_size, sizeof(gso_size))
    if inner != 0:  # else the class of the socket applies
        if peer.addr_len == 4:
            add_control(msg, w.tx_cmsg[message], IPPROTO_IP, IP_TOS, &outer, sizeof(outer))
        else:
            add_control(msg, w.tx_cmsg[message], IPPROTO_IPV6, IPV6_TCLASS, &outer, sizeof(outer))
    w.tx_runs[message].n = n
    w.tx_runs[message].bytes_ = total
    w.tx_runs[message].next = datagram_i
    return iov


cdef inline uint32_t build_messages(
    worker_t* w, int fd, uint32_t peer_i, uint32_t run_max
) noexcept nogil:
    """Build at most TX_MSGS messages from the queued datagrams for the peers of one socket, from
    peer_i on. Return the number of messages."""
    cdef uint32_t n = 0
    cdef iovec* iov = &w.tx_iov[0]
    cdef peer_queue_t* waiting
    cdef int32_t datagram_i
    while peer_i < w.queue.peers_n and n < TX_MSGS:
        waiting = &w.queue.peers[peer_i]
        peer_i += 1
        if udp_fd(w, waiting) != fd:
            continue
        datagram_i = waiting.first
        while datagram_i >= 0 and n < TX_MSGS:
            iov = build_message(w, n, iov, waiting.peer, datagram_i, run_max)
            datagram_i = w.tx_runs[n].next
            n += 1
    return n


# Flush


cdef struct refusal_t:          # state of a flush after the kernel refused a message
    bint one_by_one             # send single datagrams until one is accepted
    bint gso_suspected          # a run was refused; the cause may be UDP_SEGMENT, not the size
    bint retried                # refused once already, and no ICMP error was the cause


cdef inline void account(
    worker_t* w, peer_queue_t* waiting, const run_t* run, drop_t verdict
) noexcept nogil:
    """Remove a run from the queue and count its datagrams: as sent (PASS), or as dropped."""
    cdef peer_counters_t* counters = &waiting.peer.counters[w.index]
    cdef const datagram_t* first = &w.queue.datagrams[waiting.first]
    w.queue.waiting_n -= run.n
    waiting.first = run.next
    if verdict != PASS:
        drop_from_tun(w, verdict, run.n, first.data, first.len, waiting.peer)
        return
    w.encap.delivered += run.n
    counters.encap_packets += run.n
    counters.encap_bytes += run.bytes_


cdef inline void handle_refusal(
    worker_t* w, int fd, peer_queue_t* waiting, int error, refusal_t* refusal
) noexcept nogil:
    """Handle the first message, which sendmmsg refused. If the cause can be that the message is a
    run, retry the datagrams one by one. Otherwise retry or drop the message."""
    if w.tx_runs[0].n > 1:
        # Three causes are possible: the device cannot send runs (EIO), the kernel does not support
        # UDP_SEGMENT, or the datagrams exceed the path MTU (EMSGSIZE; older kernels: EINVAL). If
        # the kernel accepts the same datagrams one by one, UDP_SEGMENT was the cause.
        if error == EIO or error == EINVAL or error == EOPNOTSUPP:
            refusal.one_by_one = True
            # A run of datagrams that must be fragmented is always refused.
            refusal.gso_suspected = not waiting.fragments
            return
        if error == EMSGSIZE:
            read_errors(w, fd)
            refusal.one_by_one = True
            return
    refusal.gso_suspected = False
    if error == ENOBUFS or error == ENOMEM:
        keep_refusal(w, waiting.peer, error)
        account(w, waiting, &w.tx_runs[0], DROP_NO_BUFFER)
    elif read_errors(w, fd):
        # This may be an ICMP error about an earlier datagram, perhaps to another peer. The kernel
        # reports such an error once, as the result of the next send, and does not send the datagram
        # of that next send. ERRORS_MAX limits the number of retries.
        refusal.retried = False
        return
    elif not refusal.retried:
        # An ICMP error can still be the cause: the kernel first queues it, then stores its number
        # for the next send. A worker may have read or removed it between the two.
        refusal.retried = True
        return
    else:
        keep_refusal(w, waiting.peer, error)
        account(
            w, waiting, &w.tx_runs[0], DROP_TOO_BIG if error == EMSGSIZE else DROP_SEND_ERROR
        )
    refusal.retried = False


cdef inline uint32_t next_waiting(worker_t* w, int fd, uint32_t peer_i) noexcept nogil:
    """Return the index of the first peer, from peer_i on, with datagrams waiting for the socket."""
    while peer_i < w.queue.peers_n and (
        w.queue.peers[peer_i].first < 0 or udp_fd(w, &w.queue.peers[peer_i]) != fd
    ):
        peer_i += 1
    return peer_i


cdef inline bint may_wait(worker_t* w) noexcept nogil:
    """Return whether a flush may wait for a full socket. During the wait, the TUN is not read. So a
    flush waits only if no other peer had datagrams recently, and only for a short time. Only a
    draining worker always waits."""
    cdef uint64_t now
    if w.draining:
        return True
    now = now_ns()
    if w.queue.peers_n != 1 or now < w.no_wait_until_ns \
            or (w.other_peer_ns != 0 and now - w.other_peer_ns < ALONE_NS):
        return False
    if w.waiting_ns == 0:
        w.waiting_ns = now
    return now - w.waiting_ns < PATIENCE_NS


cdef inline void drop_waiting(worker_t* w, peer_queue_t* waiting) noexcept nogil:
    """Drop the datagrams of a peer whose own socket is full."""
    cdef int32_t datagram_i = waiting.first
    cdef const datagram_t* first = &w.queue.datagrams[datagram_i]
    cdef uint32_t n = 0
    while datagram_i >= 0:
        n += 1
        datagram_i = w.queue.datagrams[datagram_i].next
    waiting.first = -1
    w.queue.waiting_n -= n
    drop_from_tun(w, DROP_SLOW_PEER, n, first.data, first.len, waiting.peer)


cdef inline bint handle_full_socket(
    worker_t* w, int fd, peer_queue_t* waiting
) noexcept nogil:
    """Handle a full socket buffer. Return False if the flush has to wait for the socket, or for own
    sockets (own_sockets_wanted). Otherwise the peer now has an own socket, or its datagrams are
    dropped."""
    cdef bint shared = fd == w.sender4 or fd == w.sender6
    cdef bint wait = may_wait(w)
    if shared and (w.draining or not wait):
        w.own_sockets_wanted = False
        if give_own_socket(w, waiting.peer):
            return True
        if w.own_sockets_wanted:
            return False
    if wait:
        w.full_fd = fd
        return False
    if w.waiting_ns != 0:
        w.no_wait_until_ns = now_ns() + NO_WAIT_NS
    drop_waiting(w, waiting)
    return True


cdef inline void flush_socket(worker_t* w, int fd) noexcept nogil:
    """Send the queued datagrams for the peers of one socket. If full_fd or own_sockets_wanted is
    set afterwards, the socket is full, and the rest stays in the queue."""
    cdef uint32_t n, i, run_max, peer_i = 0
    cdef int sent, error
    cdef refusal_t refusal
    memset(&refusal, 0, sizeof(refusal))
    while True:
        peer_i = next_waiting(w, fd, peer_i)
        if peer_i == w.queue.peers_n:
            return
        run_max = w.gso_max_segs if w.udp_gso and not refusal.one_by_one else 1
        n = build_messages(w, fd, peer_i, run_max)
        w.syscalls_send += 1
        sent = sendmmsg(fd, w.tx_msgs, n, MSG_DONTWAIT | MSG_NOSIGNAL)
        error = errno
        for i in range(<uint32_t>sent if sent > 0 else 0):
            peer_i = next_waiting(w, fd, peer_i)
            account(w, &w.queue.peers[peer_i], &w.tx_runs[i], PASS)
        if sent > 0:
            if <uint32_t>sent < n:
                read_errors(w, fd)  # only the error queue has the reason why a message failed
            if refusal.gso_suspected:
                w.udp_gso = False
                raise_event(w, EVENT_UDP_GSO)
            memset(&refusal, 0, sizeof(refusal))
        elif error == EAGAIN:
            if not handle_full_socket(w, fd, &w.queue.peers[peer_i]):
                return
        elif error != EINTR:
            handle_refusal(w, fd, &w.queue.peers[peer_i], error, &refusal)


cdef inline void flush_own_sockets(worker_t* w) noexcept nogil:
    """Send the queued datagrams for the peers that have an own socket."""
    cdef own_socket_t* own
    cdef uint32_t i
    for i in range(w.queue.peers_n):
        if w.queue.peers[i].first >= 0 and not w.queue.peers[i].fragments:
            own = own_socket_of(w, w.queue.peers[i].peer)
            if own != NULL:
                flush_socket(w, own.fd)


cdef inline void flush_shared(worker_t* w) noexcept nogil:
    """Send the queued datagrams from the shared senders and the own sockets. If more peers need an
    own socket than sockets are free, first empty the own sockets' part of the queue."""
    w.own_sockets_wanted = True
    while w.own_sockets_wanted and w.full_fd < 0:
        w.own_sockets_wanted = False
        if w.sender4 >= 0:
            flush_socket(w, w.sender4)
        if w.sender6 >= 0 and not w.own_sockets_wanted:
            flush_socket(w, w.sender6)
        if w.own_sockets_n != 0:
            flush_own_sockets(w)


cdef inline void note_peers(worker_t* w) noexcept nogil:
    """Store the time if the queue has datagrams for another peer than the last flush had (see
    may_wait)."""
    cdef peer_t* peer = w.queue.peers[0].peer
    if w.queue.peers_n != 1 or peer != w.last_peer:
        if w.queue.peers_n != 1 or w.last_peer != NULL:
            w.other_peer_ns = w.now
        w.last_peer = peer


cdef inline bint flush(worker_t* w) noexcept nogil:
    """Send the whole queue. Return whether the queue is now empty. If not, full_fd is a socket with
    a full buffer. Flush again when this socket is writable, or after RETRY_MS (turn.pxd)."""
    w.full_fd = -1
    if not queue_is_empty(&w.queue):
        note_peers(w)
        flush_shared(w)
        if w.fragmenting4.fd >= 0:
            flush_socket(w, w.fragmenting4.fd)
        if w.fragmenting6.fd >= 0:
            flush_socket(w, w.fragmenting6.fd)
        if w.full_fd >= 0:
            return False
        queue_clear(&w.queue)
    w.waiting_ns = 0
    return True


cdef inline bint make_room(worker_t* w, uint32_t datagrams) noexcept nogil:
    """Flush if the queue lacks space for the datagrams of the current frame. Return whether the
    queue now has space for them."""
    if datagrams > QUEUE_DATAGRAMS:
        return False
    return w.queue.n + datagrams <= QUEUE_DATAGRAMS or flush(w)
