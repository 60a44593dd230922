"""The worker's turns: what it does in which order, and when it returns to the event loop.

Owns the order of one turn (receive, write, drain the TUN, send), the epoll set, back-pressure, and
the borrowing of the snapshot. The TUN is drained after the write because a write runs the local TCP
stack inline, so the stack's reply can often be read immediately.

Threading: ``run`` and ``drain`` are called by the worker's thread without the GIL. A snapshot is
borrowed while ``busy`` is 1 and ``seen`` is its generation; the control side frees a retired one
only when every worker is not busy or has seen a later generation. The two full fences (here, and
after the control side's swap) guarantee that one side sees the other's store.
"""

from libc.stdint cimport uint64_t
from libc.string cimport memset

from drops cimport DROP_CLOSED
from path.affinity cimport adjust_affinity, unpin
from path.decap cimport receive
from path.encap cimport drain_tun
from path.queue cimport queue_clear, queue_is_empty
from path.send cimport flush, read_errors
from path.worker cimport (
    EVENT_TUN_GONE, ON_TUN, ON_UDP4, ON_UDP6, ON_WAKE, POLLED_N, count_drop, raise_event, worker_t,
)
from sys cimport (
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, POLLERR, POLLIN, POLLNVAL, POLLOUT, epoll_ctl, epoll_event,
    full_fence, load_flag, load_ptr, nanosleep, now_ns, poll, read, store_flag, timespec,
)
from table.snapshot cimport snapshot_t


cdef enum:
    POLL_TURNS = 64             # a busy worker polls for errors once in this number of turns
    BATCHING_DELAY_NS = 40000


# The snapshot


cdef inline void borrow(worker_t* w) noexcept nogil:
    """Borrow the active snapshot. Keep the present one while datagrams are queued, because they
    point to its peers."""
    if not queue_is_empty(&w.queue) and w.busy:
        return
    store_flag(&w.busy, 1)
    full_fence()
    w.snapshot = <snapshot_t*>load_ptr(<void**>&w.shared.snapshot)
    store_flag(&w.seen, w.snapshot.generation)


cdef inline void release(worker_t* w) noexcept nogil:
    """End the borrowing of the snapshot, unless datagrams are queued."""
    if queue_is_empty(&w.queue):
        store_flag(&w.busy, 0)


# Waiting


cdef inline void epoll_unregister(worker_t* w) noexcept nogil:
    """Remove the descriptors that carry packets from the epoll set. An epoll registration runs a
    wake-up callback for every packet, in the sender's context, even when nothing waits."""
    cdef int i
    for i in range(ON_TUN, POLLED_N):
        if w.polled[i].fd >= 0:
            epoll_ctl(w.epoll_fd, EPOLL_CTL_DEL, w.polled[i].fd, NULL)


cdef inline bint epoll_register(worker_t* w) noexcept nogil:
    """Add the descriptors that carry packets to the epoll set. False: the kernel refused one, errno
    has the reason, and none is added, since the event loop would miss packets."""
    cdef epoll_event event
    cdef int i
    memset(&event, 0, sizeof(event))
    for i in range(ON_TUN, POLLED_N):
        if w.polled[i].fd >= 0:
            event.events = w.polled[i].events
            if epoll_ctl(w.epoll_fd, EPOLL_CTL_ADD, w.polled[i].fd, &event) < 0:
                epoll_unregister(w)
                return False
    return True


cdef inline bint readable(worker_t* w, int which, int fd) noexcept nogil:
    """Return whether a polled socket is readable. An error counts: receiving clears it."""
    cdef short events = w.polled[which].revents
    if events & POLLERR:
        read_errors(w, fd)
    return events & ~POLLOUT != 0


