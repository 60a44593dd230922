"""Worker: the Python class of one data worker. Included by _core.pyx.

Owns the memory of one ``worker_t``, its epoll set and its wake-up eventfd. Does not depend on how
packets are processed (path/turn.pxd and the files that it uses).

Threading: only the worker's thread calls ``run`` and ``drain``. Any thread may call the other
methods.
"""

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from drops cimport DROP_REASONS_N
from path.dropped cimport DROPPED_N, copy_dropped, dropped_packet_t, dropped_t
from path.own_socket cimport close_senders, copy_options, open_sender
from path.queue cimport QUEUE_FRAME_DATAGRAMS
from path.probe cimport ring_take
from path.refused_senders cimport (
    REFUSED_SENDERS, copy_refused_senders, refused_sender_t, refused_senders_t,
)
from path.send cimport queue_errors
from path.turn cimport drain, drain_send_queue, epoll_register, epoll_unregister, run
from path.worker cimport (
    EVENT_OWN_SOCKET, EVENT_PATH_MTU, EVENT_PROBE, EVENT_TCP_MERGE, EVENT_TUN_GONE, EVENT_UDP_GSO,
    EVENT_UDP_MERGE, ON_UDP4, ON_UDP6, ON_WAKE, RX_SLOTS, direction_t, free_buffers, init_worker,
    probe_record_t, worker_t,
)
from sys cimport (
    AF_INET, EFD_CLOEXEC, EFD_NONBLOCK, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLLIN, close,
    epoll_create1, epoll_ctl, epoll_event, eventfd, now_ns, store_flag, take_bits, write,
)
from wire.headers cimport VNET_LEN

from udptun.drops import DECAP, DROP_REASONS, ENCAP
from udptun.model import DroppedPacket, ProbeRecord, RefusedSender


MAX_FRAME_SEGS = QUEUE_FRAME_DATAGRAMS  # the gso_max_segs to set on the TUN
WORKER_EVENTS = {
    "path_mtu": EVENT_PATH_MTU, "udp-gso": EVENT_UDP_GSO, "tcp-merge": EVENT_TCP_MERGE,
    "udp-merge": EVENT_UDP_MERGE, "tun_gone": EVENT_TUN_GONE, "own_socket": EVENT_OWN_SOCKET,
    "probe": EVENT_PROBE,
}


cdef dict packets_of(const direction_t* d, uint64_t queued):
    """Return the six counts of inner IP packets and probes of one direction:
    read + generated = delivered + consumed + dropped + queued."""
    cdef uint64_t dropped = 0
    cdef int i
    for i in range(DROP_REASONS_N):
        dropped += d.drops[i]
    return {
        "read": d.read, "generated": d.generated, "delivered": d.delivered,
        "consumed": d.consumed, "dropped": dropped, "queued": queued,
    }


