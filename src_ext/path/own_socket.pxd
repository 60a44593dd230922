"""Own sockets: send-only UDP sockets, each for one peer whose datagrams the kernel holds.

The kernel charges a datagram to the socket that sent it until the datagram leaves the host: while
it waits for the link address of the next hop, or in a qdisc. All peers share one socket. If this
socket's buffer is full, the peer that is sent to next gets an own socket (send.pxd), so that the
datagrams held for other peers do not delay it. A worker has at most OWN_SOCKETS own sockets. It
closes one that was empty at several looks; the peer then uses the shared socket again.

Owns opening, choosing and closing. An own socket has the local address, the port and the options of
the shared socket. It receives no datagrams and no ICMP errors: it is connected to this host's
discard port, so a datagram from any other source belongs to the shared socket. The messages that it
sends name their destination.
A probe that the shared socket refuses is sent from a spare socket, opened in the same way
(probe.pxd).
Threading: the worker's thread, except ``open_socket``. The control side reads the counters.
Source: linux net/ipv4/udp.c (compute_score, udp_lib_rehash), net/ipv4/datagram.c.
"""

from libc.errno cimport EADDRNOTAVAIL, errno
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from path.queue cimport queue_t
from path.worker cimport (
    EVENT_OWN_SOCKET, OWN_SOCKETS, own_socket_t, raise_event, worker_t,
)
from sys cimport (
    AF_INET, AF_INET6, IP_MTU_DISCOVER, IP_RECVERR, IP_TOS, IP_TTL, IPPROTO_IP, IPPROTO_IPV6,
    IPV6_DONTFRAG, IPV6_MTU_DISCOVER, IPV6_RECVERR, IPV6_TCLASS, IPV6_UNICAST_HOPS, IPV6_V6ONLY,
    SIOCOUTQ, SO_MARK, SO_PRIORITY, SO_REUSEPORT, SO_SNDBUF, SO_SNDBUFFORCE, SOCK_CLOEXEC,
    SOCK_DGRAM, SOCK_NONBLOCK, SOL_SOCKET, bind, close, connect, getsockname, getsockopt, ioctl,
    now_ns, setsockopt, sockaddr, sockaddr_in, sockaddr_in6, socket,
)
from table.peer cimport peer_t
from table.snapshot cimport find_peer
from wire.headers cimport swap16


cdef enum:
    OWN_SNDBUF = 1 << 20        # maximum SO_SNDBUF, as reported: the kernel's bytes for one peer
    DISCARD_PORT = 9
    LOOK_NS = 1000000000        # time between two looks
    EMPTY_LOOKS = 3             # an own socket is closed when it was empty at this number of looks
    # When all own sockets hold datagrams, one is taken from its peer. The peer gets none for this
    # time. Without this limit, a worker would do little else than open and close sockets.
    REFUSE_NS = 1000000000
    RETRY_OPEN_NS = 1000000000  # after a socket could not be opened


cdef inline own_socket_t* own_socket_of(worker_t* w, const peer_t* peer) noexcept nogil:
    """Return the peer's own socket, or NULL."""
    cdef own_socket_t* own = &w.own_sockets[peer.counters[w.index].own_socket]
    return own if own.peer == peer else NULL


cdef inline int held_bytes(int fd) noexcept nogil:
    """Return the bytes of kernel memory that unsent datagrams of the socket use."""
    cdef int held = 0
    ioctl(fd, SIOCOUTQ, &held)
    return held


# Open


cdef inline int copy_option(int shared, int fd, int level, int name) noexcept nogil:
    """Set an integer option to its value on the shared socket. Options that the kernel or the
    family does not know are ignored. Return 0, or -1 with errno."""
    cdef int wanted = 0, present = 0
    cdef uint32_t n = sizeof(int)
    if getsockopt(shared, level, name, &wanted, &n) < 0:
        return 0
    n = sizeof(int)
    if getsockopt(fd, level, name, &present, &n) == 0 and present == wanted:
        return 0
    return setsockopt(fd, level, name, &wanted, sizeof(int))


