"""Core: the Python class of the state that all workers share. Included by _core.pyx.

Owns the active snapshot, the retired snapshots, and all peers. Does not depend on sockets or the
TUN.

Threading: the control thread only. Exception: any thread may call ``prepare``, but only one thread
at a time.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAFNOSUPPORT, EAGAIN, ECONNREFUSED, EMSGSIZE
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from limits cimport MAX_UDP_PAYLOAD, MIN_MTU6
from path.decap cimport CHECK_OFF, CHECK_PEER, CHECK_STRICT
from path.own_socket cimport close_spare
from path.probe cimport add_token, count_sent, send_with_spare
from path.capture cimport CAPTURES_N, capture_free, capture_t, switch_capture
from path.turn cimport capture_is_unused, oldest_generation
from path.worker cimport ERRNOS, OWN_NETS, direction_t, shared_t, spare_t, worker_t
from sys cimport (
    SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6, SO_EE_ORIGIN_LOCAL, close, load_flag, now_ns,
    peek32, peek64, poke32, poke64, sockaddr_in6, store_flag, take_bits,
)
from table.addr_map cimport addr_map_init, addr_map_put
from table.express cimport (
    KIND_ADMIT, KIND_OWN, any_express, endpoint_t, entry_t, express_counters_t, prefix_t,
    route_entries, set_prefix, summed,
)
from table.peer cimport (
    HINT_DEVICE, HINT_MTU, add_counters, peer_counters_t, peer_free, peer_t, set_sockaddr,
)
from table.publish cimport (
    activate_snapshot, build_snapshot, discard_snapshot, reclaim, retired_t,
)
from table.peer_errors cimport peer_error_t, peer_errors_t, read_errors_of, record_refusal
from table.snapshot cimport (
    find_hop, first_peer_at, hop_t, next_peer, packet_limit, snapshot_free, snapshot_t,
)

from wire.headers cimport IP_MAX
from wire.net cimport set_net
from wire.probe cimport PROBE_LEN, PROBE_REQUEST, build_probe, probe_t

from udptun.drops import DECAP, DROP_REASONS, ENCAP
from udptun.errors import FieldError
from udptun.model import Peer, PeerError

ERROR_ORIGINS = {
    SO_EE_ORIGIN_LOCAL: "local", SO_EE_ORIGIN_ICMP: "icmp", SO_EE_ORIGIN_ICMP6: "icmp6",
}
ORIGIN_NUMBERS = {name: number for number, name in ERROR_ORIGINS.items()}
# the reasons for which the express path drops packets
EXPRESS_DROPS = {ENCAP: "no_buffer", DECAP: "tun_write"}
SOURCE_CHECKS = {"off": CHECK_OFF, "peer": CHECK_PEER, "strict": CHECK_STRICT}


cdef bytes packed_address(const peer_t* peer):
    return PyBytes_FromStringAndSize(<const char*>peer.addr, peer.addr_len)


cdef uint64_t errors_n(peer_t* peer, uint32_t workers_n) noexcept nogil:
    """Return the number of errors of a peer, of all threads."""
    cdef uint64_t n = 0
    cdef uint32_t i
    for i in range(workers_n + 1):
        n += load_flag(&peer.errors[i].n)
    return n


cdef object last_error(peer_t* peer, uint32_t workers_n):
    """Return the newest error of a peer as a model.PeerError, or None."""
    cdef peer_errors_t copy
    cdef peer_error_t newest
    cdef uint32_t i
    memset(&newest, 0, sizeof(newest))
    for i in range(workers_n + 1):
        if load_flag(&peer.errors[i].n) and read_errors_of(&peer.errors[i], &copy) \
                and copy.last.time_ns > newest.time_ns:
            newest = copy.last
    if newest.time_ns == 0:
        return None
    return PeerError(
        errno=newest.error, origin=ERROR_ORIGINS.get(newest.origin, "send"), type=newest.kind,
        code=newest.code, reporter=newest.reporter[:newest.reporter_len],
        time_ns=newest.time_ns,
    )


cdef class Core:
    """The active snapshot and the peers, shared by all workers.

    source_check   "strict", "peer" or "off"
    workers_n      the number of Worker objects that will be created
    link_mtus      (IPv4, IPv6): the largest outer packet of the underlay in bytes; 0 if there is no
                   listener of the family
    tun_addresses  the packed addresses of the TUN; they are the source addresses of ICMP errors
    notify_fd      an eventfd, borrowed; a worker writes to it when the worker raises an event
    own_subnets    None: deliver packets to any inner destination. Otherwise a list of at most
                   OWN_NETS prefixes, each (packed address, prefix length): deliver only packets to
                   these prefixes and to ``tun_addresses``
    dscp           of the datagrams, 0..63: the sockets must have it; None: that of the packet, and
                   the sockets have 0
    """
    cdef shared_t shared
    cdef worker_t** workers     # owned array of borrowed pointers: one per Worker in objects
    cdef list objects           # the Worker objects, by index
    cdef retired_t* retired
    cdef uint64_t generation    # of the active snapshot
    cdef uint32_t link_mtu4
    cdef uint32_t link_mtu6
    cdef list own               # packed addresses
    cdef bint preparing         # a PreparedSnapshot exists; only one may exist at a time
    cdef RouteTable table       # the active table; its routes have the order of snapshot.hops
    cdef direction_t sent       # counters of the probes that send_probe sends
    cdef spare_t spare4
    cdef spare_t spare6
    cdef uint64_t sends_refused  # of send_probe
    cdef uint32_t[ERRNOS] refusals  # of send_probe, by errno
    cdef peer_counters_t gone   # of the peers that have been freed
    cdef dict inherited         # counters of an earlier process; see inherit
    cdef tuple express_packets  # see set_express
    cdef uint64_t ended[CAPTURES_N]  # captures_t.word when the capture ended; 0 = it has not

    def __cinit__(self, str source_check, uint32_t workers_n, tuple link_mtus, tun_addresses,
                  int notify_fd, own_subnets=None, dscp=0):
        cdef bytes packed
        self.spare4.fd = self.spare6.fd = -1
        self.workers = <worker_t**>calloc(workers_n, sizeof(void*))
        if self.workers == NULL:
            raise MemoryError
        self.shared.workers_n = workers_n
        self.shared.source_check = SOURCE_CHECKS[source_check]
        self.shared.notify_fd = notify_fd
        self.shared.tun_mtu = IP_MAX
        self.shared.class_set = 0 if dscp is None else dscp << 2
        self.shared.class_copied = 0xFC if dscp is None else 0
        self.link_mtu4, self.link_mtu6 = link_mtus
        self.objects = []
        self.inherited = {}
        self.express_packets = (0, 0, 0, 0)
        self.own = []
        for packed in tun_addresses:
            self.own.append(packed)
            if len(packed) == 4:
                memcpy(self.shared.tun_addr4, <const uint8_t*>packed, 4)
                self.shared.has_addr4 = True
            else:
                memcpy(self.shared.tun_addr6, <const uint8_t*>packed, 16)
                self.shared.has_addr6 = True
        if own_subnets is not None:
            self.shared.admit_own = True
            for packed, length in (*own_subnets, *((one, 8 * len(one)) for one in self.own)):
                self.add_own_net(packed, length)
        self.publish(RouteTable())

    cdef add_own_net(self, bytes packed, uint32_t length):
        if self.shared.own_nets_n == OWN_NETS:
            raise ValueError(f"more than {OWN_NETS} own prefixes")
        set_net(&self.shared.own_nets[self.shared.own_nets_n], packed, len(packed), length)
        self.shared.own_nets_n += 1

    def __dealloc__(self):
        # Each Worker holds a reference to its Core, so no worker is left.
        cdef snapshot_t* s = self.shared.snapshot
        cdef peer_t* peer
        cdef peer_t* next_
        cdef uint32_t slot = 0
        reclaim(self.retired, <uint64_t>-1, self.shared.workers_n, &self.gone)
        for slot in range(CAPTURES_N):
            capture_free(self.shared.captures.items[slot])
        slot = 0
        if s != NULL:
            peer = next_peer(s, &slot, NULL)
            while peer != NULL:
                next_ = next_peer(s, &slot, peer)
                peer_free(peer)
                peer = next_
            snapshot_free(s)
        if self.workers != NULL:  # else __cinit__ has not set the descriptors
            for fd in (self.spare4.fd, self.spare6.fd):
                if fd >= 0:
                    close(fd)
        free(self.workers)

    cdef add_worker(self, Worker worker, worker_t* w):
        """Register a new worker: give it its index and the shared state."""
        if <uint32_t>len(self.objects) == self.shared.workers_n:
            raise ValueError("the core was made for fewer workers")
        w.index = w.queue.worker = <uint32_t>len(self.objects)
        w.shared = &self.shared
        self.workers[w.index] = w
        self.objects.append(worker)

    # Snapshots

    def check(self, RouteTable table):
        """Raise FieldError if a next hop has an address family without a listener."""
        cdef bint has4 = self.link_mtu4 != 0, has6 = self.link_mtu6 != 0
        cdef size_t index = table.find_unreachable(has4, has6)
        if index < table.routes().n:
            route = table.route_at(index)
            family = "IPv4" if has4 else "IPv6"
            raise FieldError("via", str(route.via),
                             f"an {family} address, because all listeners are {family}",
                             f"route {route.dst}")

    def prepare(self, RouteTable table):
        """Build the snapshot of a table and return it as a PreparedSnapshot. This can take long.

        No other table may be prepared before the result is activated or deleted. The table must
        not change after this call. Raise FieldError as ``check`` does, or MemoryError.
        """
        cdef PreparedSnapshot prepared
        cdef const route_vec_t* routes = table.routes()
        self.check(table)
        if self.preparing:
            raise RuntimeError("another table is being prepared")
        self.preparing = True
        prepared = PreparedSnapshot(self, table)
        with nogil:
            prepared.snapshot = build_snapshot(
                self.shared.snapshot, routes.items, routes.n, self.generation + 1,
                self.link_mtu4, self.link_mtu6, self.shared.workers_n,
            )
        if prepared.snapshot == NULL:
            self.preparing = False
            raise MemoryError
        return prepared

    def activate(self, PreparedSnapshot prepared):
        """Replace the active snapshot. This takes microseconds and does not wait for the workers.

        A worker uses the new snapshot from its next turn.
        """
        cdef snapshot_t* new = prepared.snapshot
        cdef bytes packed
        if new == NULL or new.generation != self.generation + 1:
            raise ValueError("the snapshot was built for another generation of the table")
        if addr_map_init(&new.own, len(self.own) + 1) < 0:
            raise MemoryError
        for packed in self.own:
            addr_map_put(&new.own, <const uint8_t*>packed, len(packed))
        prepared.snapshot = NULL
        self.preparing = False
        self.generation += 1
        self.table = prepared.table
        with nogil:
            self.retired = activate_snapshot(&self.shared.snapshot, new, self.retired)
        self.collect()

    cdef discard(self, snapshot_t* snapshot):
        """Free a prepared snapshot that will not be activated."""
        discard_snapshot(snapshot, self.shared.snapshot)
        self.preparing = False

    def publish(self, RouteTable table):
        """Prepare and activate a table in one call. Use it only for a small table."""
        self.activate(self.prepare(table))

    def collect(self):
        """Free the retired objects that no worker can see. The caller must do this regularly."""
        cdef uint32_t n = <uint32_t>len(self.objects)
        with nogil:
            self.retired = reclaim(
                self.retired, oldest_generation(self.workers, n), self.shared.workers_n, &self.gone
            )
            self.free_captures(n)

    cdef void free_captures(self, uint32_t workers_n) noexcept nogil:
        """Free the ended captures that no worker can use."""
        cdef int i
        for i in range(CAPTURES_N):
            if self.ended[i] and capture_is_unused(self.workers, workers_n, self.ended[i]):
                capture_free(self.shared.captures.items[i])
                self.shared.captures.items[i] = NULL
                self.ended[i] = 0

    def start_capture(self, filter):
        """Start a capture of the packets that match a model.CaptureFilter, and return it.

        Return None if CAPTURES_N captures run already. Raise MemoryError.
        """
        cdef uint32_t slot
        cdef capture_t* capture
        self.collect()
        for slot in range(CAPTURES_N):
            if self.shared.captures.items[slot] == NULL:
                break
        else:
            return None
        capture = new_capture(filter, self.shared.workers_n)
        self.shared.captures.items[slot] = capture
        switch_capture(&self.shared.captures, slot, True)
        return Capture(self, slot)

    cdef end_capture(self, uint32_t slot):
        switch_capture(&self.shared.captures, slot, False)
        self.ended[slot] = self.shared.captures.word
        self.collect()

    def set_own_addresses(self, addresses):
        """Set the packed inner source addresses that are refused on receive.

        The TUN's addresses are always added. The new set applies from the next ``activate`` on.
        Return whether the set has changed.
        """
        cdef set packed = set(addresses)
        if self.shared.has_addr4:
            packed.add(PyBytes_FromStringAndSize(<char*>self.shared.tun_addr4, 4))
        if self.shared.has_addr6:
            packed.add(PyBytes_FromStringAndSize(<char*>self.shared.tun_addr6, 16))
        changed = packed != set(self.own)
        self.own = sorted(packed)
        return changed

    # Reading

    def peers(self):
        """Return a model.Peer for each peer, in the order of their ordinals."""
        cdef snapshot_t* s = self.shared.snapshot
        cdef list found = [None] * s.peers_n
        cdef peer_counters_t total
        cdef uint64_t now = now_ns()
        cdef uint32_t slot = 0
        cdef peer_t* peer = next_peer(s, &slot, NULL)
        while peer != NULL:
            memset(&total, 0, sizeof(total))
            add_counters(&total, peer, self.shared.workers_n)
            seen = None
            if total.last_seen_ns:
                seen = max(0.0, (<double>now - <double>total.last_seen_ns) / 1e9)
            found[peer.ordinal] = Peer(
                address=packed_address(peer), port=peer.port,
                path_mtu=peek32(&peer.path_mtu),
                encap_packets=total.encap_packets, encap_bytes=total.encap_bytes,
                decap_packets=total.decap_packets, decap_bytes=total.decap_bytes, last_seen=seen,
                probe=peer.probe != 0, last_rx_ns=total.last_seen_ns,
                path_mtu_ns=peek64(&peer.path_mtu_ns),
                df_mtu=peek32(&peer.df_mtu),
                errors_n=errors_n(peer, self.shared.workers_n),
                last_error=last_error(peer, self.shared.workers_n),
            )
            peer = next_peer(s, &slot, peer)
        return found

    def peers_n(self):
        """Return the number of peers."""
        return self.shared.snapshot.peers_n

    def hop_ordinals(self, size_t start, size_t count):
        """Return the ordinals of the peers of up to ``count`` routes from index ``start`` on."""
        cdef snapshot_t* s = self.shared.snapshot
        cdef size_t i
        return [s.hops[i].peer.ordinal for i in range(start, min(start + count, s.hops_n))]

    def trace(self, bytes address):
        """Return (model.Route, largest inner packet) for a packed address; None: no route."""
        cdef snapshot_t* s = self.shared.snapshot
        cdef hop_t* hop = find_hop(s, <const uint8_t*>address, len(address))
        if hop == NULL:
            return None
        return self.table.route_at(hop - s.hops), packet_limit(hop, 4 if len(address) == 4 else 6)

    # Path MTUs

    def needs_icmp6(self):
        """Return whether the kernel needs the path MTU in ICMPv6 errors.

        It does if an IPv6 peer answers no probes, or if the kernel has to fragment datagrams to
        any IPv6 peer.
        """
        cdef snapshot_t* s = self.shared.snapshot
        cdef uint32_t slot = 0
        cdef peer_t* peer
        with nogil:
            peer = next_peer(s, &slot, NULL)
            while peer != NULL and (
                peer.addr_len == 4
                or (peer.probe and peek32(&peer.path_mtu) >= MIN_MTU6 + peer.overhead)
            ):
                peer = next_peer(s, &slot, peer)
        return peer != NULL

    def take_mtu_hints(self):
        """Return the path MTUs that were reported since the last call.

        The result is [(packed address, port, whether this host's device reported it, path MTU)].
        The path MTU is 0 if an ICMP error contained none.
        """
        cdef snapshot_t* s = self.shared.snapshot
        cdef uint64_t hint
        cdef uint32_t slot = 0
        cdef peer_t* peer = next_peer(s, &slot, NULL)
        cdef list hints = []
        while peer != NULL:
            if load_flag(&peer.hint):
                hint = take_bits(&peer.hint)
                hints.append((
                    packed_address(peer), peer.port, bool(hint & HINT_DEVICE), hint & HINT_MTU
                ))
            peer = next_peer(s, &slot, peer)
        return hints

    def set_path_mtu(self, bytes address, uint16_t port, uint32_t path_mtu, uint32_t df_mtu):
        """Set the path MTU of a peer, at most the link MTU. Do nothing if the peer is gone.

        df_mtu  size of the largest datagram that is sent with DF; 0: all are sent with DF
        """
        cdef peer_t* peer = self.find(address, port)
        if peer != NULL:
            path_mtu = min(path_mtu, peer.link_mtu)
            df_mtu = min(df_mtu, path_mtu) if df_mtu != 0 else path_mtu
            poke32(&peer.path_mtu, path_mtu)
            poke32(&peer.df_mtu, df_mtu)
            if df_mtu == peer.link_mtu:
                poke64(&peer.path_mtu_ns, 0)
            elif peek64(&peer.path_mtu_ns) == 0:
                poke64(&peer.path_mtu_ns, now_ns())

    def set_link_mtus(self, uint32_t mtu4, uint32_t mtu6):
        """Set the largest outer packet of the underlay, as in the constructor. A path MTU that was
        limited by the link only follows it. Return whether anything has changed.

        No table may be prepared at the same time.
        """
        cdef snapshot_t* s = self.shared.snapshot
        cdef uint32_t slot = 0, mtu, former
        cdef peer_t* peer = next_peer(s, &slot, NULL)
        if (mtu4, mtu6) == (self.link_mtu4, self.link_mtu6):
            return False
        if self.preparing:
            raise RuntimeError("a table is being prepared")
        self.link_mtu4, self.link_mtu6 = mtu4, mtu6
        while peer != NULL:
            mtu = mtu4 if peer.addr_len == 4 else mtu6
            former, peer.link_mtu = peer.link_mtu, mtu
            if peek32(&peer.df_mtu) == former or peek32(&peer.path_mtu) > mtu:
                poke32(&peer.path_mtu, mtu)
                poke32(&peer.df_mtu, mtu)
            if peek32(&peer.df_mtu) == mtu:
                poke64(&peer.path_mtu_ns, 0)
            elif peek64(&peer.path_mtu_ns) == 0:
                poke64(&peer.path_mtu_ns, now_ns())
            peer = next_peer(s, &slot, peer)
        return True

    def close_spares(self):
        """Close the sockets that copy the address and the options of the workers' sockets. Call
        this after a change of either. They are opened again when they are needed."""
        close_spare(&self.spare4)
        close_spare(&self.spare6)

    def path_mtu_changes(self):
        """Return [(packed address, port, path MTU)] of the peers whose path MTU has changed since
        the last call."""
        cdef snapshot_t* s = self.shared.snapshot
        cdef uint32_t slot = 0, path_mtu
        cdef peer_t* peer = next_peer(s, &slot, NULL)
        cdef list changes = []
        while peer != NULL:
            path_mtu = peek32(&peer.path_mtu)
            if path_mtu != peer.reported_mtu:
                peer.reported_mtu = path_mtu
                changes.append((packed_address(peer), peer.port, path_mtu))
            peer = next_peer(s, &slot, peer)
        return changes

    # Probes

    def send_probe(self, bytes address, uint16_t port, uint64_t token, uint32_t size,
                   uint32_t heard_ms):
        """Send a request from the socket of the address's family. Return 0, or the errno with which
        the kernel refused it. ``take_probes`` returns the reply when it has arrived.

        token     any number but 0
        size      bytes of the message, PROBE_LEN..MAX_UDP_PAYLOAD
        heard_ms  milliseconds since the last probe from this peer arrived; 2**32 - 1 = none yet
        """
        cdef probe_t probe
        cdef sockaddr_in6 to
        cdef uint32_t to_len
        cdef uint8_t* message
        cdef int sender = -1, receiver = -1, error
        cdef worker_t* w
        cdef spare_t* spare
        if len(address) not in (4, 16):
            raise ValueError(f"an address of {len(address)} bytes")
        if not PROBE_LEN <= size <= MAX_UDP_PAYLOAD:
            raise ValueError(
                f"a probe of {size} bytes: expected {PROBE_LEN} to {MAX_UDP_PAYLOAD}")
        if self.objects:
            w = self.workers[0]
            sender = w.sender4 if len(address) == 4 else w.sender6
            receiver = w.udp_fd4 if len(address) == 4 else w.udp_fd6
        if sender < 0:
            return EAFNOSUPPORT
        message = <uint8_t*>malloc(size)
        if message == NULL:
            raise MemoryError
        probe.kind, probe.size, probe.token, probe.heard_ms = PROBE_REQUEST, size, token, heard_ms
        build_probe(message, &probe)
        to_len = set_sockaddr(&to, <const uint8_t*>address, len(address), port)
        spare = &self.spare4 if len(address) == 4 else &self.spare6
        add_token(&self.shared.tokens, token)
        error = send_with_spare(sender, receiver, spare, message, size, &to, to_len)
        free(message)
        count_sent(&self.sent, error)
        if error not in (0, EAGAIN, ECONNREFUSED, EMSGSIZE):
            self.keep_refusal(address, port, error)
        return error

    cdef void keep_refusal(self, bytes address, uint16_t port, int error):
        cdef peer_t* peer = self.find(address, port)
        if peer != NULL:
            record_refusal(&peer.errors[self.shared.workers_n], error, now_ns())
            self.sends_refused += 1
            self.refusals[error if 0 < error < ERRNOS else 0] += 1

    def take_probes(self):
        """Return a model.ProbeRecord for each probe that has arrived since the last call.

        Call this at regular intervals. A worker has space for PROBE_RING records. It counts the
        probes without a record (path/probe.pxd) in ``probes_lost``. A worker raises the event
        "probe" when a quarter of the space is used, and for each record after
        ``wake_on_probe(True)``.
        """
        cdef Worker worker
        found = []
        for worker in self.objects:
            found += worker.take_probes()
        return found

    def wake_on_probe(self, bint wake):
        """Set whether a worker wakes the control side for each probe. The initial value is False.
        """
        store_flag(&self.shared.wake_on_probe, wake)

    def probe_peers(self, uint32_t mtu):
        """Return {(packed address, port): largest inner packet} of the peers that answer probes.

        The largest packet is the smallest of ``mtu`` (the MTU of the TUN), the largest MTU of the
        routes to the peer, and what the link to the peer can carry.
        """
        cdef snapshot_t* s = self.shared.snapshot
        cdef uint32_t limit, slot = 0
        cdef size_t i
        cdef hop_t* hop
        cdef peer_t* peer
        with nogil:
            for i in range(s.hops_n):
                s.hops[i].peer.probe_mtu = 0
            for i in range(s.hops_n):
                hop = &s.hops[i]
                limit = min(mtu, hop.peer.link_mtu - hop.peer.overhead)
                limit = hop.mtu if 0 < hop.mtu < limit else limit
                hop.peer.probe_mtu = max(hop.peer.probe_mtu, limit)
        found = {}
        peer = next_peer(s, &slot, NULL)
        while peer != NULL:
            if peer.probe:
                found[packed_address(peer), peer.port] = peer.probe_mtu
            peer = next_peer(s, &slot, peer)
        return found

    def take_traffic(self):
        """Return (packed address, port, whether packets arrived) of the peers with traffic.

        Only peers that answer probes are listed, and only traffic since the last call counts. The
        counters of all peers are compared without the GIL, so idle peers cost little.
        """
        cdef snapshot_t* s = self.shared.snapshot
        cdef uint64_t sent, received
        cdef uint32_t slot = 0, k, workers_n = self.shared.workers_n
        cdef peer_t* peer
        cdef bint moved
        cdef list found = []
        with nogil:
            peer = next_peer(s, &slot, NULL)
            while peer != NULL:
                if peer.probe:
                    sent = received = 0
                    for k in range(workers_n + 2):
                        sent += peer.counters[k].encap_packets
                        received += peer.counters[k].decap_packets
                    moved = received != peer.taken_received
                    if moved or sent != peer.taken_sent:
                        peer.taken_sent, peer.taken_received = sent, received
                        with gil:
                            found.append((packed_address(peer), peer.port, moved))
                peer = next_peer(s, &slot, peer)
        return found

    # The express path

    @property
    def snapshot_generation(self):
        """The generation of the active snapshot."""
        return self.generation

    def express_peers(self):
        """Return {(packed address, port): largest inner packet} of the peers that can receive in
        the kernel. Larger packets need fragments, or an ICMP error."""
        cdef snapshot_t* s = self.shared.snapshot
        cdef uint32_t slot = 0
        cdef peer_t* peer = next_peer(s, &slot, NULL)
        found = {}
        while peer != NULL:
            if peer.express:
                found[packed_address(peer), peer.port] = min(
                    peek32(&peer.path_mtu), peek32(&peer.df_mtu)) - peer.overhead
            peer = next_peer(s, &slot, peer)
        return found

    def set_tun_mtu(self, uint32_t mtu):
        """Set the MTU of the TUN in bytes. Longer TCP packets from the kernel of a peer are
        super-packets: the workers cut them. Until the first call, no packet is longer."""
        poke32(&self.shared.tun_mtu, mtu)

    def expect_unfinished(self):
        """Accept unfinished checksums and super-packets of all senders, not only of the peers that
        can receive in the kernel. Call it before a worker runs."""
        self.shared.all_express = True

    def has_peer(self, bytes address, uint16_t port):
        """Return whether a route has this endpoint. address: packed"""
        return self.find(address, port) != NULL

    def set_express(self, bytes keys, bytes values, uint32_t cpus_n, tuple packets):
        """Set what the express path has counted so far.

        keys     the endpoints of peers, as in the map "counters" (src_ext/express/maps.h)
        values   of each of them its counters on each CPU, as there
        packets  (sent, received, dropped while sending, dropped while receiving)

        Returns the places in ``keys`` of the endpoints that no route has.
        """
        cdef const endpoint_t* key = <const endpoint_t*><const uint8_t*>keys
        cdef const express_counters_t* value = \
            <const express_counters_t*><const uint8_t*>values
        cdef Py_ssize_t i, n = len(keys) // <Py_ssize_t>sizeof(endpoint_t)
        cdef express_counters_t total
        cdef peer_counters_t* c
        cdef peer_t* peer
        if len(values) != n * cpus_n * <Py_ssize_t>sizeof(express_counters_t):
            raise ValueError("values: not the counters of these endpoints")
        absent = []
        for i in range(n):
            peer = self.find_at(key[i].addr, 4 if key[i].family == 4 else 16, key[i].port)
            if peer == NULL:
                absent.append(i)
                continue
            total = summed(&value[i * cpus_n], cpus_n)
            c = &peer.counters[self.shared.workers_n + 1]
            c.encap_packets, c.encap_bytes = total.sent_packets, total.sent_bytes
            c.decap_packets, c.decap_bytes = total.received_packets, total.received_bytes
            c.last_seen_ns = total.last_seen_ns
        self.express_packets = packets
        return absent

    # Counters

    def inherit_peers(self, peers):
        """Start the counters and errors of these peers with the values of an earlier process.
        peers  model.Peer objects; of a peer that has no route, only the sums are kept

        Call this once. ``inherit_path_mtus`` sets the path MTUs.
        """
        cdef peer_t* peer
        cdef peer_counters_t* c
        cdef uint32_t last = self.shared.workers_n  # the record of the control side
        for earlier in peers:
            peer = self.find(earlier.address, earlier.port)
            c = &self.gone if peer == NULL else &peer.counters[last]
            c.encap_packets += earlier.encap_packets
            c.encap_bytes += earlier.encap_bytes
            c.decap_packets += earlier.decap_packets
            c.decap_bytes += earlier.decap_bytes
            if peer == NULL:
                continue
            c.last_seen_ns = earlier.last_rx_ns
            # so that take_traffic reports only new packets
            peer.taken_sent += earlier.encap_packets
            peer.taken_received += earlier.decap_packets
            self.inherit_errors(peer, earlier)

    def inherit_path_mtus(self, peers):
        """Use the path MTUs of these peers (model.Peer) until they are measured again."""
        cdef peer_t* peer
        for earlier in peers:
            peer = self.find(earlier.address, earlier.port)
            if peer != NULL and earlier.path_mtu_ns:
                self.set_path_mtu(earlier.address, earlier.port, earlier.path_mtu, earlier.df_mtu)
                peer.reported_mtu = peek32(&peer.path_mtu)
                poke64(&peer.path_mtu_ns, earlier.path_mtu_ns)

    cdef peer_t* find(self, bytes address, uint16_t port):
        """Return the peer with exactly this endpoint, or NULL."""
        return self.find_at(<const uint8_t*>address, len(address), port)

    cdef peer_t* find_at(self, const uint8_t* address, size_t length, uint16_t port):
        cdef peer_t* peer = first_peer_at(self.shared.snapshot, address, length)
        while peer != NULL and peer.port != port:
            peer = peer.same_addr
        return peer

    cdef inherit_errors(self, peer_t* peer, earlier):
        cdef peer_errors_t* record = &peer.errors[self.shared.workers_n]
        cdef bytes reporter
        record.n += earlier.errors_n
        if earlier.last_error is None or record.last.time_ns > earlier.last_error.time_ns:
            return
        reporter = earlier.last_error.reporter
        memset(&record.last, 0, sizeof(record.last))
        record.last.error = earlier.last_error.errno
        record.last.origin = ORIGIN_NUMBERS.get(earlier.last_error.origin, 0)
        record.last.kind, record.last.code = earlier.last_error.type, earlier.last_error.code
        record.last.reporter_len = len(reporter)
        memcpy(record.last.reporter, <const uint8_t*>reporter, len(reporter))
        record.last.time_ns = earlier.last_error.time_ns

    def inherit(self, dict packets, list drops, dict errors):
        """Add the results of ``packets``, ``drops`` and ``peer_errors`` of an earlier process.

        A drop reason that this version does not know keeps its row, so that the rows still add up
        to the number of dropped packets.
        """
        self.inherited = {
            "packets": packets, "errors": errors,
            "drops": {(reason, direction): n for reason, direction, n in drops if n},
        }

    def packets(self):
        """Return the packet counters of each direction, summed over all threads.

        The result is {direction: {read, generated, delivered, consumed, dropped, queued}}. In each
        direction, read + generated = delivered + consumed + dropped + queued.
        """
        cdef Worker worker
        cdef direction_t none
        memset(&none, 0, sizeof(none))
        total = {ENCAP: packets_of(&self.sent, 0), DECAP: packets_of(&none, 0)}
        for direction, delivered, dropped in zip(
                total, self.express_packets[:2], self.express_packets[2:]):
            total[direction]["read"] += delivered + dropped
            total[direction]["delivered"] += delivered
            total[direction]["dropped"] += dropped
        for worker in self.objects:
            for direction, packets in worker.packets().items():
                for name, n in packets.items():
                    total[direction][name] += n
        for direction, packets in self.inherited.get("packets", {}).items():
            for name, n in packets.items():
                total[direction][name] += n
        return total

    def peer_errors(self):
        """Return the number of errors that were kept for peers: {"icmp", "send"}."""
        cdef Worker worker
        total = {"icmp": 0, "send": self.sends_refused}
        for worker in self.objects:
            total["icmp"] += worker.w.icmp_received
            total["send"] += worker.w.sends_refused
        for name, n in self.inherited.get("errors", {}).items():
            total[name] += n
        return total

    def send_errors(self):
        """Return {errno: number} of the sends that the kernel refused; 0: an unknown errno."""
        cdef Worker worker
        cdef uint32_t i
        total = {i: self.refusals[i] for i in range(ERRNOS) if self.refusals[i]}
        for worker in self.objects:
            for i in range(ERRNOS):
                if worker.w.refusals[i]:
                    total[i] = total.get(i, 0) + worker.w.refusals[i]
        return total

    def transferred(self):
        """Return {direction: {packets, bytes}} of all peers together, also of those that have left.

        The counters are those of ``peers``. They never decrease.
        """
        cdef peer_counters_t total = self.gone
        cdef snapshot_t* s = self.shared.snapshot
        cdef uint32_t slot = 0
        cdef peer_t* peer = next_peer(s, &slot, NULL)
        cdef retired_t* item = self.retired
        with nogil:
            while peer != NULL:
                add_counters(&total, peer, self.shared.workers_n)
                peer = next_peer(s, &slot, peer)
            while item != NULL:
                if item.peer != NULL:
                    add_counters(&total, item.peer, self.shared.workers_n)
                item = item.next
        return {
            ENCAP: {"packets": total.encap_packets, "bytes": total.encap_bytes},
            DECAP: {"packets": total.decap_packets, "bytes": total.decap_bytes},
        }

    def inherit_gone(self, dict gone):
        """Add what an earlier process has counted of peers that had left: a part of its
        ``transferred``."""
        self.gone.encap_packets += gone[ENCAP]["packets"]
        self.gone.encap_bytes += gone[ENCAP]["bytes"]
        self.gone.decap_packets += gone[DECAP]["packets"]
        self.gone.decap_bytes += gone[DECAP]["bytes"]

    def refused_senders(self):
        """Return a model.RefusedSender for the last few refused senders, the newest first."""
        cdef Worker worker
        found = []
        for worker in self.objects:
            found += worker.refused_senders()
        return sorted(found, key=lambda sender: sender.last_ns, reverse=True)

    def last_dropped(self):
        """Return {(reason, direction): [model.DroppedPacket, ...]}, the oldest first. Reasons
        without a record are left out."""
        cdef Worker worker
        cdef int i
        found = {}
        for i, reason in enumerate(DROP_REASONS, start=1):
            for direction in reason.directions:
                last = []
                for worker in self.objects:
                    last += worker.last_dropped(i, direction)
                if last:
                    found[reason.name, direction] = sorted(last, key=lambda one: one.time_ns)
        return found

    def drops(self):
        """Return (reason, direction, packets) rows: one for each direction of each drop reason."""
        cdef Worker worker
        cdef int i
        cdef dict before = dict(self.inherited.get("drops", {}))
        rows = []
        for i, reason in enumerate(DROP_REASONS, start=1):
            for direction in reason.directions:
                n = self.sent.drops[i] if direction == ENCAP else 0
                if reason.name == EXPRESS_DROPS[direction]:
                    n += self.express_packets[2 if direction == ENCAP else 3]
                for worker in self.objects:
                    n += worker.dropped(i, direction)
                rows.append((reason.name, direction, n + before.pop((reason.name, direction), 0)))
        rows += [(reason, direction, n) for (reason, direction), n in before.items()]
        return rows


@cython.no_gc_clear  # __dealloc__ uses self.core, so the garbage collector must not clear it
cdef class PreparedSnapshot:
    """A snapshot that is built but not yet active."""
    cdef Core core
    cdef RouteTable table
    cdef snapshot_t* snapshot

    def __cinit__(self, Core core, RouteTable table):
        self.core, self.table = core, table

    @property
    def generation(self):
        return self.snapshot.generation

    def express_entries(self):
        """Return the keys and the values of the express path's table, in the layout of
        src_ext/express/maps.h: routes, own addresses, prefixes to deliver to.

        Both are empty if no peer can receive in the kernel. This can take long; it does not hold
        the GIL most of the time.
        """
        cdef const route_vec_t* routes = self.table.routes()
        cdef shared_t* shared = &self.core.shared
        cdef size_t n = routes.n
        cdef size_t total = n + len(self.core.own) + shared.own_nets_n
        cdef prefix_t* keys
        cdef entry_t* entries
        cdef uint32_t i, length
        cdef bytes packed, key_bytes, values
        if not any_express(routes):
            return b"", b""
        key_bytes = PyBytes_FromStringAndSize(NULL, total * sizeof(prefix_t))
        values = bytes(total * sizeof(entry_t))
        keys = <prefix_t*><char*>key_bytes
        entries = <entry_t*><char*>values
        with nogil:
            route_entries(routes, self.snapshot.hops, keys, entries)
        for packed in self.core.own:
            set_prefix(&keys[n], KIND_OWN, <const uint8_t*>packed, 4 if len(packed) == 4 else 6,
                       8 * len(packed))
            n += 1
        for i in range(shared.own_nets_n):
            length = int.from_bytes(shared.own_nets[i].mask[:16], "big").bit_count()
            set_prefix(&keys[n], KIND_ADMIT, shared.own_nets[i].addr,
                       4 if shared.own_nets[i].addr_len == 4 else 6, length)
            n += 1
        return key_bytes, values

    def __dealloc__(self):
        if self.snapshot != NULL:
            self.core.discard(self.snapshot)
