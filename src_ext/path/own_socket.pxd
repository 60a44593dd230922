"""Sockets that only send: the shared sender, own sockets of slow peers, and sockets for datagrams
that may be fragmented.

Over IPv4, the *shared sender* and the receiving socket are two sockets with the same address and
port:

- The receiving socket gets the ICMP errors. So an error, which can be forged, does not make a send
  fail. With IP_PMTUDISC_OMIT, this socket also ignores the path MTU in an error, which the kernel
  would otherwise store for all programs of the host.
- The shared sender sets DF (IP_PMTUDISC_PROBE), which a socket with IP_PMTUDISC_OMIT does not.

Over IPv6, the receiving socket is also the shared sender: with IPV6_DONTFRAG, the kernel does not
fragment.

An inner IPv6 packet of up to 1280 bytes must arrive, even if the path MTU is too small for it (RFC
8200 5). Datagrams with such packets leave from a *fragmenting* socket, which sets no DF. So this
host or a router can fragment them. Over IPv6 only this host can fragment, and only if the kernel
has accepted the path MTU from an ICMPv6 error.

A datagram uses space in the send buffer of its socket until the datagram leaves the host. It may
first wait in the kernel for the link address of the next hop, or in a qdisc. All peers share one
socket. If the buffer of this socket is full, the peer of the next datagram gets an own socket
(send.pxd). So the datagrams that the kernel holds for other peers do not delay this peer.

A worker has at most OWN_SOCKETS own sockets. Once per LOOK_NS it looks whether they are empty. It
closes a socket that was empty at EMPTY_LOOKS looks in a row; the peer then uses the shared sender
again.

Owns opening, choosing and closing. These sockets have the local address, the port and the options
of the socket that receives. Each message names its destination. They receive nothing:

- The shared sender is an IPv6 socket that is bound to the IPv4-mapped address. For an IPv4
  datagram, and for an ICMP error about one, the kernel prefers the IPv4 socket.
- The other sockets are bound to the port without an address, and connected to a random port of
  this host. So the kernel delivers datagrams from all other sources to the socket that receives. A
  forged ICMP error about such a socket would have to name the random port. The kernel refuses the
  bind if another program has the same port at another address of this host. Then the IPv4 ones are
  bound as the shared sender is, and the IPv6 ones to the address (``join_beside``).

``open_socket`` also opens the spare sockets of probe.pxd, which send a probe if the shared sender
refuses it.
Threading: the worker's thread, except ``open_socket`` and ``open_sender``. The control side reads
the counters.
Source: linux net/ipv4/udp.c (compute_score, udp_lib_get_port, udp_lib_rehash, __udp4_lib_err),
net/ipv4/datagram.c, net/ipv4/ip_output.c (__ip_make_skb), net/ipv6/udp.c (udpv6_sendmsg).
"""

from libc.errno cimport EADDRINUSE, EADDRNOTAVAIL, errno
from libc.limits cimport INT_MAX
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from path.queue cimport queue_t
from path.worker cimport (
    EVENT_OWN_SOCKET, OWN_SOCKETS, own_socket_t, raise_event, spare_t, worker_t,
)
from sys cimport (
    AF_INET, AF_INET6, IP_MTU_DISCOVER, IP_PMTUDISC_OMIT, IP_PMTUDISC_PROBE, IP_RECVERR, IP_TOS,
    IP_TTL, IPPROTO_IP, IPPROTO_IPV6, IPV6_DONTFRAG, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_WANT,
    IPV6_RECVERR, IPV6_TCLASS, IPV6_UNICAST_HOPS, IPV6_V6ONLY, SIOCOUTQ, SO_MARK, SO_PRIORITY,
    SO_REUSEPORT, SO_SNDBUF, SO_SNDBUFFORCE, SOCK_CLOEXEC, SOCK_DGRAM, SOCK_NONBLOCK, SOL_SOCKET,
    bind, close, connect, getrandom, getsockname, getsockopt, ioctl, now_ns, setsockopt, sockaddr,
    sockaddr_in, sockaddr_in6, socket,
)
from table.peer cimport peer_t
from table.snapshot cimport find_peer
from wire.headers cimport swap16


cdef enum:
    OWN_SNDBUF = 1 << 20        # maximum SO_SNDBUF as getsockopt returns it: kernel memory, bytes
    LOWEST_PORT = 1024          # of the random ports to which own sockets are connected
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