cdef class Worker:
    """One data worker: a TUN queue, its UDP sockets, and the state of one thread.

    All descriptors are borrowed and must be non-blocking: the TUN queue, and at most one UDP socket
    per family. The worker itself opens and closes its IPv4 sender and the own sockets of slow peers
    (path/own_socket.pxd). ``features`` are the offloads to use:
    "tun-gso" (frames carry a vnet header), "udp-gso", "tcp-merge", "udp-merge", "batch".
    """
    cdef worker_t* w
    cdef readonly Core core
    cdef dict inherited         # counters of an earlier process

    def __cinit__(self, Core core, int tun_fd, int udp_fd4, int udp_fd6, features,
                  uint32_t gso_max_segs=64):
        cdef worker_t* w
        cdef epoll_event event
        self.core = core
        self.inherited = {}
        w = self.w = <worker_t*>calloc(1, sizeof(worker_t))
        if w == NULL:
            raise MemoryError
        if not init_worker(w, tun_fd, udp_fd4, udp_fd6):
            raise MemoryError
        self.set_sender()
        w.vnet_len = VNET_LEN if "tun-gso" in features else 0
        w.udp_gso = "udp-gso" in features
        w.batch = "batch" in features
        w.merge.tcp = "tcp-merge" in features
        w.merge.udp = "udp-merge" in features
        w.gso_max_segs = gso_max_segs
        w.rx_slots = RX_SLOTS if w.batch else 1
        w.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        w.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if w.epoll_fd < 0 or w.wake_fd < 0:
            raise OSError(errno, "cannot create the worker's epoll set or eventfd")
        w.polled[ON_WAKE].fd = w.wake_fd
        event.events = EPOLLIN
        event.data.u64 = 0
        if epoll_ctl(w.epoll_fd, EPOLL_CTL_ADD, w.wake_fd, &event) < 0 or not epoll_register(w):
            raise OSError(errno, "cannot add the worker's descriptors to its epoll set")
        core.add_worker(self, w)

    cdef set_sender(self):
        cdef int fd
        if self.w.udp_fd4 >= 0:
            fd = open_sender(self.w.udp_fd4)
            if fd >= 0:
                self.w.sender4 = fd

    def __dealloc__(self):
        if self.w == NULL:
            return
        close_senders(self.w)
        if self.w.epoll_fd >= 0:
            close(self.w.epoll_fd)
        if self.w.wake_fd >= 0:
            close(self.w.wake_fd)
        free_buffers(self.w)
        free(self.w)

    def renew_options(self):
        """Let all sockets that send have the mark, DSCP and other options that the sockets given by
        the caller have now."""
        store_flag(&self.w.renew_requested, 1)
        self.ask()
        if self.w.sender4 != self.w.udp_fd4 \
                and copy_options(self.w.udp_fd4, self.w.sender4, AF_INET) < 0:
            raise OSError(errno, "cannot set the options of the shared sender")

    def fileno(self):
        """Return the descriptor of the epoll set, for the event loop's add_reader.

        The descriptor is readable when there is work.
        """
        return self.w.epoll_fd

    def run(self, int linger_ms):
        """Forward packets without the GIL. Return after ``linger_ms`` without work, or on ``wake``.

        Also return if the TUN is gone.
        """
        with nogil:
            run(self.w, linger_ms)

    def wake(self):
        """Make ``run`` return at once: the present call, and each later call until ``resume``."""
        cdef uint64_t one = 1
        store_flag(&self.w.wake_requested, 1)
        write(self.w.wake_fd, &one, 8)

    def hand_over(self, int successor_fd):
        """Wake as ``wake`` does. When ``run`` returns, write to the eventfd ``successor_fd``.

        From then on, the worker does not use the TUN and the sockets until ``resume``. The caller
        then passes the queued datagrams to ``drain_send_queue``.
        """
        self.w.successor_fd = successor_fd
        self.wake()

    def rebind(self, int udp_fd4, int udp_fd6):
        """Use these UDP sockets from now on. They have the same families as the former ones.

        Call this only between ``drain_send_queue`` and ``resume``. Raise OSError if the new sockets
        cannot be watched; the worker then polls them.
        """
        cdef worker_t* w = self.w
        cdef int error = 0
        epoll_unregister(w)
        close_senders(w)
        w.udp_fd4, w.udp_fd6 = udp_fd4, udp_fd6
        w.sender4, w.sender6 = udp_fd4, udp_fd6
        w.polled[ON_UDP4].fd, w.polled[ON_UDP6].fd = udp_fd4, udp_fd6
        self.set_sender()
        if w.deaf_until_ns != 0:  # a flood of ICMP errors was at the former sockets
            w.deaf_until_ns = w.errors_n = 0
            queue_errors(w, 1)
        if not epoll_register(w):
            error = errno
            self.ask()  # the event loop then runs the worker, which tries again
            raise OSError(error, "cannot add the worker's descriptors to its epoll set")

    def resume(self):
        """Let ``run`` work again after ``wake`` or ``hand_over``."""
        store_flag(&self.w.wake_requested, 0)

    def ask(self):
        """Ask the worker whether it runs: it increases ``answers`` and continues."""
        cdef uint64_t one = 1
        write(self.w.wake_fd, &one, 8)

    def answers(self):
        """Return how often the worker has noticed ``ask`` or another wake-up."""
        return self.w.wakes

    def look(self):
        """Make an idle worker close the own sockets that are no longer needed, and read errors
        again after a flood.

        Call this at regular intervals. If the worker has none of this to do, the call does nothing.
        """
        if self.w.own_sockets_n != 0 or self.w.deaf_until_ns != 0:
            self.ask()

    def drain(self, double seconds):
        """Forward the packets in the queues for at most ``seconds``. Count the rest as dropped.

        Call this only after the last ``run``. It also closes the sockets that the worker opened.
        """
        cdef worker_t* w = self.w
        cdef uint64_t end = now_ns() + <uint64_t>(seconds * 1e9)
        with nogil:
            drain(w, end)
            close_senders(w)

    def drain_send_queue(self, double seconds):
        """Send the queued datagrams for at most ``seconds``. Count the rest as dropped.

        Unlike ``drain``, read no packet. Do not call this during ``run``. ``run`` may be called
        again later.
        """
        cdef worker_t* w = self.w
        cdef uint64_t end = now_ns() + <uint64_t>(seconds * 1e9)
        with nogil:
            drain_send_queue(w, end)

    def take_events(self):
        """Return the names (see WORKER_EVENTS) of the events raised since the last call."""
        cdef uint64_t events = take_bits(&self.w.events)
        return [name for name, bit in WORKER_EVENTS.items() if events & bit]

    def own_socket_error(self):
        """Return the errno of the last own socket that could not be opened; 0 if there was none."""
        return self.w.own_error

    def in_use(self):
        """Return the features that are still on, among those that can be lost at run time."""
        return {
            name for name, on in (
                ("udp-gso", self.w.udp_gso), ("tcp-merge", self.w.merge.tcp),
                ("udp-merge", self.w.merge.udp),
            ) if on
        }

    def counters(self):
        """Return the counters of system calls, turns, ICMP errors and congestion marks, and the
        queued datagrams."""
        cdef worker_t* w = self.w
        cdef dict before = self.inherited
        cdef dict calls = before.get("syscalls", {})
        counted = {
            "turns": w.turns, "loop_returns": w.loop_returns, "icmp_sent": w.icmp_sent,
            "icmp_suppressed": w.icmp_suppressed, "probes_lost": w.probes.lost,
            "own_sockets_given": w.own_sockets_given, "icmp_floods": w.deaf_n,
            "ecn_marked": w.ecn.marked, "ecn_unexpected": w.ecn.unexpected,
        }
        syscalls = {
            "read": w.syscalls_read, "write": w.syscalls_write, "send": w.syscalls_send,
            "receive": w.syscalls_recv, "wait": w.syscalls_wait,
        }
        return {
            "index": w.index, "queued": w.queue.waiting_n, "own_sockets": w.own_sockets_n,
            **{name: n + before.get(name, 0) for name, n in counted.items()},
            "syscalls": {name: n + calls.get(name, 0) for name, n in syscalls.items()},
        }

    def inherit(self, dict counters):
        """Add the ``counters`` of the worker of an earlier process. Names that are not counters of
        this version are ignored."""
        self.inherited = counters

    cdef list take_probes(self):
        """Return a model.ProbeRecord for each probe that has arrived since the last call."""
        cdef probe_record_t record
        found = []
        while ring_take(&self.w.probes, &record):
            found.append(ProbeRecord(
                kind=record.probe.kind, address=record.addr[:record.addr_len], port=record.port,
                token=record.probe.token, heard_ms=record.probe.heard_ms, size=record.probe.size,
                received_ns=record.received_ns,
            ))
        return found

    cdef list refused_senders(self):
        """Return a model.RefusedSender for each entry of the list of refused senders."""
        cdef refused_senders_t copy
        cdef refused_sender_t* item
        cdef uint32_t i
        found = []
        if not copy_refused_senders(&self.w.refused_senders, &copy):
            return found
        for i in range(REFUSED_SENDERS):
            item = &copy.items[i]
            if item.addr_len != 0:
                found.append(RefusedSender(
                    address=item.addr[:item.addr_len], port=item.port, packets=item.packets,
                    last_ns=item.last_ns, reason=DROP_REASONS[item.reason - 1].name,
                ))
        return found

    cdef list last_dropped(self, int reason, str direction):
        """Return a model.DroppedPacket for each record of one direction and reason of ``drop_t``.
        """
        cdef dropped_packet_t items[DROPPED_N]
        cdef dropped_packet_t* item
        cdef uint32_t i
        cdef dropped_t* dropped = &self.w.encap_dropped[reason]
        if direction == DECAP:
            dropped = &self.w.decap_dropped[reason]
        found = []
        if not copy_dropped(dropped, items):
            return found
        for i in range(DROPPED_N):
            item = &items[i]
            if item.time_ns != 0:
                found.append(DroppedPacket(
                    worker=self.w.index, number=item.number, time_ns=item.time_ns,
                    packets=item.packets, length=item.len, address=item.addr[:item.addr_len],
                    port=item.port, head=item.head[:item.head_len],
                ))
        return found

    cdef dict packets(self):
        """Return ``packets_of`` by direction: {direction: {read, generated, ...}}."""
        return {
            ENCAP: packets_of(&self.w.encap, self.w.queue.waiting_n),
            DECAP: packets_of(&self.w.decap, 0),
        }

    cdef uint64_t dropped(self, int reason, str direction):
        """Return the number of packets dropped in one direction for one reason of ``drop_t``."""
        return self.w.encap.drops[reason] if direction == ENCAP else self.w.decap.drops[reason]
