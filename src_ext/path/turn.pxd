"""The worker's turn, and how long it stays away from the event loop.

Owns the order of work (receive, write, drain the TUN, send: a write to the TUN runs the local TCP
stack inline, so its answers can be read at once), the epoll set, back-pressure, and the borrowing
of the snapshot.

Threading: ``run`` is called by the worker's thread without the GIL. A snapshot is borrowed while
``busy`` is 1 and ``seen`` is its generation; the control side frees a retired one only when every
worker is not busy, or has seen a later one. The two full fences (here, and after the control
side's swap) make sure that one side sees the other's store.
"""


from libc.stdint cimport uint64_t
from libc.string cimport memset

from drops cimport DROP_CLOSED
from path.decap cimport receive
from path.encap cimport drain_tun
from sys cimport (
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, POLLERR, POLLIN, POLLNVAL, POLLOUT, epoll_ctl, epoll_event,
    full_fence, load_flag, load_ptr, nanosleep, now_ns, poll, read, store_flag, timespec,
)
from table.peers cimport snapshot_t
from path.affinity cimport look_at_place, roam
from path.send cimport flush, read_errors, waiting
from path.worker cimport (
    EVENT_TUN_GONE, ON_TUN, ON_UDP4, ON_UDP6, ON_WAKE, POLLED_N, count_drop,
    raise_event, worker_t,
)


cdef enum:
    POLL_TURNS = 64             # a busy worker looks for errors this often
    NAP_NS = 40000


cdef inline void borrow(worker_t* w) noexcept nogil:
    """Take the snapshot in force, unless segments still wait that came of the one we hold."""
    if waiting(w) and w.busy:
        return
    store_flag(&w.busy, 1)
    full_fence()
    w.snapshot = <snapshot_t*>load_ptr(<void**>&w.shared.snapshot)
    store_flag(&w.seen, w.snapshot.generation)


cdef inline void release(worker_t* w) noexcept nogil:
    if not waiting(w):
        store_flag(&w.busy, 0)


cdef inline void set_pressure(worker_t* w) noexcept nogil:
    """After a flush: while a socket is full, poll it for room, and the TUN not at all."""
    w.tun_asleep = w.full4 or w.full6
    w.polled[ON_TUN].events = 0 if w.tun_asleep else POLLIN
    w.polled[ON_UDP4].events = POLLIN | (POLLOUT if w.full4 else 0)
    w.polled[ON_UDP6].events = POLLIN | (POLLOUT if w.full6 else 0)


cdef inline bint turn(worker_t* w) noexcept nogil:
    """Receive, write, drain the TUN, send. True: there may be more to do at once."""
    cdef bint more = False
    w.turns += 1
    if w.udp_ready4:
        more |= receive(w, w.udp_fd4)
        w.tun_ready = True
    if w.udp_ready6:
        more |= receive(w, w.udp_fd6)
        w.tun_ready = True
    if waiting(w):
        if not flush(w):
            set_pressure(w)
            return more
        w.tun_ready = True  # it was asleep meanwhile
    if w.tun_ready:
        more |= drain_tun(w)
    set_pressure(w)
    return more


cdef inline bint readable(worker_t* w, int which, int fd) noexcept nogil:
    """Whether a polled socket is. An error counts as readable: receiving clears it."""
    cdef short events = w.polled[which].revents
    if events & POLLERR:
        read_errors(w, fd)
    return events & ~POLLOUT != 0


cdef inline void wait_for_work(worker_t* w, int timeout_ms) noexcept nogil:
    """Poll, and mark what is ready."""
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


cdef inline void look_everywhere(worker_t* w) noexcept nogil:
    """While there is more to do, try all descriptors rather than poll them."""
    w.now = now_ns()
    borrow(w)
    w.tun_ready = not w.tun_asleep
    w.udp_ready4 = w.udp_fd4 >= 0
    w.udp_ready6 = w.udp_fd6 >= 0


cdef inline void unwatch(worker_t* w) noexcept nogil:
    """Take what packets come through out of the epoll set: it is told of each packet at once, by
    whoever brings it, whether somebody waits or not."""
    cdef int i
    for i in range(ON_TUN, POLLED_N):
        if w.polled[i].fd >= 0:
            epoll_ctl(w.epoll_fd, EPOLL_CTL_DEL, w.polled[i].fd, NULL)


cdef inline bint watch(worker_t* w) noexcept nogil:
    """Put it back. False: the kernel refused one, and the loop would not learn of its packets; then
    none is in, and errno says why."""
    cdef epoll_event event
    cdef int i
    memset(&event, 0, sizeof(event))
    for i in range(ON_TUN, POLLED_N):
        if w.polled[i].fd >= 0:
            event.events = w.polled[i].events
            if epoll_ctl(w.epoll_fd, EPOLL_CTL_ADD, w.polled[i].fd, &event) < 0:
                unwatch(w)
                return False
    return True


cdef inline void nap(worker_t* w) noexcept nogil:
    """Datagrams come singly and fast: let some gather. A worker that polls is woken by the first,
    at the cost of whoever brings it, and merges less."""
    cdef timespec ts
    ts.tv_sec = 0
    ts.tv_nsec = NAP_NS
    w.trickle = False
    release(w)
    nanosleep(&ts, NULL)


cdef inline void run(worker_t* w, int linger_ms) noexcept nogil:
    """Work until there was nothing to do for linger_ms, or the control side calls."""
    cdef int timeout = 0
    cdef bint more = False
    unwatch(w)
    while True:
        if more and w.turns % POLL_TURNS != 0:
            look_everywhere(w)
        elif more:
            wait_for_work(w, 0)  # for errors, and the wake-up
        elif w.trickle:
            nap(w)
            wait_for_work(w, 0)
        else:
            if timeout:
                release(w)
            wait_for_work(w, timeout)
            if not w.ready and timeout and watch(w):
                break
            timeout = linger_ms
        if load_flag(&w.wake_requested):
            watch(w)
            break
        if w.events & EVENT_TUN_GONE:
            break  # it would be ready for ever: from now on only a call wakes us
        look_at_place(&w.place, w.now, w.encap.delivered, w.decap.delivered)
        more = turn(w)
    release(w)
    roam(&w.place)
    w.loop_returns += 1


cdef inline void forward_rest(worker_t* w, uint64_t until) noexcept nogil:
    """Forward what the queues already hold. Wait for full sockets, but not past ``until``
    (monotonic ns)."""
    cdef bint more = True
    while more or waiting(w):
        look_everywhere(w)
        if w.now >= until:
            return
        if not more:
            wait_for_work(w, 1 + <int>((until - w.now) // 1000000))
        more = turn(w)


cdef inline void drain(worker_t* w, uint64_t until) noexcept nogil:
    """Forward what the queues already hold, and drop (CLOSED) what is left at ``until``. Only after
    the last ``run``."""
    forward_rest(w, until)
    count_drop(&w.encap, DROP_CLOSED, w.encap.queued)
    w.encap.queued = 0
    w.segs_n = w.buckets_n = w.tx_used = 0
    release(w)