cdef inline int set_option(int fd, int level, int name, int value) noexcept nogil:
    return setsockopt(fd, level, name, &value, sizeof(int))


cdef inline int copy_option(int receiver, int fd, int level, int name) noexcept nogil:
    """Copy the value of an integer option from the receiving socket to fd. Ignore an option that
    the kernel or the family does not support. Return 0, or -1 with errno."""
    cdef int wanted = 0, present = 0
    cdef uint32_t n = sizeof(int)
    if getsockopt(receiver, level, name, &wanted, &n) < 0:
        return 0
    n = sizeof(int)
    if getsockopt(fd, level, name, &present, &n) == 0 and present == wanted:
        return 0
    return set_option(fd, level, name, wanted)


cdef inline int copy_options(int receiver, int fd, int family) noexcept nogil:
    """Set the options of a socket that sends. If the kernel refuses to send a datagram from this
    socket, only this socket gets the error. Return 0, or a negative number with errno.

    family  of the addresses to which the socket sends
    """
    if copy_option(receiver, fd, SOL_SOCKET, SO_MARK) < 0 \
            or copy_option(receiver, fd, SOL_SOCKET, SO_PRIORITY) < 0:
        return -1
    if family == AF_INET:
        return (
            set_option(fd, IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE)
            | set_option(fd, IPPROTO_IP, IP_RECVERR, 1)
            | copy_option(receiver, fd, IPPROTO_IP, IP_TOS)
            | copy_option(receiver, fd, IPPROTO_IP, IP_TTL)
        )
    return (
        copy_option(receiver, fd, IPPROTO_IPV6, IPV6_V6ONLY)
        | copy_option(receiver, fd, IPPROTO_IPV6, IPV6_MTU_DISCOVER)
        | copy_option(receiver, fd, IPPROTO_IPV6, IPV6_DONTFRAG)
        | set_option(fd, IPPROTO_IPV6, IPV6_RECVERR, 1)
        | copy_option(receiver, fd, IPPROTO_IPV6, IPV6_TCLASS)
        | copy_option(receiver, fd, IPPROTO_IPV6, IPV6_UNICAST_HOPS)
    )


cdef inline void set_buffer(int receiver, int fd, int limit) noexcept nogil:
    """Set the size of the send buffer: the receiving socket's size, at most ``limit``."""
    cdef int size = 0
    cdef uint32_t n = sizeof(int)
    getsockopt(receiver, SOL_SOCKET, SO_SNDBUF, &size, &n)
    size = (size if size < limit else limit) // 2  # the kernel doubles the value
    if setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(int)) < 0:
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(int))


cdef inline int connect_nowhere(int fd, const sockaddr_in6* local, uint32_t n) noexcept nogil:
    """Connect fd to a random port of the local address, of either family. Return 0 or an errno."""
    cdef sockaddr_in6 named
    cdef uint16_t port = 0
    memcpy(&named, local, sizeof(named))
    getrandom(&port, sizeof(port), 0)
    named.sin6_port = swap16(<uint16_t>(port | LOWEST_PORT))  # at the same place in sockaddr_in
    return errno if connect(fd, <sockaddr*>&named, n) < 0 else 0


cdef inline int bind_shared(
    int receiver, int fd, const void* address, uint32_t n
) noexcept nogil:
    """Bind fd to an address with the port of the receiving socket. Return 0 or an errno."""
    if set_option(receiver, SOL_SOCKET, SO_REUSEPORT, 1) < 0 \
            or set_option(fd, SOL_SOCKET, SO_REUSEPORT, 1) < 0 \
            or bind(fd, <const sockaddr*>address, n) < 0:
        return errno
    return 0


