"""The worker's turns: the order of the steps, and when the worker returns to the event loop.

Owns the order of one turn (receive, write, drain the TUN, send), the epoll set, back-pressure, and
the borrowing of the snapshot. The TUN is drained after the write, because the write runs the local
TCP stack inline. So the stack's reply can often be read immediately.

Threading: the worker's thread calls ``run`` and ``drain`` without the GIL. A worker has borrowed a
snapshot while ``busy`` is 1 and ``seen`` is the snapshot's generation. The control side frees a
retired snapshot only when each worker is not busy or has seen a later generation. A
worker stores ``busy`` and then loads the snapshot pointer; the control side stores the pointer and
then loads ``busy``. All four accesses are ordered (sys.pxd), so at least one of the two sides sees
the other side's store. The captures that a worker uses follow the same rule, with
``captures_t.word`` in place of the pointer; a worker loads it in each turn that reads packets.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from drops cimport DROP_CLOSED
from path.affinity cimport adjust_affinity, unpin
from path.capture cimport CAPTURE_BITS
from path.decap cimport receive
from path.encap cimport drain_tun
from path.own_socket cimport close_copies, look_at_own_sockets
from path.queue cimport queue_clear, queue_is_empty
from path.send cimport flush, listen_again, read_errors
from path.worker cimport (
    EVENT_TUN_GONE, ON_FULL, ON_TUN, ON_UDP4, ON_UDP6, ON_WAKE, POLLED_N, count_drop, raise_event,
    worker_t,
)
from sys cimport (
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLLIN, POLLERR, POLLIN, POLLNVAL, epoll_ctl, epoll_event,
    load_flag, load_flag_ordered, load_ptr_ordered, nanosleep, now_ns, poll, read, store_flag,
    store_flag_ordered, timespec, write,
)
from table.snapshot cimport snapshot_t


cdef enum:
    POLL_TURNS = 64             # a busy worker polls once in this number of turns, for errors
    BATCHING_DELAY_NS = 40000
    # A full socket becomes writable (POLLOUT) only when its buffer is half empty. A datagram may
    # fit earlier, so the worker also tries after this time.
    RETRY_MS = 1


# The snapshot


cdef inline void borrow(worker_t* w) noexcept nogil:
    """Borrow the active snapshot. While datagrams are queued, keep the snapshot that is already
    borrowed, because the datagrams point to its peers."""
    if not queue_is_empty(&w.queue) and w.busy:
        return
    store_flag_ordered(&w.busy, 1)
    w.snapshot = <snapshot_t*>load_ptr_ordered(<void**>&w.shared.snapshot)
    store_flag(&w.seen, w.snapshot.generation)


cdef inline void look_for_captures(worker_t* w) noexcept nogil:
    """Use the captures that are on. A turn without this call only flushes datagrams that were
    queued earlier. ``busy`` has been 1 since then, so the captures that the worker uses still
    exist."""
    store_flag(&w.capturing, load_flag_ordered(&w.shared.captures.word))


cdef inline void release(worker_t* w) noexcept nogil:
    """End the borrowing of the snapshot, unless datagrams are queued."""
    if queue_is_empty(&w.queue):
        store_flag(&w.busy, 0)


cdef inline uint64_t oldest_generation(worker_t** workers, uint32_t n) noexcept nogil:
    """Return the oldest generation that a busy worker has borrowed; 2**64 - 1 if none is busy.
    Called by the control side."""
    cdef uint64_t oldest = <uint64_t>-1, seen
    cdef uint32_t i
    for i in range(n):
        if load_flag_ordered(&workers[i].busy):
            seen = load_flag(&workers[i].seen)
            if seen < oldest:
                oldest = seen
    return oldest


cdef inline bint capture_is_unused(worker_t** workers, uint32_t n, uint64_t word) noexcept nogil:
    """Return whether no worker can use a capture that was turned off. Called by the control side.

    word  captures_t.word after the capture was turned off
    """
    cdef uint32_t i
    for i in range(n):
        if load_flag_ordered(&workers[i].busy) \
                and load_flag(&workers[i].capturing) >> CAPTURE_BITS < word >> CAPTURE_BITS:
            return False
    return True


# Waiting


cdef inline void epoll_unregister(worker_t* w) noexcept nogil:
    """Remove the descriptors that carry packets from the epoll set. An epoll registration runs a
    wake-up callback for every packet, in the sender's context, even when nothing waits."""
    cdef int i
    for i in range(ON_TUN, ON_UDP6 + 1):
        if w.polled[i].fd >= 0:
            epoll_ctl(w.epoll_fd, EPOLL_CTL_DEL, w.polled[i].fd, NULL)


