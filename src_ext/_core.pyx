"""The compiled core, as Python sees it: RouteTable, Core and Worker.

Owns the memory of workers, snapshots and peers, and the few Python calls that start, feed and read
them. What happens to a packet stands in the .pxd files, in the order given by README.md.

Threading: ``Core`` belongs to the control thread; ``Worker.run`` to the worker's. Counters are
read across threads without locks: each is one aligned word that one thread writes.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from path.decap cimport CHECK_OFF, CHECK_PEER, CHECK_STRICT
from drops cimport DROP_REASONS_N
from path.queue cimport QUEUE_BYTES, QUEUE_FRAME_DATAGRAMS
from sys cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLLIN, POLLIN, close,
    epoll_create1, epoll_ctl, epoll_event, eventfd, now_ns, store_flag, write,
)
from wire.headers cimport VNET_LEN
from wire.merge cimport merge_reset
from table.peers cimport (
    addr_map_init, addr_map_put, find_hop, hop_t, path_limit, peer_counters_t, peer_free, peer_t,
    snapshot_free, snapshot_t,
)
from table.publish cimport build_snapshot, drop_unpublished, limbo_t, put_in_force, reclaim
from table.route cimport route_t, route_vec_t
from path.turn cimport drain, epoll_register, run
from path.worker cimport (
    EVENT_PATH_MTU, EVENT_TCP_MERGE, EVENT_TUN_GONE, EVENT_UDP_GSO, EVENT_UDP_MERGE, RX_SLOT,
    RX_SLOTS, TX_FRAME, WR_FRAME, direction_t, shared_t, worker_t,
)

from udptun.drops import DECAP, DROP_REASONS, ENCAP
from udptun.errors import FieldError

include "table/route_table.pxi"


cdef extern from * nogil:
    """
    #define udptun_take(p) __atomic_exchange_n((p), 0, __ATOMIC_ACQ_REL)
    """
    uint64_t take_flags "udptun_take"(uint64_t* p)


MAX_FRAME_SEGS = QUEUE_FRAME_DATAGRAMS  # of one super-packet: what the TUN is told
SOURCE_CHECKS = {"off": CHECK_OFF, "peer": CHECK_PEER, "strict": CHECK_STRICT}
WORKER_EVENTS = {
    "path_mtu": EVENT_PATH_MTU, "udp-gso": EVENT_UDP_GSO, "tcp-merge": EVENT_TCP_MERGE,
    "udp-merge": EVENT_UDP_MERGE, "tun_gone": EVENT_TUN_GONE,
}


cdef dict direction_dict(const direction_t* d, uint64_t queued):
    cdef uint64_t dropped = 0
    cdef int i
    for i in range(DROP_REASONS_N):
        dropped += d.drops[i]
    return {
        "read": d.read, "generated": d.generated, "delivered": d.delivered,
        "dropped": dropped, "queued": queued,
    }


cdef class Core:
    """What all workers share: the snapshot in force, and what it replaced.

    source_check  "strict", "peer" or "off"
    workers_n     how many Worker objects will be made
    link_mtus     (IPv4, IPv6): outer bytes the underlay takes, 0 without a listener of the family
    tun_addresses the TUN's own, packed: the source of ICMP errors
    notify_fd     an eventfd, borrowed: written when a worker has something to tell
    """
    cdef shared_t shared
    cdef worker_t** workers
    cdef limbo_t* limbo
    cdef uint64_t generation
    cdef uint32_t link_mtu4
    cdef uint32_t link_mtu6
    cdef list own               # packed addresses
    cdef list objects           # the Worker of each index
    cdef bint preparing         # a Prepared is alive: there may be one at a time
    cdef RouteTable table       # the one in force: its rows are the snapshot's hops

    def __cinit__(self, str source_check, uint32_t workers_n, tuple link_mtus, tun_addresses,
                  int notify_fd):
        cdef bytes packed
        self.workers = <worker_t**>calloc(workers_n, sizeof(void*))
        if self.workers == NULL:
            raise MemoryError
        self.shared.workers_n = workers_n
        self.shared.source_check = SOURCE_CHECKS[source_check]
        self.shared.notify_fd = notify_fd
        self.link_mtu4, self.link_mtu6 = link_mtus
        self.objects = []
        self.own = []
        for packed in tun_addresses:
            self.own.append(packed)
            if len(packed) == 4:
                memcpy(self.shared.tun_addr4, <const uint8_t*>packed, 4)
                self.shared.has_addr4 = True
            else:
                memcpy(self.shared.tun_addr6, <const uint8_t*>packed, 16)
                self.shared.has_addr6 = True
        self.publish(RouteTable())

    def __dealloc__(self):
        # every Worker holds a reference to its Core, so none is left that could look
        cdef uint32_t i
        cdef peer_t* peer
        cdef peer_t* next_
        if self.workers == NULL:
            return
        reclaim(self.limbo, self.workers, 0)
        if self.shared.snapshot != NULL:
            for i in range(self.shared.snapshot.peers.mask + 1):
                peer = self.shared.snapshot.peers.slots[i].peer
                while peer != NULL:
                    next_ = peer.same_addr
                    peer_free(peer)
                    peer = next_
            snapshot_free(self.shared.snapshot)
        free(self.workers)

    def check(self, RouteTable table):
        """Refuse a table with a next hop that no listener can reach (FieldError)."""
        cdef size_t i, bad = table.vec.n
        cdef bint has4 = self.link_mtu4 != 0, has6 = self.link_mtu6 != 0
        with nogil:
            for i in range(table.vec.n):
                if not (has4 if table.vec.items[i].via_family == 4 else has6):
                    bad = i
                    break
        if bad < table.vec.n:
            route = table.route_at(bad)
            family = "IPv4" if has4 else "IPv6"
            raise FieldError("via", str(route.via),
                             f"an {family} address: there is no other listener",
                             f"route {route.dst}")

    def prepare(self, RouteTable table):
        """Build all that a look-up needs, aside: the long part. Any thread, one at a time, and
        nothing else may be prepared before it is committed or thrown away.

        The table must not change afterwards. Raises FieldError as ``check``, MemoryError.
        """
        cdef Prepared prepared
        self.check(table)
        if self.preparing:
            raise RuntimeError("another table is being prepared")
        self.preparing = True
        prepared = Prepared(self, table)
        with nogil:
            prepared.snapshot = build_snapshot(
                self.shared.snapshot, table.vec.items, table.vec.n, self.generation + 1,
                self.link_mtu4, self.link_mtu6, self.shared.workers_n,
            )
        if prepared.snapshot == NULL:
            self.preparing = False
            raise MemoryError
        return prepared

    def commit(self, Prepared prepared):
        """Put what was prepared in force: microseconds. Workers see it at their next turn;
        nothing waits for them. The control thread only."""
        cdef snapshot_t* new = prepared.snapshot
        cdef bytes packed
        if new == NULL or new.generation != self.generation + 1:
            raise ValueError("prepared for another generation")
        if addr_map_init(&new.own, len(self.own) + 1) < 0:
            raise MemoryError
        for packed in self.own:
            addr_map_put(&new.own, <const uint8_t*>packed, len(packed))
        prepared.snapshot = NULL
        self.preparing = False
        self.generation += 1
        self.table = prepared.table
        with nogil:
            self.limbo = put_in_force(&self.shared, new, self.limbo)
        self.collect()

    def publish(self, RouteTable table):
        """``prepare`` and ``commit`` in one, for a small table."""
        self.commit(self.prepare(table))

    def set_own_addresses(self, addresses):
        """Inner sources that are refused on receive: packed addresses, the TUN's always among
        them. Takes effect when the next table, or the same again, is committed; returns whether
        there is anything new."""
        cdef set packed = set(addresses)
        if self.shared.has_addr4:
            packed.add(PyBytes_FromStringAndSize(<char*>self.shared.tun_addr4, 4))
        if self.shared.has_addr6:
            packed.add(PyBytes_FromStringAndSize(<char*>self.shared.tun_addr6, 16))
        changed = packed != set(self.own)
        self.own = sorted(packed)
        return changed

    def collect(self):
        """Free what no worker can see any more. Called on each publish, and now and then."""
        cdef uint32_t n = <uint32_t>len(self.objects)
        with nogil:
            self.limbo = reclaim(self.limbo, self.workers, n)

    def peers(self):
        """[(address, port, path_mtu, encap_packets, encap_bytes, decap_packets, decap_bytes,
        seconds since last seen or None)], by ordinal; addresses packed."""
        cdef snapshot_t* s = self.shared.snapshot
        cdef list rows = [None] * s.peers_n
        cdef peer_t* peer
        cdef peer_counters_t sum_
        cdef peer_counters_t* c
        cdef uint64_t now = now_ns()
        cdef uint32_t i, k
        for i in range(s.peers.mask + 1):
            peer = s.peers.slots[i].peer
            while peer != NULL:
                memset(&sum_, 0, sizeof(sum_))
                for k in range(self.shared.workers_n):
                    c = &peer.counters[k]
                    sum_.encap_packets += c.encap_packets
                    sum_.encap_bytes += c.encap_bytes
                    sum_.decap_packets += c.decap_packets
                    sum_.decap_bytes += c.decap_bytes
                    sum_.last_seen_ns = max(sum_.last_seen_ns, c.last_seen_ns)
                seen = None
                if sum_.last_seen_ns:
                    seen = max(0.0, (<double>now - <double>sum_.last_seen_ns) / 1e9)
                rows[peer.ordinal] = (
                    PyBytes_FromStringAndSize(<char*>peer.addr, peer.addr_len), peer.port,
                    peer.path_mtu, sum_.encap_packets, sum_.encap_bytes, sum_.decap_packets,
                    sum_.decap_bytes, seen,
                )
                peer = peer.same_addr
        return rows

    def peers_n(self):
        return self.shared.snapshot.peers_n

    def hop_ordinals(self, size_t start, size_t count):
        """The peer's ordinal of each of the routes start .. start + count."""
        cdef snapshot_t* s = self.shared.snapshot
        cdef size_t i
        return [s.hops[i].peer.ordinal for i in range(start, min(start + count, s.hops_n))]

    def trace(self, bytes address):
        """(model.Route in force, largest inner packet) for a packed address, or None."""
        cdef snapshot_t* s = self.shared.snapshot
        cdef hop_t* hop = find_hop(s, <const uint8_t*>address, len(address))
        if hop == NULL:
            return None
        return self.table.route_at(hop - s.hops), path_limit(hop)

    def path_mtu_changes(self, double forget_seconds):
        """[(address, port, path_mtu)] of peers whose path MTU changed since the last call.
        What was learned longer ago than forget_seconds is forgotten (RFC 1191 6.3)."""
        cdef snapshot_t* s = self.shared.snapshot
        cdef uint64_t forget = <uint64_t>(forget_seconds * 1e9)
        cdef uint64_t now = now_ns()
        cdef peer_t* peer
        cdef uint32_t i
        cdef list changes = []
        for i in range(s.peers.mask + 1):
            peer = s.peers.slots[i].peer
            while peer != NULL:
                if peer.path_mtu_ns != 0 and now > peer.path_mtu_ns + forget:
                    peer.path_mtu_ns = 0
                    peer.path_mtu = peer.link_mtu
                if peer.path_mtu != peer.said_mtu:
                    peer.said_mtu = peer.path_mtu
                    changes.append((
                        PyBytes_FromStringAndSize(<char*>peer.addr, peer.addr_len), peer.port,
                        peer.path_mtu,
                    ))
                peer = peer.same_addr
        return changes

    def packets(self):
        """Both sides of the invariant, summed over the workers:
        {direction: {read, generated, delivered, dropped, queued}}."""
        cdef Worker w
        total = {ENCAP: dict.fromkeys(("read", "generated", "delivered", "dropped", "queued"), 0)}
        total[DECAP] = dict(total[ENCAP])
        for w in self.objects:
            for direction, counts in (
                (ENCAP, direction_dict(&w.w.encap, w.w.queue.waiting_n)),
                (DECAP, direction_dict(&w.w.decap, 0)),
            ):
                for name, value in counts.items():
                    total[direction][name] += value
        return total

    def drops(self):
        """[(reason, direction, packets)] for each reason in each direction where it can occur."""
        cdef Worker w
        cdef int i
        rows = []
        for i, reason in enumerate(DROP_REASONS, start=1):
            for direction in reason.directions:
                n = 0
                for w in self.objects:
                    n += w.w.encap.drops[i] if direction == ENCAP else w.w.decap.drops[i]
                rows.append((reason.name, direction, n))
        return rows


