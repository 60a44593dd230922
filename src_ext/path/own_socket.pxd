"""Own sockets: send-only UDP sockets, each for one peer whose datagrams the kernel holds.

A datagram uses space in the send buffer of its socket until the datagram leaves the host. Before,
it may wait in the kernel for the link address of the next hop, or in a qdisc. All peers share one
socket. If the buffer of this socket is full, the peer of the next datagram gets an own socket
(send.pxd). So the datagrams that the kernel holds for other peers do not delay this peer.

A worker has at most OWN_SOCKETS own sockets. Once per LOOK_NS it looks whether they are empty. It
closes a socket that was empty at EMPTY_LOOKS looks in a row; the peer then uses the shared socket
again.

Owns opening, choosing and closing. An own socket has the local address, the port and the options of
the shared socket. It receives no datagrams and no ICMP errors: it is connected to the discard port
of this host, so the kernel delivers datagrams from all other sources to the shared socket. Each
message that it sends names its destination. ``open_socket`` also opens the spare sockets of
probe.pxd, which send a probe if the shared socket refuses it.
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
    OWN_SNDBUF = 1 << 20        # maximum SO_SNDBUF as getsockopt returns it: kernel memory, bytes
    DISCARD_PORT = 9
    LOOK_NS = 1000000000        # time between two looks
    EMPTY_LOOKS = 3             # an own socket is closed if it was empty at this number of looks
    # If all own sockets hold datagrams, the worker closes one of them, and gives the peer of this
    # socket no other one for this time. Without this limit, the worker would spend most of its time
    # with opening and closing sockets.
    REFUSE_NS = 1000000000
    RETRY_OPEN_NS = 1000000000  # if a socket cannot be opened: time until the next attempt


cdef inline own_socket_t* own_socket_of(worker_t* w, const peer_t* peer) noexcept nogil:
    """Return the peer's own socket, or NULL."""
    cdef own_socket_t* own = &w.own_sockets[peer.counters[w.index].own_socket]
    if own.peer != peer:
        return NULL
    # A new peer can have the memory of one that was freed.
    if own.addr_len != peer.addr_len or own.port != peer.port \
            or memcmp(own.addr, peer.addr, 16) != 0:
        return NULL
    return own


cdef inline int held_bytes(int fd) noexcept nogil:
    """Return the bytes of kernel memory that unsent datagrams of the socket use."""
    cdef int held = 0
    ioctl(fd, SIOCOUTQ, &held)
    return held


# Open


cdef inline int copy_option(int shared, int fd, int level, int name) noexcept nogil:
    """Copy the value of an integer option from the shared socket to fd. Ignore an option that the
    kernel or the family does not know. Return 0, or -1 with errno."""
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
    """Set the size of the send buffer: the shared socket's size, at most OWN_SNDBUF."""
    cdef int size = 0
    cdef uint32_t n = sizeof(int)
    getsockopt(shared, SOL_SOCKET, SO_SNDBUF, &size, &n)
    size = (size if size < OWN_SNDBUF else OWN_SNDBUF) // 2  # the kernel doubles the value
    if setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(int)) < 0:
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(int))


cdef inline int join_address(int shared, int fd) noexcept nogil:
    """Give fd the address and the port of the shared socket, but let it receive nothing. Return 0
    or an errno.

    Bind to the port without an address, then connect to the shared socket's address: the kernel
    then uses this address as the local address, too. So fd never joins the SO_REUSEPORT group of
    the sockets that receive. Between the two calls no datagram reaches fd, because a socket that is
    bound to the address takes precedence.
    """
    cdef sockaddr_in6 local, named
    cdef sockaddr_in* local4 = <sockaddr_in*>&local
    cdef uint32_t n = sizeof(local)
    cdef int on = 1
    if getsockname(shared, <sockaddr*>&local, &n) < 0:
        return errno
    memset(&named, 0, sizeof(named))
    named.sin6_family = local.sin6_family
    named.sin6_port = local.sin6_port  # sockaddr_in has its port at the same offset
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
    """Return a new socket that sends as the shared socket does, or a negative errno. Any thread may
    call."""
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
    """Give the socket's peer no other own socket for REFUSE_NS. Do nothing if the peer is gone."""
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
    """Return a slot without a socket. If there is none, close the oldest socket that is empty; if
    no socket is empty, close the oldest one. The sockets that the current flush needs stay open:
    at most QUEUE_PEERS, which is less than the number of slots."""
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
    """Close the own sockets that are no longer needed. Do nothing if the last look was less than
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
