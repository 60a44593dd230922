"""CPU affinity: a worker that is busy sending is pinned to its core for a limited time.

Owns the thread's CPU affinity while the worker runs compiled code. A worker wakes up thousands of
times per second. At each wake-up the scheduler tends to move the worker to the core of the thread
that woke it. A worker that mostly receives profits: this core has the datagrams in its cache.
A worker that mostly sends loses: it shares a core with the program whose packets it reads. So a
sending worker that has recently used much of a core is pinned for at most PIN_NS. Then it is
unpinned for at least CHECK_NS, so that the scheduler can choose another core.

The worker respects cpusets, and an affinity that an administrator sets before or during the
pinning. Exception: if the administrator sets exactly the pinned core, the worker cannot see the
change, and replaces this affinity when the pinning ends.

Threading: the worker's thread.
Source: sched_setaffinity(2); linux kernel/sched/fair.c (select_task_rq_fair, wake_affine),
kernel/sched/core.c (the requested mask is stored, and restricted to the cpuset).
"""

from libc.stdint cimport uint64_t
from libc.string cimport memset

from sys cimport CLOCK_THREAD_CPUTIME_ID, clock_ns


cdef extern from "<sched.h>" nogil:
    ctypedef struct cpu_set_t:
        pass
    int sched_getcpu()
    int sched_getaffinity(int pid, size_t n, cpu_set_t* set_)
    int sched_setaffinity(int pid, size_t n, const cpu_set_t* set_)
    void CPU_ZERO(cpu_set_t* set_)
    void CPU_SET(int cpu, cpu_set_t* set_)
    bint CPU_EQUAL(const cpu_set_t* a, const cpu_set_t* b)


cdef enum:
    CHECK_NS = 50000000         # time between two checks of the worker's load
    PIN_NS = 4000000000
    PIN_PERCENT = 45            # load in percent of a core: pin at this load or more
    UNPIN_PERCENT = 20          # load in percent of a core: unpin below this load


cdef struct affinity_t:
    uint64_t checked_ns         # time of the last check
    uint64_t used_ns            # CPU time of the thread at the last check
    uint64_t sent               # packets sent until the last check
    uint64_t received           # packets received until the last check
    uint64_t pinned_until       # 0 = not pinned
    cpu_set_t pinned            # the mask of the one core to which the thread is pinned
    cpu_set_t saved             # the mask to restore
    bint unrestricted           # ``saved`` equals the cpuset: no narrower mask was set


cdef inline bint set_unrestricted(const cpu_set_t* expected) noexcept nogil:
    """Allow every core; the kernel limits this to the cpuset. Return whether the resulting mask
    equals ``expected``."""
    cdef cpu_set_t found
    memset(&found, 0xFF, sizeof(found))
    if sched_setaffinity(0, sizeof(found), &found) < 0:
        return False
    if sched_getaffinity(0, sizeof(found), &found) < 0:
        return False
    return CPU_EQUAL(&found, expected)


cdef inline void pin(affinity_t* a, uint64_t now) noexcept nogil:
    """Pin the thread to its current core. Do nothing if the thread may use only one core."""
    cdef int cpu = sched_getcpu()
    if cpu < 0 or sched_getaffinity(0, sizeof(cpu_set_t), &a.saved) < 0:
        return
    CPU_ZERO(&a.pinned)
    CPU_SET(cpu, &a.pinned)
    if CPU_EQUAL(&a.pinned, &a.saved):
        return
    a.unrestricted = set_unrestricted(&a.saved)
    if sched_setaffinity(0, sizeof(cpu_set_t), &a.pinned) == 0:
        a.pinned_until = now + PIN_NS
    elif not a.unrestricted:
        sched_setaffinity(0, sizeof(cpu_set_t), &a.saved)


cdef inline void unpin(affinity_t* a) noexcept nogil:
    """Restore the mask from before ``pin``. An unrestricted thread requests every core, so that
    the thread also gets the cores that were added to its cpuset during the pinning."""
    cdef cpu_set_t found
    if a.pinned_until == 0:
        return
    a.pinned_until = 0
    if sched_getaffinity(0, sizeof(found), &found) < 0:
        return
    if not CPU_EQUAL(&found, &a.pinned):  # the cpuset or an administrator changed the mask
        if not set_unrestricted(&found):
            sched_setaffinity(0, sizeof(found), &found)
    elif a.unrestricted:
        set_unrestricted(&a.saved)
    else:
        sched_setaffinity(0, sizeof(cpu_set_t), &a.saved)


cdef inline void adjust_affinity(
    affinity_t* a, uint64_t now, uint64_t sent, uint64_t received
) noexcept nogil:
    """If CHECK_NS have passed since the last check, pin or unpin the thread according to its load.

    sent, received  numbers of packets since the worker's start
    """
    cdef uint64_t used_ns, percent
    cdef bint mostly_sends
    if now < a.checked_ns + CHECK_NS:
        return
    used_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID)
    percent = 100 * (used_ns - a.used_ns) // (now - a.checked_ns)
    mostly_sends = sent - a.sent > received - a.received
    a.checked_ns = now
    a.used_ns = used_ns
    a.sent = sent
    a.received = received
    if a.pinned_until == 0:
        if mostly_sends and percent >= PIN_PERCENT:
            pin(a, now)
    elif not mostly_sends or now >= a.pinned_until or percent < UNPIN_PERCENT:
        unpin(a)