cdef inline int copy_options(int shared, int fd, int family) noexcept nogil:
    if copy_option(shared, fd, SOL_SOCKET, SO_MARK) < 0 \
            or copy_option(shared, fd, SOL_SOCKET, SO_PRIORITY) < 0:
        return -1
    if family == AF_INET:
        return (
            copy_option(shared, fd, IPPROTO_IP, IP_MTU_DISCOVER)
            | copy_option(shared, fd, IPPROTO_IP, IP_RECVERR)
            | copy_option(shared, fd, IPPROTO_IP, IP_TOS)
            | copy_option(shared, fd, IPPROTO_IP, IP_TTL)
        )
    return (
        copy_option(shared, fd, IPPROTO_IPV6, IPV6_V6ONLY)
        | copy_option(shared, fd, IPPROTO_IPV6, IPV6_MTU_DISCOVER)
        | copy_option(shared, fd, IPPROTO_IPV6, IPV6_DONTFRAG)
        | copy_option(shared, fd, IPPROTO_IPV6, IPV6_RECVERR)
        | copy_option(shared, fd, IPPROTO_IPV6, IPV6_TCLASS)
        | copy_option(shared, fd, IPPROTO_IPV6, IPV6_UNICAST_HOPS)
    )


cdef inline void limit_buffer(int shared, int fd) noexcept nogil:
    """Set the send buffer to the shared socket's size, or to OWN_SNDBUF if this is less."""
    cdef int size = 0
    cdef uint32_t n = sizeof(int)
    getsockopt(shared, SOL_SOCKET, SO_SNDBUF, &size, &n)
    size = (size if size < OWN_SNDBUF else OWN_SNDBUF) // 2  # the kernel doubles the value
    if setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(int)) < 0:
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(int))


cdef inline int join_address(int shared, int fd) noexcept nogil:
    """Give the socket the shared socket's address and port, without receiving there. Return 0 or
    an errno.

    The socket binds to the port alone, then takes the address by connecting to it. So it never
    joins the SO_REUSEPORT group of the sockets that receive, and no datagram reaches it in between:
    a socket that is bound to the address takes precedence.
    """
    cdef sockaddr_in6 local, named
    cdef sockaddr_in* local4 = <sockaddr_in*>&local
    cdef uint32_t n = sizeof(local)
    cdef int on = 1
    if getsockname(shared, <sockaddr*>&local, &n) < 0:
        return errno
    memset(&named, 0, sizeof(named))
    named.sin6_family = local.sin6_family
    named.sin6_port = local.sin6_port  # at the same place in sockaddr_in
    if setsockopt(shared, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on)) < 0 \
            or setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on)) < 0 \
            or bind(fd, <sockaddr*>&named, n) < 0:
        return errno
    memcpy(&named, &local, sizeof(local))
    named.sin6_port = swap16(DISCARD_PORT)
    if connect(fd, <sockaddr*>&named, n) < 0:
        return errno
    n = sizeof(named)
    if getsockname(fd, <sockaddr*>&named, &n) < 0:
        return errno
    if local.sin6_family == AF_INET:
        if (<sockaddr_in*>&named).sin_addr.s_addr == local4.sin_addr.s_addr:
            return 0
    elif memcmp(&named.sin6_addr, &local.sin6_addr, 16) == 0:
        return 0
    return EADDRNOTAVAIL  # the host has lost the address


