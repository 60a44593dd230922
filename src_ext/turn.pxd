"""The worker's turn, and how long it stays away from the event loop.

Owns the order of work (receive, write, drain the TUN, send: a write to the TUN runs the local TCP
stack inline, so its answers can be read at once), the epoll set, back-pressure, and the borrowing
of the snapshot.

Threading: ``run`` is called by the worker's thread without the GIL. A snapshot is borrowed while
``busy`` is 1 and ``seen`` is its generation; the control side frees a retired one only when every
worker is not busy, or has seen a later one. The two full fences (here, and after the control
side's swap) make sure that one side sees the other's store.
"""


from libc.stdint cimport uint32_t, uint64_t

from decap cimport receive
from encap cimport drain_tun
from io cimport (
    EPOLL_CTL_MOD, EPOLLERR, EPOLLIN, EPOLLOUT, epoll_ctl, epoll_event, epoll_wait, full_fence,
    load_flag, load_ptr, now_ns, read, store_flag,
)
from peers cimport snapshot_t
from send cimport flush, read_errors, waiting
from worker cimport NOTE_TUN_GONE, note, worker_t


cdef enum:
    ON_TUN = 0                  # epoll_event.data
    ON_WAKE = 1
    ON_UDP4 = 2
    ON_UDP6 = 3

    POLL_TURNS = 64             # a busy worker looks for errors this often


cdef inline void borrow(worker_t* w) noexcept nogil:
    """Take the snapshot in force, unless segments still wait that came of the one we hold."""
    if waiting(w) and w.busy:
        return
    store_flag(&w.busy, 1)
    full_fence()
    w.snapshot = <snapshot_t*>load_ptr(<void**>&w.shared.snapshot)
    store_flag(&w.seen, w.snapshot.generation)


cdef inline void give_back(worker_t* w) noexcept nogil:
    if not waiting(w):
        store_flag(&w.busy, 0)


cdef inline void ask(worker_t* w, int fd, uint32_t what, uint32_t events) noexcept nogil:
    cdef epoll_event event
    event.events = events
    event.data.u64 = what
    epoll_ctl(w.epoll_fd, EPOLL_CTL_MOD, fd, &event)


cdef inline void set_pressure(worker_t* w) noexcept nogil:
    """After a flush: while a socket is full, poll it for room, and the TUN not at all."""
    cdef bint asleep = w.full4 or w.full6
    if asleep != w.tun_asleep:
        w.tun_asleep = asleep
        ask(w, w.tun_fd, ON_TUN, 0 if asleep else EPOLLIN)
    if w.full4 != w.asked4:
        w.asked4 = w.full4
        ask(w, w.udp_fd4, ON_UDP4, EPOLLIN | (EPOLLOUT if w.full4 else 0))
    if w.full6 != w.asked6:
        w.asked6 = w.full6
        ask(w, w.udp_fd6, ON_UDP6, EPOLLIN | (EPOLLOUT if w.full6 else 0))


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


cdef inline void wait_for_work(worker_t* w, int timeout_ms) noexcept nogil:
    """Poll, and mark what is ready. A socket's error counts as readable: receiving clears it."""
    cdef epoll_event events[8]
    cdef uint64_t value
    cdef int i, n
    w.syscalls_wait += 1
    n = epoll_wait(w.epoll_fd, events, 8, timeout_ms)
    w.now = now_ns()
    borrow(w)
    w.ready = n > 0
    for i in range(n):
        if events[i].data.u64 == ON_TUN:
            w.tun_ready = True
            if events[i].events & EPOLLERR:
                note(w, NOTE_TUN_GONE)
        elif events[i].data.u64 == ON_WAKE:
            read(w.wake_fd, &value, 8)
        elif events[i].data.u64 == ON_UDP4:
            if events[i].events & EPOLLERR:
                read_errors(w, w.udp_fd4)
            w.udp_ready4 = (events[i].events & (EPOLLIN | EPOLLERR)) != 0
        elif events[i].data.u64 == ON_UDP6:
            if events[i].events & EPOLLERR:
                read_errors(w, w.udp_fd6)
            w.udp_ready6 = (events[i].events & (EPOLLIN | EPOLLERR)) != 0


cdef inline void look_everywhere(worker_t* w) noexcept nogil:
    """While there is more to do, try all descriptors rather than poll them."""
    w.now = now_ns()
    borrow(w)
    w.tun_ready = not w.tun_asleep
    w.udp_ready4 = w.udp_fd4 >= 0
    w.udp_ready6 = w.udp_fd6 >= 0


cdef inline void run(worker_t* w, int linger_ms) noexcept nogil:
    """Work until there was nothing to do for linger_ms, or the control side calls."""
    cdef int timeout = 0
    cdef bint more = False
    while True:
        if more and w.turns % POLL_TURNS != 0:
            look_everywhere(w)
        elif more:
            look_everywhere(w)
            wait_for_work(w, 0)  # for errors, and the wake-up
        else:
            w.tun_ready = w.udp_ready4 = w.udp_ready6 = False
            if timeout:
                give_back(w)
            wait_for_work(w, timeout)
            if not w.ready and timeout:
                break
            timeout = linger_ms
        if load_flag(&w.called) or w.notes & NOTE_TUN_GONE:
            break
        more = turn(w)
    give_back(w)
    w.loop_returns += 1


cdef inline void drain(worker_t* w, uint64_t until) noexcept nogil:
    """Forward what is in the queues already, waiting for full sockets, but not past ``until``
    (monotonic ns). For a worker that ``run`` is done with."""
    cdef bint more = True
    while more or waiting(w):
        look_everywhere(w)
        if w.now >= until:
            return
        if not more:
            wait_for_work(w, 1 + <int>((until - w.now) // 1000000))
        more = turn(w)