cdef inline int join_address(int receiver, int fd) noexcept nogil:
    """Give fd the address and the port of the receiving socket, but let it receive nothing. Return
    0 or an errno.

    Bind to the port without an address, then connect to the receiving socket's address: the kernel
    then uses this address as the local address, too. So fd never joins the SO_REUSEPORT group of
    the sockets that receive. Between the two calls no datagram reaches fd, because a socket that is
    bound to the address takes precedence.
    """
    cdef sockaddr_in6 local, named
    cdef sockaddr_in* local4 = <sockaddr_in*>&local
    cdef uint32_t n = sizeof(local)
    cdef int error
    if getsockname(receiver, <sockaddr*>&local, &n) < 0:
        return errno
    memset(&named, 0, sizeof(named))
    named.sin6_family = local.sin6_family
    named.sin6_port = local.sin6_port  # sockaddr_in has its port at the same offset
    error = bind_shared(receiver, fd, &named, n)
    if error == 0:
        error = connect_nowhere(fd, &local, n)
    if error != 0:
        return error
    n = sizeof(named)
    if getsockname(fd, <sockaddr*>&named, &n) < 0:
        return errno
    if local.sin6_family == AF_INET:
        if (<sockaddr_in*>&named).sin_addr.s_addr == local4.sin_addr.s_addr:
            return 0
    elif memcmp(&named.sin6_addr, &local.sin6_addr, 16) == 0:
        return 0
    return EADDRNOTAVAIL  # the host has lost the address


cdef inline int join_as_mapped(int receiver, int fd) noexcept nogil:
    """Bind fd to the IPv4-mapped address and the port of the receiving socket. Return 0 or an
    errno."""
    cdef sockaddr_in local
    cdef sockaddr_in6 mapped
    cdef uint32_t n = sizeof(local)
    if getsockname(receiver, <sockaddr*>&local, &n) < 0:
        return errno
    if local.sin_family != AF_INET:
        return EADDRNOTAVAIL
    memset(&mapped, 0, sizeof(mapped))
    mapped.sin6_family = AF_INET6
    mapped.sin6_port = local.sin_port
    memset(<uint8_t*>&mapped.sin6_addr + 10, 0xFF, 2)
    memcpy(<uint8_t*>&mapped.sin6_addr + 12, &local.sin_addr, 4)
    if set_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, 0) < 0:
        return errno
    return bind_shared(receiver, fd, &mapped, sizeof(mapped))


cdef inline int join_beside(int receiver, int fd) noexcept nogil:
    """Bind fd to the IPv6 address and the port of the receiving socket, then connect it to a port
    of this host. Return 0 or an errno.

    Between the two calls, fd is in the SO_REUSEPORT group of the receiving socket, and can get
    datagrams of that moment, which are lost. A connected socket gets none.
    """
    cdef sockaddr_in6 local
    cdef uint32_t n = sizeof(local)
    cdef int error
    if getsockname(receiver, <sockaddr*>&local, &n) < 0:
        return errno
    if local.sin6_family != AF_INET6:
        return EADDRNOTAVAIL
    error = bind_shared(receiver, fd, &local, n)
    return error if error != 0 else connect_nowhere(fd, &local, n)


