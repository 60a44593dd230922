"""Where a worker runs: a busy one that sends keeps its core for a while.

Owns the thread's affinity while the worker is in compiled code. A worker is woken thousands of
times a second, and each time the scheduler is inclined to move it to whoever woke it. For one that
mostly receives this is right: who brings its datagrams has just had them in the cache. One that
mostly sends is drawn to the program whose packets it takes, and the two share a core. So if it used
much of a core lately it stays where it is, for STAY_NS at most; then it roams for LOOK_NS at least,
so that the scheduler has a say in where it stays next.

Respected are the cpuset, the affinity that the thread was given before, and one that it is given
meanwhile, unless that is just the core it stays on: this cannot be told from our own.

Threading: the worker's thread only.
Source: sched_setaffinity(2); linux kernel/sched/fair.c (select_task_rq_fair, wake_affine),
kernel/sched/core.c (what is asked for is remembered, and cut down to the cpuset).
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
    LOOK_NS = 50000000          # how often the worker's share of a core is looked at
    STAY_NS = 4000000000
    STAY_PERCENT = 45           # of a core, for a worker to stay
    ROAM_PERCENT = 20           # and below this one that stays roams again


cdef struct place_t:
    uint64_t looked             # when, and the thread's CPU time and packets then
    uint64_t used
    uint64_t sent
    uint64_t received
    uint64_t until              # the worker stays until then; 0: it roams
    cpu_set_t home              # where it stays
    cpu_set_t allowed           # where it may be otherwise
    bint free                   # because of the cpuset only


cdef inline bint all_gives(const cpu_set_t* wanted) noexcept nogil:
    """Ask for every core; whether what the cpuset leaves of them is what is wanted."""
    cdef cpu_set_t found
    memset(&found, 0xFF, sizeof(found))
    if sched_setaffinity(0, sizeof(found), &found) < 0:
        return False
    if sched_getaffinity(0, sizeof(found), &found) < 0:
        return False
    return CPU_EQUAL(&found, wanted)


cdef inline void stay(place_t* at, uint64_t now) noexcept nogil:
    """Keep to the core at hand, if there is a choice."""
    cdef int cpu = sched_getcpu()
    if cpu < 0 or sched_getaffinity(0, sizeof(cpu_set_t), &at.allowed) < 0:
        return
    CPU_ZERO(&at.home)
    CPU_SET(cpu, &at.home)
    if CPU_EQUAL(&at.home, &at.allowed):
        return
    at.free = all_gives(&at.allowed)
    if sched_setaffinity(0, sizeof(cpu_set_t), &at.home) == 0:
        at.until = now + STAY_NS
    elif not at.free:
        sched_setaffinity(0, sizeof(cpu_set_t), &at.allowed)


cdef inline void roam(place_t* at) noexcept nogil:
    """Go back to what was before. One that was free asks for every core, lest it miss those that
    its cpuset got meanwhile."""
    cdef cpu_set_t found
    if at.until == 0:
        return
    at.until = 0
    if sched_getaffinity(0, sizeof(found), &found) < 0:
        return
    if not CPU_EQUAL(&found, &at.home):     # by the cpuset, or by somebody
        if not all_gives(&found):
            sched_setaffinity(0, sizeof(found), &found)
    elif at.free:
        all_gives(&at.allowed)
    else:
        sched_setaffinity(0, sizeof(cpu_set_t), &at.allowed)


cdef inline void look_at_place(
    place_t* at, uint64_t now, uint64_t sent, uint64_t received
) noexcept nogil:
    """Now and then: whether to stay or to roam, by what was done since the last look.

    sent, received  packets, each counted from the worker's beginning
    """
    cdef uint64_t used, percent
    cdef bint sends
    if now < at.looked + LOOK_NS:
        return
    used = clock_ns(CLOCK_THREAD_CPUTIME_ID)
    percent = 100 * (used - at.used) // (now - at.looked)
    sends = sent - at.sent > received - at.received
    at.looked = now
    at.used = used
    at.sent = sent
    at.received = received
    if at.until == 0:
        if sends and percent >= STAY_PERCENT:
            stay(at, now)
    elif not sends or now >= at.until or percent < ROAM_PERCENT:
        roam(at)