cdef inline bint epoll_register(worker_t* w) noexcept nogil:
    """Add the descriptors that carry packets to the epoll set. Return whether all were added. If
    the kernel refuses one, none is added, because the event loop would miss packets if the set had
    only some of them; errno has the reason."""
    cdef epoll_event event
    cdef int i
    memset(&event, 0, sizeof(event))
    event.events = EPOLLIN
    for i in range(ON_TUN, ON_UDP6 + 1):
        if w.polled[i].fd >= 0:
            if epoll_ctl(w.epoll_fd, EPOLL_CTL_ADD, w.polled[i].fd, &event) < 0:
                epoll_unregister(w)
                return False
    return True


cdef inline bint readable(worker_t* w, int which, int fd) noexcept nogil:
    """Return whether a polled socket is readable. A socket with an error counts as readable,
    because receiving from the socket clears the error."""
    cdef short events = w.polled[which].revents
    if events & POLLERR:
        read_errors(w, fd)
    return events != 0


cdef inline void wait_for_work(worker_t* w, int timeout_ms) noexcept nogil:
    """Wait in poll() for at most timeout_ms. Mark the descriptors that are ready."""
    cdef uint64_t value
    w.syscalls_wait += 1
    w.ready = poll(w.polled, POLLED_N, timeout_ms) > 0
    w.now = now_ns()
    borrow(w)
    w.tun_ready = w.udp_ready4 = w.udp_ready6 = False
    if not w.ready:
        return
    look_for_captures(w)
    if w.polled[ON_FULL].revents & POLLERR:
        read_errors(w, w.full_fd)
    if w.polled[ON_WAKE].revents & POLLIN:
        read(w.wake_fd, &value, 8)
        w.wakes += 1
    if w.polled[ON_TUN].revents & (POLLERR | POLLNVAL):
        raise_event(w, EVENT_TUN_GONE)
    w.tun_ready = w.polled[ON_TUN].revents != 0
    w.udp_ready4 = readable(w, ON_UDP4, w.udp_fd4)
    w.udp_ready6 = readable(w, ON_UDP6, w.udp_fd6)


cdef inline void assume_ready(worker_t* w) noexcept nogil:
    """Mark all descriptors ready without a poll. A busy worker then tries to read from each."""
    w.now = now_ns()
    borrow(w)
    look_for_captures(w)
    w.tun_ready = not w.tun_paused
    w.udp_ready4 = w.udp_fd4 >= 0
    w.udp_ready6 = w.udp_fd6 >= 0


cdef inline void batching_delay(worker_t* w) noexcept nogil:
    """Sleep for BATCHING_DELAY_NS, so that several small packets arrive. In poll(), the first
    packet would wake the worker. This wake-up would cost the sender CPU time, and the worker would
    merge fewer packets."""
    cdef timespec ts
    ts.tv_sec = 0
    ts.tv_nsec = BATCHING_DELAY_NS
    w.small_packets = False
    release(w)
    nanosleep(&ts, NULL)


# One turn


cdef inline void set_back_pressure(worker_t* w) noexcept nogil:
    """Set the polled descriptors after a flush. If the flush waits for a full socket, poll this
    socket for writing, and do not poll the TUN."""
    w.tun_paused = w.full_fd >= 0
    w.polled[ON_TUN].events = 0 if w.tun_paused else POLLIN
    w.polled[ON_FULL].fd = w.full_fd