cdef inline void wait_for_work(worker_t* w, int timeout_ms) noexcept nogil:
    """Poll, and mark the ready descriptors."""
    cdef uint64_t value
    w.syscalls_wait += 1
    w.ready = poll(w.polled, POLLED_N, timeout_ms) > 0
    w.now = now_ns()
    borrow(w)
    w.tun_ready = w.udp_ready4 = w.udp_ready6 = False
    if not w.ready:
        return
    if w.polled[ON_WAKE].revents & POLLIN:
        read(w.wake_fd, &value, 8)
    if w.polled[ON_TUN].revents & (POLLERR | POLLNVAL):
        raise_event(w, EVENT_TUN_GONE)
    w.tun_ready = w.polled[ON_TUN].revents != 0
    w.udp_ready4 = readable(w, ON_UDP4, w.udp_fd4)
    w.udp_ready6 = readable(w, ON_UDP6, w.udp_fd6)


cdef inline void assume_ready(worker_t* w) noexcept nogil:
    """Mark all descriptors ready: a busy worker tries them without a poll."""
    w.now = now_ns()
    borrow(w)
    w.tun_ready = not w.tun_paused
    w.udp_ready4 = w.udp_fd4 >= 0
    w.udp_ready6 = w.udp_fd6 >= 0


cdef inline void batching_delay(worker_t* w) noexcept nogil:
    """Sleep while small packets arrive. A worker in poll() would be woken by the first of them. The
    wake-up costs the sender CPU time, and the worker would merge fewer packets."""
    cdef timespec ts
    ts.tv_sec = 0
    ts.tv_nsec = BATCHING_DELAY_NS
    w.small_packets = False
    release(w)
    nanosleep(&ts, NULL)


# One turn


cdef inline void set_back_pressure(worker_t* w) noexcept nogil:
    """After a flush: poll a socket whose buffer is full for writing, and pause the TUN."""
    w.tun_paused = w.full4 or w.full6
    w.polled[ON_TUN].events = 0 if w.tun_paused else POLLIN
    w.polled[ON_UDP4].events = POLLIN | (POLLOUT if w.full4 else 0)
    w.polled[ON_UDP6].events = POLLIN | (POLLOUT if w.full6 else 0)


cdef inline bint turn(worker_t* w) noexcept nogil:
    """Receive, write, drain the TUN, send. Return whether there may be more to do at once."""
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
        w.tun_ready = True  # the TUN was not polled while a socket's buffer was full
    if w.tun_ready:
        more |= drain_tun(w)
    set_back_pressure(w)
    return more


# All turns


cdef inline void run(worker_t* w, int linger_ms) noexcept nogil:
    """Work until no descriptor was ready for linger_ms, or the control side requests a wake-up."""
    cdef int timeout = 0
    cdef bint more = False
    epoll_unregister(w)
    while True:
        if more and w.turns % POLL_TURNS != 0:
            assume_ready(w)
        elif more:
            wait_for_work(w, 0)  # to notice errors and wake-up requests
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
        if w.events & EVENT_TUN_GONE:
            break  # without epoll_register: a removed TUN is always ready
        adjust_affinity(&w.affinity, w.now, w.encap.delivered, w.decap.delivered)
        more = turn(w)
    release(w)
    unpin(&w.affinity)
    w.loop_returns += 1


cdef inline void forward_rest(worker_t* w, uint64_t until) noexcept nogil:
    """Forward what the kernel's queues and the send queue hold. Wait for full sockets, but not past
    ``until`` (monotonic ns)."""
    cdef bint more = True
    while more or not queue_is_empty(&w.queue):
        assume_ready(w)
        if w.now >= until:
            return
        if not more:
            wait_for_work(w, 1 + <int>((until - w.now) // 1000000))
        more = turn(w)


cdef inline void drain(worker_t* w, uint64_t until) noexcept nogil:
    """Forward what is queued until ``until`` (monotonic ns), then drop the rest (CLOSED). Only
    after the last ``run``."""
    forward_rest(w, until)
    count_drop(&w.encap, DROP_CLOSED, w.queue.waiting_n)
    w.queue.waiting_n = 0
    queue_clear(&w.queue)
    release(w)
