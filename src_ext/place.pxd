"""Where a worker runs: a busy one keeps its core for a while.

Owns the thread's affinity while the worker is in compiled code. A worker is woken thousands of
times a second, and each time the scheduler is inclined to move it to whoever woke it. One that used
most of a core lately stays where it is, for STAY_NS at most; then it roams for LOOK_NS at least, so
that the scheduler has a say in where it stays next. What it may use, and an affinity that somebody
else sets meanwhile, is respected.

Threading: the worker's thread only.
Source: sched_setaffinity(2); linux kernel/sched/fair.c (select_task_rq_fair, wake_affine).
"""

from libc.stdint cimport uint64_t

from io cimport CLOCK_THREAD_CPUTIME_ID, clock_ns


cdef extern from "<sched.h>" nogil:
    ctypedef struct cpu_set_t:
        pass
    int sched_getcpu()
    int sched_getaffinity(int pid, size_t n, cpu_set_t* set_)
    int sched_setaffinity(int pid, size_t n, const cpu_set_t* set_)
    void CPU_ZERO(cpu_set_t* set_)
    void CPU_SET(int cpu, cpu_set_t* set_)
    bint CPU_EQUAL(cpu_set_t* a, cpu_set_t* b)


cdef enum:
    LOOK_NS = 50000000          # how often the worker's share of a core is looked at
    STAY_NS = 1000000000
    STAY_PERCENT = 70           # of a core, for a worker to stay
    ROAM_PERCENT = 30           # and below this one that stays roams again


cdef struct place_t:
    uint64_t looked             # when, and the thread's CPU time then
    uint64_t used
    uint64_t until              # the worker stays until then; 0: it roams
    cpu_set_t home              # where it stays
    cpu_set_t allowed           # where it may be


cdef inline void stay(place_t* at, uint64_t now) noexcept nogil:
    """Keep to the core at hand, if there is a choice."""
    cdef int cpu = sched_getcpu()
    if cpu < 0 or sched_getaffinity(0, sizeof(cpu_set_t), &at.allowed) < 0:
        return
    CPU_ZERO(&at.home)
    CPU_SET(cpu, &at.home)
    if CPU_EQUAL(&at.home, &at.allowed):
        return
    if sched_setaffinity(0, sizeof(cpu_set_t), &at.home) == 0:
        at.until = now + STAY_NS


cdef inline void roam(place_t* at) noexcept nogil:
    """Go back to what was allowed, unless somebody else has changed it."""
    cdef cpu_set_t found
    if at.until == 0:
        return
    at.until = 0
    if sched_getaffinity(0, sizeof(cpu_set_t), &found) == 0 and CPU_EQUAL(&found, &at.home):
        sched_setaffinity(0, sizeof(cpu_set_t), &at.allowed)


cdef inline void look_at_place(place_t* at, uint64_t now) noexcept nogil:
    """Now and then: whether to stay or to roam, by the share of a core since the last look."""
    cdef uint64_t used, percent
    if now < at.looked + LOOK_NS:
        return
    used = clock_ns(CLOCK_THREAD_CPUTIME_ID)
    percent = 100 * (used - at.used) // (now - at.looked)
    at.looked = now
    at.used = used
    if at.until == 0:
        if percent >= STAY_PERCENT:
            stay(at, now)
    elif now >= at.until or percent < ROAM_PERCENT:
        roam(at)
