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


cdef inline void set_pressure(worker_t* w, bint on) noexcept nogil:
    """A full socket: stop polling the TUN, poll for room instead. And back."""
    cdef uint32_t udp_events
    if on == w.tun_asleep:
        return
    w.tun_asleep = on
    udp_events = EPOLLIN | (EPOLLOUT if on else 0)
    ask(w, w.tun_fd, ON_TUN, 0 if on else EPOLLIN)
    if w.udp_fd4 >= 0:
        ask(w, w.udp_fd4, ON_UDP4, udp_events)
    if w.udp_fd6 >= 0:
        ask(w, w.udp_fd6, ON_UDP6, udp_events)


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
    if waiting(w) and not flush(w):
        set_pressure(w, True)
        return more
    if w.tun_ready:
        more |= drain_tun(w)
    set_pressure(w, waiting(w))
    return more


cdef inline void run(worker_t* w, int linger_ms) noexcept nogil:
    """Work until there was nothing to do for linger_ms, or the control side calls."""
    cdef epoll_event events[8]
    cdef uint64_t value
    cdef int timeout = 0
    cdef bint more = False
    cdef int i, n
    while True:
        if not more:
            w.syscalls_wait += 1
            if timeout:
                give_back(w)
            n = epoll_wait(w.epoll_fd, events, 8, timeout)
            if n == 0 and timeout:
                break
            timeout = linger_ms
            w.tun_ready = w.udp_ready4 = w.udp_ready6 = False
        else:
            n = 0
            w.tun_ready = not w.tun_asleep
            w.udp_ready4 = w.udp_fd4 >= 0
            w.udp_ready6 = w.udp_fd6 >= 0
        w.now = now_ns()
        borrow(w)
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
                w.udp_ready4 = (events[i].events & EPOLLIN) != 0
            elif events[i].data.u64 == ON_UDP6:
                if events[i].events & EPOLLERR:
                    read_errors(w, w.udp_fd6)
                w.udp_ready6 = (events[i].events & EPOLLIN) != 0
        if load_flag(&w.called) or w.notes & NOTE_TUN_GONE:
            break
        more = turn(w)
    give_back(w)
    w.loop_returns += 1