@cython.no_gc_clear  # __dealloc__ needs the core
cdef class Prepared:
    """A snapshot that is built and not yet in force."""
    cdef Core core
    cdef RouteTable table
    cdef snapshot_t* snapshot

    def __cinit__(self, Core core, RouteTable table):
        self.core, self.table = core, table

    def __dealloc__(self):
        if self.snapshot != NULL:
            drop_unpublished(self.snapshot, self.core.shared.snapshot)
            self.core.preparing = False


cdef class Worker:
    """One data worker: a TUN queue, at most one UDP socket per family, and one thread's state.

    All descriptors are borrowed and must be non-blocking. Features are what is to be used:
    "tun-gso" (frames carry a vnet header), "udp-gso", "tcp-merge", "udp-merge", "batch".
    """
    cdef worker_t* w
    cdef readonly Core core

    def __cinit__(self, Core core, int tun_fd, int udp_fd4, int udp_fd6, features,
                  uint32_t gso_max_segs=64):
        cdef worker_t* w
        cdef epoll_event event
        cdef uint32_t i
        if len(core.objects) == core.shared.workers_n:
            raise ValueError("the core was made for fewer workers")
        w = self.w = <worker_t*>calloc(1, sizeof(worker_t))
        if w == NULL:
            raise MemoryError
        w.epoll_fd = w.wake_fd = -1
        w.tx_frame = <uint8_t*>calloc(1, TX_FRAME)
        w.queue.memory = <uint8_t*>calloc(1, QUEUE_BYTES)
        w.wr_frame = <uint8_t*>calloc(1, WR_FRAME)
        w.rx_buf = <uint8_t*>calloc(RX_SLOTS, RX_SLOT)
        if w.tx_frame == NULL or w.queue.memory == NULL or w.rx_buf == NULL or w.wr_frame == NULL:
            raise MemoryError
        w.shared = &core.shared
        w.index = <uint32_t>len(core.objects)
        w.tun_fd, w.udp_fd4, w.udp_fd6 = tun_fd, udp_fd4, udp_fd6
        w.vnet_len = VNET_LEN if "tun-gso" in features else 0
        w.udp_gso = "udp-gso" in features
        w.batch = "batch" in features
        w.merge.tcp = "tcp-merge" in features
        w.merge.udp = "udp-merge" in features
        w.gso_max_segs = gso_max_segs
        w.rx_slots = RX_SLOTS if w.batch else 1
        merge_reset(&w.merge)
        for i in range(RX_SLOTS):
            w.rx_iov[i].iov_base = w.rx_buf + i * RX_SLOT
            w.rx_iov[i].iov_len = RX_SLOT
            w.rx_msgs[i].msg_hdr.msg_name = &w.rx_from[i]
            w.rx_msgs[i].msg_hdr.msg_iov = &w.rx_iov[i]
            w.rx_msgs[i].msg_hdr.msg_iovlen = 1
            w.rx_msgs[i].msg_hdr.msg_control = &w.rx_cmsg[i][0]
        w.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        w.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if w.epoll_fd < 0 or w.wake_fd < 0:
            raise OSError(errno, "cannot make the worker's epoll set")
        for i, fd in enumerate((w.wake_fd, tun_fd, udp_fd4, udp_fd6)):
            w.polled[i].fd = fd
            w.polled[i].events = POLLIN
        event.events = EPOLLIN
        event.data.u64 = 0
        if epoll_ctl(w.epoll_fd, EPOLL_CTL_ADD, w.wake_fd, &event) < 0 or not epoll_register(w):
            raise OSError(errno, "cannot fill the worker's epoll set")
        self.core = core
        core.workers[w.index] = w
        core.objects.append(self)

    def __dealloc__(self):
        if self.w == NULL:
            return
        if self.w.epoll_fd >= 0:
            close(self.w.epoll_fd)
        if self.w.wake_fd >= 0:
            close(self.w.wake_fd)
        free(self.w.tx_frame)
        free(self.w.queue.memory)
        free(self.w.rx_buf)
        free(self.w.wr_frame)
        free(self.w)

    def fileno(self):
        """An epoll set, readable when there is work: for the loop's add_reader."""
        return self.w.epoll_fd

    def run(self, int linger_ms):
        """Work without the GIL until idle for linger_ms, or called. The worker's thread only."""
        with nogil:
            run(self.w, linger_ms)

    def wake(self):
        """Make ``run`` return at once, now and on each later call until ``resume``. Any thread."""
        cdef uint64_t one = 1
        store_flag(&self.w.wake_requested, 1)
        write(self.w.wake_fd, &one, 8)

    def resume(self):
        """Let ``run`` work again after ``wake``. Any thread."""
        store_flag(&self.w.wake_requested, 0)

    def drain(self, double seconds):
        """Forward what the queues already hold, for at most ``seconds``; count the rest as dropped.

        Only after the last ``run``."""
        cdef worker_t* w = self.w
        cdef uint64_t end = now_ns() + <uint64_t>(seconds * 1e9)
        with nogil:
            drain(w, end)

    def take_events(self):
        """Return the events raised since the last call, by their names in WORKER_EVENTS."""
        cdef uint64_t events = take_flags(&self.w.events)
        return [name for name, bit in WORKER_EVENTS.items() if events & bit]

    def in_use(self):
        """Of the features that may be switched off at run time, those still on."""
        return {
            name for name, on in (
                ("udp-gso", self.w.udp_gso), ("tcp-merge", self.w.merge.tcp),
                ("udp-merge", self.w.merge.udp),
            ) if on
        }

    def counters(self):
        cdef worker_t* w = self.w
        return {
            "index": w.index, "turns": w.turns, "loop_returns": w.loop_returns,
            "queued": w.queue.waiting_n, "icmp_sent": w.icmp_sent,
            "icmp_suppressed": w.icmp_suppressed,
            "syscalls": {
                "read": w.syscalls_read, "write": w.syscalls_write, "send": w.syscalls_send,
                "receive": w.syscalls_recv, "wait": w.syscalls_wait,
            },
        }