cdef inline bint turn(worker_t* w) noexcept nogil:
    """Receive, write, drain the TUN, send. Return whether more packets may be ready already."""
    cdef bint more = False
    w.turns += 1
    if w.udp_ready4:
        more |= receive(w, w.udp_fd4)
        w.tun_ready = True
    if w.udp_ready6:
        more |= receive(w, w.udp_fd6)
        w.tun_ready = True
    if not queue_is_empty(&w.queue):
        if not flush(w):
            set_back_pressure(w)
            return more
        w.tun_ready = True  # the TUN was not polled during the wait for a full socket
    if w.tun_ready:
        more |= drain_tun(w)
    set_back_pressure(w)
    return more


# All turns


cdef inline void wake_successor(worker_t* w) noexcept nogil:
    """If the worker of another process waits for this one to stop, let that worker begin."""
    cdef uint64_t one = 1
    if load_flag(&w.wake_requested) and w.successor_fd >= 0:
        write(w.successor_fd, &one, 8)
        w.successor_fd = -1


cdef inline void run(worker_t* w, int linger_ms) noexcept nogil:
    """Work until no descriptor was ready for linger_ms, the control side requests a wake-up, or the
    TUN is gone."""
    cdef int timeout = 0
    cdef bint more = False
    epoll_unregister(w)
    while True:
        if more and w.turns % POLL_TURNS != 0:
            assume_ready(w)
        elif more:
            wait_for_work(w, 0)  # to detect errors and wake-up requests
        elif w.full_fd >= 0:
            wait_for_work(w, RETRY_MS)
        elif w.small_packets:
            batching_delay(w)
            wait_for_work(w, 0)
        else:
            if timeout:
                release(w)
            wait_for_work(w, timeout)
            if not w.ready and timeout and epoll_register(w):
                break
            timeout = linger_ms
        if load_flag(&w.wake_requested):
            epoll_register(w)
            break
        if load_flag(&w.events) & EVENT_TUN_GONE:
            break  # without epoll_register: a removed TUN is always ready
        if w.own_sockets_n != 0 and w.full_fd < 0:
            look_at_own_sockets(w)
        if w.deaf_until_ns != 0:
            listen_again(w)
        if load_flag(&w.renew_requested) and queue_is_empty(&w.queue):
            store_flag(&w.renew_requested, 0)  # first: the options may change again from now on
            close_copies(w)
        adjust_affinity(&w.affinity, w.now, w.encap.delivered, w.decap.delivered)
        more = turn(w)
    release(w)
    unpin(&w.affinity)
    w.loop_returns += 1
    wake_successor(w)


cdef inline void forward_rest(worker_t* w, uint64_t until) noexcept nogil:
    """Forward the packets in the kernel's queues and in the send queue. If a socket's buffer is
    full, wait for the socket. Stop at ``until`` (monotonic ns)."""
    cdef bint more = True
    w.draining = True
    while more or not queue_is_empty(&w.queue):
        assume_ready(w)
        if w.now >= until:
            return
        if not more:
            wait_for_work(w, RETRY_MS)
        more = turn(w)


cdef inline void drop_queued(worker_t* w) noexcept nogil:
    """Drop the datagrams of the send queue (CLOSED)."""
    count_drop(&w.encap, DROP_CLOSED, w.queue.waiting_n)
    w.queue.waiting_n = 0
    queue_clear(&w.queue)
    w.full_fd = -1
    set_back_pressure(w)
    w.draining = False
    release(w)


cdef inline void drain(worker_t* w, uint64_t until) noexcept nogil:
    """Forward queued packets until ``until`` (monotonic ns). Then drop the remaining datagrams of
    the send queue (CLOSED). Call this only after the last ``run``."""
    forward_rest(w, until)
    drop_queued(w)


cdef inline void drain_send_queue(worker_t* w, uint64_t until) noexcept nogil:
    """Send the send queue, as ``drain`` does, but read nothing: another process reads the
    descriptors now."""
    w.draining = True
    while not flush(w) and w.now < until:
        set_back_pressure(w)
        wait_for_work(w, RETRY_MS)
    drop_queued(w)
