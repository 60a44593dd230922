"""System calls of the data path, atomic loads and stores, the sequence lock, and the clock.

Owns no state. Any thread may call.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from posix.types cimport time_t


cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void* iov_base
        size_t iov_len


cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void* buf, size_t n)
    ssize_t write(int fd, const void* buf, size_t n)
    int close(int fd)


cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        time_t tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec* ts)
    int nanosleep(const timespec* wanted, timespec* left)
    int CLOCK_MONOTONIC
    int CLOCK_THREAD_CPUTIME_ID


cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef extern from "<netinet/in.h>" nogil:
    cdef struct sockaddr:
        pass
    cdef struct in_addr:
        uint32_t s_addr
    cdef struct in6_addr:
        uint8_t s6_addr[16]
    cdef struct sockaddr_in:
        uint16_t sin_family
        uint16_t sin_port
        in_addr sin_addr
    cdef struct sockaddr_in6:
        uint16_t sin6_family
        uint16_t sin6_port
        in6_addr sin6_addr
        uint32_t sin6_scope_id
    enum: AF_INET
    enum: AF_INET6
    enum: IPPROTO_IP
    enum: IPPROTO_IPV6
    enum: IPPROTO_UDP
    enum: IP_MTU_DISCOVER
    enum: IP_PMTUDISC_OMIT
    enum: IP_PMTUDISC_PROBE
    enum: IP_RECVERR
    enum: IP_TOS
    enum: IP_TTL
    enum: IPV6_DONTFRAG
    enum: IPV6_MTU_DISCOVER
    enum: IPV6_PMTUDISC_WANT
    enum: IPV6_RECVERR
    enum: IPV6_TCLASS
    enum: IPV6_UNICAST_HOPS
    enum: IPV6_V6ONLY


cdef extern from "<sys/socket.h>" nogil:
    cdef struct msghdr:
        void* msg_name
        uint32_t msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags
    cdef struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    cdef struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    cmsghdr* CMSG_FIRSTHDR(msghdr* m)
    cmsghdr* CMSG_NXTHDR(msghdr* m, cmsghdr* c)
    uint8_t* CMSG_DATA(cmsghdr* c)
    size_t CMSG_LEN(size_t n)
    size_t CMSG_SPACE(size_t n)
    int sendmmsg(int fd, mmsghdr* msgs, unsigned int n, int flags)
    int recvmmsg(int fd, mmsghdr* msgs, unsigned int n, int flags, timespec* timeout)
    ssize_t recvmsg(int fd, msghdr* msg, int flags)
    int socket(int family, int kind, int protocol)
    int bind(int fd, const sockaddr* address, uint32_t n)
    int connect(int fd, const sockaddr* address, uint32_t n)
    int getsockname(int fd, sockaddr* address, uint32_t* n)
    int getsockopt(int fd, int level, int name, void* value, uint32_t* n)
    int setsockopt(int fd, int level, int name, const void* value, uint32_t n)
    ssize_t sendto(
        int fd, const void* buf, size_t n, int flags, const sockaddr* to, uint32_t to_len
    )
    enum: MSG_DONTWAIT
    enum: MSG_ERRQUEUE
    enum: MSG_TRUNC
    enum: MSG_NOSIGNAL
    enum: SOCK_DGRAM
    enum: SOCK_NONBLOCK
    enum: SOCK_CLOEXEC
    enum: SOL_SOCKET
    enum: SO_MARK
    enum: SO_PRIORITY
    enum: SO_REUSEPORT
    enum: SO_SNDBUF
    enum: SO_SNDBUFFORCE


cdef extern from "<sys/random.h>" nogil:
    ssize_t getrandom(void* buf, size_t n, unsigned int flags)


cdef extern from "<sys/ioctl.h>" nogil:
    """
    #include <linux/sockios.h>
    """
    int ioctl(int fd, unsigned long request, void* value)
    enum: SIOCOUTQ


cdef extern from "<netinet/udp.h>" nogil:
    """
    #ifndef UDP_SEGMENT
    #define UDP_SEGMENT 103
    #endif
    #ifndef UDP_GRO
    #define UDP_GRO 104
    #endif
    """
    enum: UDP_SEGMENT
    enum: UDP_GRO


cdef extern from "<linux/errqueue.h>" nogil:
    """
    #include <time.h>
    """
    cdef struct sock_extended_err:
        uint32_t ee_errno
        uint8_t ee_origin
        uint8_t ee_type
        uint8_t ee_code
        uint32_t ee_info
    enum: SO_EE_ORIGIN_LOCAL
    enum: SO_EE_ORIGIN_ICMP
    enum: SO_EE_ORIGIN_ICMP6


cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint32_t u32
        uint64_t u64
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int ep, int op, int fd, epoll_event* event)
    enum: EPOLL_CLOEXEC
    enum: EPOLL_CTL_ADD
    enum: EPOLL_CTL_DEL
    enum: EPOLLIN


cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long n, int timeout)
    enum: POLLIN
    enum: POLLOUT
    enum: POLLERR
    enum: POLLNVAL


cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    enum: EFD_CLOEXEC
    enum: EFD_NONBLOCK


cdef extern from * nogil:
    """
    #if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "udptun supports little-endian processors only: checksums and ports depend on the order"
    #endif
    /* The memory orderings used between threads (GCC and clang builtins). There are no bare fences,
       because ThreadSanitizer does not understand them. */
    #define udptun_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define udptun_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define udptun_load_ordered(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
    #define udptun_store_ordered(p, v) __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
    #define udptun_peek(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define udptun_poke(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    #define udptun_replace(p, old, v) __sync_bool_compare_and_swap((p), (old), (v))
    #define udptun_set_bits(p, bits) __atomic_fetch_or((p), (bits), __ATOMIC_SEQ_CST)
    #define udptun_take(p) __atomic_exchange_n((p), 0, __ATOMIC_SEQ_CST)
    """
    void* load_ptr "udptun_load"(void** p)
    void store_ptr "udptun_store"(void** p, void* v)
    uint64_t load_flag "udptun_load"(uint64_t* p)
    void store_flag "udptun_store"(uint64_t* p, uint64_t v)
    # All ordered loads and stores have one order, which all threads see. So if two threads each
    # store one word and then load the other's word, at least one of them sees the other's store.
    void* load_ptr_ordered "udptun_load_ordered"(void** p)
    void store_ptr_ordered "udptun_store_ordered"(void** p, void* v)
    uint64_t load_flag_ordered "udptun_load_ordered"(uint64_t* p)
    void store_flag_ordered "udptun_store_ordered"(uint64_t* p, uint64_t v)
    # Single words that two threads use, without any order relative to other words.
    uint32_t peek32 "udptun_peek"(const uint32_t* p)
    void poke32 "udptun_poke"(uint32_t* p, uint32_t v)
    uint64_t peek64 "udptun_peek"(const uint64_t* p)
    void poke64 "udptun_poke"(uint64_t* p, uint64_t v)
    bint replace_flag "udptun_replace"(uint64_t* p, uint64_t old, uint64_t v)  # if *p is old
    uint64_t set_bits "udptun_set_bits"(uint64_t* p, uint64_t bits)  # returns the old value
    uint64_t take_bits "udptun_take"(uint64_t* p)  # returns the old value; the new one is 0


# A sequence lock: one thread writes a record, others copy it. ``changes``, a member of the record,
# is odd while the record is written. The order of the loads and stores of the single words makes a
# fence unnecessary. The size of each part of a record is a multiple of 8 bytes.

cdef enum:
    COPY_TRIES = 100            # tries of a reader while the thread writes


cdef inline void begin_write(uint64_t* changes) noexcept nogil:
    store_flag(changes, changes[0] + 1)


cdef inline void write_part(void* part, const void* value, size_t n) noexcept nogil:
    """Write value[0:n] to a part of the record, between ``begin_write`` and ``end_write``."""
    cdef size_t i
    for i in range(n // 8):
        store_flag(<uint64_t*>part + i, (<const uint64_t*>value)[i])


cdef inline void end_write(uint64_t* changes) noexcept nogil:
    store_flag(changes, changes[0] + 1)


cdef inline bint copy_record(
    uint64_t* changes, const void* record, void* copy, size_t n
) noexcept nogil:
    """Copy record[0:n]. Return False if the writer changed the record during every attempt."""
    cdef uint64_t before
    cdef size_t i
    cdef int _i
    for _i in range(COPY_TRIES):
        before = load_flag(changes)
        for i in range(n // 8):
            (<uint64_t*>copy)[i] = load_flag(<uint64_t*>record + i)
        if before % 2 == 0 and load_flag(changes) == before:
            return True
    return False


cdef inline uint64_t clock_ns(int clock) noexcept nogil:
    """Return the time of a clock of clock_gettime(2), in nanoseconds."""
    cdef timespec ts
    clock_gettime(clock, &ts)
    return <uint64_t>ts.tv_sec * 1000000000 + <uint64_t>ts.tv_nsec


cdef inline uint64_t now_ns() noexcept nogil:
    """Return the monotonic time in nanoseconds."""
    return clock_ns(CLOCK_MONOTONIC)