cdef inline int open_socket(int shared, int family) noexcept nogil:
    """Return a new socket that sends as the shared socket does, or a negative errno. Any thread."""
    cdef int fd = socket(family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    cdef int error
    if fd < 0:
        return -errno
    limit_buffer(shared, fd)
    error = errno if copy_options(shared, fd, family) < 0 else join_address(shared, fd)
    if error != 0:
        close(fd)
        return -error
    return fd


# Choose


cdef inline void close_own(worker_t* w, own_socket_t* own) noexcept nogil:
    """Close an own socket. The kernel still sends the datagrams that it holds."""
    if own.fd >= 0:
        close(own.fd)
        w.own_sockets_n -= 1
    own.fd = -1
    own.peer = NULL


cdef inline void refuse_for_a_time(
    worker_t* w, const own_socket_t* own, uint64_t now
) noexcept nogil:
    """Give the socket's peer no other socket for some time. The peer may have been freed since."""
    cdef peer_t* peer = find_peer(w.snapshot, own.addr, own.addr_len, own.port)
    if peer != NULL and peer == own.peer:
        peer.counters[w.index].refuse_until_ns = now + REFUSE_NS


cdef inline bint in_queue(const queue_t* q, const peer_t* peer) noexcept nogil:
    cdef uint32_t i
    for i in range(q.peers_n):
        if q.peers[i].peer == peer:
            return True
    return False


cdef inline own_socket_t* choose_slot(worker_t* w, uint64_t now) noexcept nogil:
    """Return a slot without a socket. If all have one, close the socket that was given first among
    those that are empty, or among all if none is empty. The sockets that the present flush needs
    stay open; there are fewer of them than slots."""
    cdef own_socket_t* own
    cdef own_socket_t* best = NULL
    cdef bint empty, best_empty = False
    cdef uint32_t i
    for i in range(OWN_SOCKETS):
        own = &w.own_sockets[i]
        if own.fd < 0:
            return own
        if in_queue(&w.queue, own.peer):
            continue
        empty = held_bytes(own.fd) == 0
        if best == NULL or (empty and not best_empty) \
                or (empty == best_empty and own.given_ns < best.given_ns):
            best = own
            best_empty = empty
    if not best_empty:
        refuse_for_a_time(w, best, now)
    close_own(w, best)
    return best


cdef inline bint give_own_socket(worker_t* w, int shared, peer_t* peer) noexcept nogil:
    """Give the peer an own socket, which sends as ``shared`` does. Return False if the peer may
    have none now, or the kernel refuses."""
    cdef uint64_t now = now_ns()
    cdef own_socket_t* own
    if now < peer.counters[w.index].refuse_until_ns or now < w.own_retry_ns:
        return False
    own = choose_slot(w, now)
    own.fd = open_socket(shared, AF_INET if peer.addr_len == 4 else AF_INET6)
    if own.fd < 0:
        w.own_error = -own.fd
        own.fd = -1
        w.own_retry_ns = now + RETRY_OPEN_NS
        raise_event(w, EVENT_OWN_SOCKET)
        return False
    own.peer = peer
    memcpy(own.addr, peer.addr, 16)
    own.addr_len = peer.addr_len
    own.port = peer.port
    own.given_ns = now
    own.empty_looks = 0
    peer.counters[w.index].own_socket = <uint32_t>(own - &w.own_sockets[0])
    w.own_sockets_n += 1
    w.own_sockets_given += 1
    return True


cdef inline void look_at_own_sockets(worker_t* w) noexcept nogil:
    """Close the own sockets that are no longer needed. Does nothing if the last look was less than
    LOOK_NS ago."""
    cdef own_socket_t* own
    cdef uint32_t i
    if w.now < w.own_look_ns:
        return
    w.own_look_ns = w.now + LOOK_NS
    for i in range(OWN_SOCKETS):
        own = &w.own_sockets[i]
        if own.fd < 0:
            continue
        own.empty_looks = own.empty_looks + 1 if held_bytes(own.fd) == 0 else 0
        if own.empty_looks >= EMPTY_LOOKS:
            close_own(w, own)


cdef inline void close_own_sockets(worker_t* w) noexcept nogil:
    cdef uint32_t i
    for i in range(OWN_SOCKETS):
        close_own(w, &w.own_sockets[i])