cdef inline int open_joined(
    int receiver, int family, bint at_address, int limit
) noexcept nogil:
    """Return a new socket with the receiving socket's options and address, or a negative errno.

    family  of the receiving socket
    at_address  bind to the address of the receiving socket: for IPv4 to the IPv4-mapped address,
                without a connect. Otherwise bind to the port without an address, then connect
    limit   of its send buffer
    """
    cdef int fd = socket(AF_INET6 if at_address else family,
                         SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    cdef int error
    if fd < 0:
        return -errno
    set_buffer(receiver, fd, limit)
    if copy_options(receiver, fd, family) < 0:
        error = errno
    elif not at_address:
        error = join_address(receiver, fd)
    elif family == AF_INET:
        error = join_as_mapped(receiver, fd)
    else:
        error = join_beside(receiver, fd)
    if error != 0:
        close(fd)
        return -error
    return fd


cdef inline int open_socket(int receiver, int family) noexcept nogil:
    """Return a new socket that sends as the receiving one does, or a negative errno. Any thread may
    call."""
    cdef int fd = open_joined(receiver, family, False, OWN_SNDBUF)
    if fd == -EADDRINUSE:
        # Any user can bind the port to another address of this host, such as 127.0.0.1 or ::1. Then
        # the kernel refuses to bind the port without an address.
        return open_joined(receiver, family, True, OWN_SNDBUF)
    return fd


cdef inline bint open_fragmenting(worker_t* w, size_t addr_len) noexcept nogil:
    """Open the fragmenting socket of a family, if it is not open. Return whether it is open."""
    cdef spare_t* fragmenting = &w.fragmenting4 if addr_len == 4 else &w.fragmenting6
    cdef int fd
    if fragmenting.fd >= 0:
        return True
    if w.now < fragmenting.retry_ns:
        return False
    if addr_len == 4:
        fd = open_socket(w.udp_fd4, AF_INET)
        if fd >= 0:
            set_option(fd, IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_OMIT)
    else:
        fd = open_socket(w.udp_fd6, AF_INET6)
        if fd >= 0:
            # Only the sender fragments, to the path MTU that the kernel knows.
            set_option(fd, IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_WANT)
            set_option(fd, IPPROTO_IPV6, IPV6_DONTFRAG, 0)
    if fd < 0:
        fragmenting.retry_ns = w.now + RETRY_OPEN_NS
        return False
    fragmenting.fd = fd
    return True


cdef inline int open_sender(int receiver) noexcept nogil:
    """Return a new shared sender for IPv4, or a negative errno. Let ``receiver``, the socket that
    receives, ignore the path MTUs in ICMP errors. Any thread may call."""
    cdef int fd, error
    # If there is no sender, ``receiver`` also sends.
    set_option(receiver, IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE)
    fd = open_joined(receiver, AF_INET, True, INT_MAX)
    if fd >= 0 and set_option(receiver, IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_OMIT) < 0:
        error = errno
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


cdef inline bint is_waiting(const queue_t* q, const peer_t* peer) noexcept nogil:
    """Return whether a datagram waits for this peer that may leave by the peer's own socket."""
    cdef uint32_t i
    for i in range(q.peers_n):
        if q.peers[i].peer == peer and not q.peers[i].fragments:
            return q.peers[i].first >= 0
    return False


cdef inline own_socket_t* choose_slot(worker_t* w, uint64_t now) noexcept nogil:
    """Return a slot without a socket. If there is none, close the oldest socket that is empty; if
    no socket is empty, close the oldest one. The sockets that the current flush needs stay open:
    if these are all, return NULL."""
    cdef own_socket_t* own
    cdef own_socket_t* best = NULL
    cdef bint empty, best_empty = False
    cdef uint32_t i
    for i in range(OWN_SOCKETS):
        own = &w.own_sockets[i]
        if own.fd < 0:
            return own
        if is_waiting(&w.queue, own.peer):
            continue
        empty = held_bytes(own.fd) == 0
        if best == NULL or (empty and not best_empty) \
                or (empty == best_empty and own.given_ns < best.given_ns):
            best = own
            best_empty = empty
    if best == NULL:
        return NULL
    if not best_empty:
        refuse_for_a_time(w, best, now)
    close_own(w, best)
    return best


cdef inline bint give_own_socket(worker_t* w, peer_t* peer) noexcept nogil:
    """Give the peer an own socket, which sends as the shared one does. Return False if the peer may
    have none now, or the kernel refuses. If ``own_sockets_wanted`` is set afterwards, call this
    again when the datagrams of the peers with an own socket are sent."""
    cdef int receiver = w.udp_fd4 if peer.addr_len == 4 else w.udp_fd6
    cdef uint64_t now = now_ns()
    cdef own_socket_t* own
    if now < peer.counters[w.index].refuse_until_ns or now < w.own_retry_ns:
        return False
    own = choose_slot(w, now)
    if own == NULL:
        w.own_sockets_wanted = True
        return False
    own.fd = open_socket(receiver, AF_INET if peer.addr_len == 4 else AF_INET6)
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


cdef inline void close_spare(spare_t* spare) noexcept nogil:
    if spare.fd >= 0:
        close(spare.fd)
    spare.fd = -1


cdef inline void close_copies(worker_t* w) noexcept nogil:
    """Close all sockets of this file except the shared sender. When they are opened again, they get
    the options that the receiving socket has then."""
    cdef uint32_t i
    for i in range(OWN_SOCKETS):
        close_own(w, &w.own_sockets[i])
    close_spare(&w.spare4)
    close_spare(&w.spare6)
    close_spare(&w.fragmenting4)
    close_spare(&w.fragmenting6)


cdef inline void close_senders(worker_t* w) noexcept nogil:
    """Close all sockets of this file, so that the port is free when the receiving socket is closed.
    """
    close_copies(w)
    if w.sender4 != w.udp_fd4:
        close(w.sender4)
    w.sender4 = w.udp_fd4
