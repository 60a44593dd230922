"""The express path: programs in the kernel that carry packets instead of the workers.

Owns the programs, their maps, the decision which peers use them, and their counters.
src_ext/express/ has the programs; docs/datapath.md describes both paths. The table of the programs
is built from the same snapshot as that of the workers, and is activated together with it. What the
programs do not take is left to the workers, so every failure here only makes packets slower.
Threading: control loop only. Exception: any thread may call ``build``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
import struct
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import _core
from ..device import bpf
from ..drops import DECAP, ENCAP
from ..errors import DeviceError, UdptunError
from ..model import NO_EXPRESS_PEER, NO_EXPRESS_WORD, OVERHEAD, IPAddress, Peer
from ..net import ethtool, hooks, xfrm
from ..net.batch import RouteSocket
from ..net.changes import Change, Kind
from ..net.hooks import Hook
from ..net.local import underlay_mtu
from ..net.lookup import Question, Way, ask_ways, device_name
from ..net.netlink import Netlink
from ..takeover.document import CountersDocument, express_peers_of, peer_from_json
from ..wait import wait_at_most
from .config import ForwarderConfig

log = logging.getLogger(__name__)

OBJECT = Path(__file__).parent / "express.bpf.o"
PROGRAMS = {name: f"tc/{name}" for name in hooks.PROGRAMS}  # their sections
STARTING = "starting"
NO_RIGHT = "this process may not load programs: it needs CAP_BPF and the system call bpf (EPERM)"
LOOK_SECONDS = 10.0
BEAT_SECONDS = 1.0  # time between two signs of life. src_ext/express/express.bpf.c has DEAD_NS
PAUSE_SECONDS = 0.05  # between two looks at the host

# The layouts of src_ext/express/maps.h
SETTINGS = struct.Struct("=I4s16sHHIIIIIQ")
ENDPOINT = struct.Struct("=16sHBx")
PEER = struct.Struct("=IHH")
COUNTERS = struct.Struct("=5Q")
KEY_BYTES, ENTRY_BYTES = 24, 24
FLOW_BYTES, FLOW_STATE_BYTES = 16, 32
PEERS_MAX, FLOWS_MAX = 16384, 65536
ZERO = struct.pack("=I", 0)
# enum total
TOTALS = (
    "sent", "received", "send_dropped", "receive_dropped", "send_other", "send_no_route",
    "send_hop_limit", "send_size", "send_peer", "send_flow", "send_refused", "receive_other",
    "receive_source", "receive_destination", "receive_hop_limit", "receive_refused",
    "receive_ecn", "receive_marked",
)

# The maps with the counters, by the name that their descriptor has in a take-over. A newer version
# may only append to the values: so a map of another version has another size, and is not used.
MAPS = {
    "express-counters": (bpf.PERCPU_HASH, ENDPOINT.size, COUNTERS.size, PEERS_MAX),
    "express-totals": (bpf.PERCPU_ARRAY, 4, 8 * len(TOTALS), 1),
}
# Drivers of links between guests of one host. These links pass super-packets to the peer whole.
PASSING_DRIVERS = frozenset({"veth", "virtio_net"})
SUPER_PACKETS = frozenset(
    {"tx-generic-segmentation", "tx-tcp-segmentation", "tx-udp_tnl-segmentation"})
# addresses for documentation: only a default route covers them
FAR = {4: "192.0.2.1", 6: "2001:db8::1"}
CONCERN_US = (Kind.LINK, Kind.ADDRESS, Kind.ROUTE, Kind.RULE, Kind.ANY)

Key = tuple[bytes, int]  # packed address and port of a peer
Counted = tuple[int, ...]  # sent packets and bytes, received packets and bytes
NOTHING: Counted = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Table:
    """A table for the programs that is not active yet."""

    map: bpf.Map
    generation: int


@dataclass(frozen=True)
class Counts:
    """What the map "counters" had: the endpoints, and the values of each on all CPUs."""

    keys: bytes = b""
    values: bytes = b""

    @cached_property
    def _places(self) -> dict[bytes, int]:
        size = ENDPOINT.size
        return {self.keys[at : at + size]: at // size for at in range(0, len(self.keys), size)}

    def of(self, endpoint: bytes) -> Counted:
        """Return the counters of an endpoint, summed over the CPUs."""
        place = self._places.get(endpoint)
        if place is None:
            return NOTHING
        size = len(self.values) // len(self._places)
        return _summed(self.values[place * size :][:size])


@dataclass(slots=True)
class Facts:
    """What one look at the host has found.

    ways      the kernel's route to each peer
    reasons   why a peer cannot use the express path
    devices   underlay devices on which packets can be received
    arrivals  underlay devices that have our addresses: most packets arrive there
    mtus      MTU of each underlay device
    slow_bulk  devices on which the workers send bulk faster
    error     why no packet can be taken; "" if packets can be taken
    """

    ways: dict[Key, Way] = field(default_factory=dict)
    reasons: dict[Key, str] = field(default_factory=dict)
    devices: set[int] = field(default_factory=set)
    arrivals: set[int] = field(default_factory=set)
    mtus: dict[int, int] = field(default_factory=dict)
    slow_bulk: set[int] = field(default_factory=set)
    tun: int = 0
    error: str = ""


class Express:
    """The express path of one forwarder.

    tun   name of the TUN
    maps  descriptors of the maps of the forwarder from which this one takes over, by the names in
          MAPS. This object owns them
    Call ``close`` at the end, also if the path is off.
    """

    def __init__(
        self, config: ForwarderConfig, tun: str, core: _core.Core,
        maps: Mapping[str, int] | None = None,
    ) -> None:
        self._config = config
        self._tun = tun
        self._core = core
        self._maps: dict[str, bpf.Map] = {}
        self._programs: dict[str, int] = {}
        self._active: Table | None = None
        self._peers: dict[Key, bytes] = {}  # as in the map
        self._facts = Facts(error=STARTING)
        self._attached_to: set[int] = set()  # devices with our receive program, says the kernel
        self._emptied: set[int] = set()  # devices that have our qdisc, and no filter of ours
        self._netlink: Netlink | None = None
        self._changed = asyncio.Event()
        self._counted: set[Key] = set()  # peers that have counters
        self._cpus_n = bpf.cpus_n()
        self._read = Counts()  # the last counts that the core has got
        self._read_totals = dict.fromkeys(TOTALS, 0)  # of the same moment
        # Of peers that have left the core meanwhile: the last counts that the core has got.
        self._left: dict[bytes, Counted] = {}
        # Totals of earlier forwarders: those in the maps that this one continues, and all others.
        self._given = dict.fromkeys(TOTALS, 0)
        self._before = dict.fromkeys(TOTALS, 0)
        self._stale = ""  # why the programs' table is not that of the snapshot
        self._known: set[Key] = set()  # peers that can receive in the kernel
        self._said = ""
        self._paused = False
        self._pauses = 0
        self.off = "" if config.accelerate == "auto" else "--accelerate off"
        self._shared = _adopt(maps or {})
        if self.off:
            self.release()
        else:
            # A peer may send in its kernel before we have its route: with unfinished checksums.
            core.expect_unfinished()
            try:
                self._open()
            except OSError as error:
                reason = f"{error.strerror or error}"
                if error.errno == errno.EPERM:
                    self._turn_off(NO_RIGHT)
                else:
                    self._turn_off(reason, error.errno)

    # -- start and stop ---------------------------------------------------------------------------

    def _open(self) -> None:
        """Create the maps and load the programs. Raises OSError."""
        programs = bpf.read_object(OBJECT)
        empty = bpf.Map("udptun_table", bpf.LPM_TRIE, KEY_BYTES, ENTRY_BYTES, 1)
        self._active = Table(empty, 0)
        self._maps = {
            "settings": bpf.Map("udptun_settings", bpf.ARRAY, 4, SETTINGS.size, 1),
            "tun": bpf.Map("udptun_tun", bpf.DEVMAP, 4, 4, 1),
            "table": bpf.Map("udptun_tables", bpf.ARRAY_OF_MAPS, 4, 4, 1, inner=empty),
            "peers": bpf.Map("udptun_peers", bpf.HASH, ENDPOINT.size, PEER.size, PEERS_MAX),
            "counters": self._shared.get("express-counters") or bpf.Map(
                "udptun_counters", *MAPS["express-counters"]),
            "totals": self._shared.get("express-totals") or bpf.Map(
                "udptun_totals", *MAPS["express-totals"]),
            "flows": bpf.Map(
                "udptun_flows", bpf.LRU_HASH, FLOW_BYTES, FLOW_STATE_BYTES, FLOWS_MAX),
        }
        self._maps["table"][ZERO] = struct.pack("=I", empty.fd)
        fds = {name: each.fd for name, each in self._maps.items()}
        for name, section in PROGRAMS.items():
            self._programs[name] = bpf.load_program(
                bpf.SCHED_CLS, programs[section].linked(fds), f"udptun_{name}")

    def _turn_off(self, reason: str, number: int | None = None) -> None:
        name = errno.errorcode.get(number or 0)
        self.off = f"{reason} ({name})" if name and name not in reason else reason
        log.info("the express path is off: %s", self.off)
        self.release()

    def release(self) -> None:
        """Close all descriptors. Programs at hooks stay there. Can be called again."""
        for fd in self._programs.values():
            os.close(fd)
        for each in (*self._maps.values(), *self._shared.values()):
            each.close()
        if self._active is not None:
            self._active.map.close()
        self._programs, self._maps, self._shared, self._active = {}, {}, {}, None

    async def follow(self, netlink: Netlink) -> None:
        """Attach the programs, and keep them and the peers as they should be, until cancelled."""
        self._netlink = netlink
        if self.off:  # an earlier forwarder may have left programs
            await self._stand_in(netlink)
            return
        loop = asyncio.get_running_loop()

        def on_changes(changes: frozenset[Change]) -> None:  # in the netlink thread
            if any(change.kind in CONCERN_US for change in changes):
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(self._changed.set)

        netlink.watch_changes(on_changes)
        with contextlib.ExitStack() as watching:
            for watch in (hooks.watch(), xfrm.watch()):
                if watch is not None:
                    watching.enter_context(watch)
                    loop.add_reader(watch, self._on_change, watch)
                    watching.callback(loop.remove_reader, watch)
            beat = loop.create_task(self._beat())
            watching.callback(beat.cancel)
            while not self.off:
                self._changed.clear()
                try:
                    await self._refresh(netlink)
                except (UdptunError, OSError) as error:
                    if self._facts.error == STARTING:
                        self._facts.error = str(error)
                    self._say(str(error))
                await asyncio.sleep(PAUSE_SECONDS)
                await wait_at_most(self._changed, LOOK_SECONDS)

    async def _beat(self) -> None:
        """Show the programs that this process runs, until cancelled."""
        while not self.off:
            with contextlib.suppress(OSError):
                self._write_settings(self._facts)
            await asyncio.sleep(BEAT_SECONDS)

    async def _stand_in(self, netlink: Netlink) -> None:
        """Remove the programs that an earlier forwarder has left.

        If this process may load none, and has taken over the TUN of a killed forwarder, they carry
        the packets of the routes until something changes: their table is that of the dead one.
        """
        async def remove_gone(_: Any) -> bool:
            with RouteSocket() as kernel:
                hooks.remove(kernel, "")
                return any(hook is Hook.EGRESS for _, hook, _ in hooks.attached(kernel, self._tun))

        self._changed.clear()
        if self.off == NO_RIGHT and await netlink.work(
                "looking for programs of the express path", remove_gone):
            self.off += ". The programs of the dead forwarder carry packets until a route changes"
            log.info("the express path: %s", self.off)
            await self._changed.wait()
            self.off = NO_RIGHT
        await self._remove(netlink)

    def _on_change(self, watch: socket.socket) -> None:
        with contextlib.suppress(OSError):  # none left, or messages were lost
            while watch.recv(1 << 16):
                pass
        self._changed.set()

    async def close(self, leave: bool) -> None:
        """Remove the programs from the hooks, or leave them because another forwarder goes on."""
        if self._netlink is not None and not leave:
            try:
                await self._remove(self._netlink)
            except (UdptunError, OSError) as error:
                log.warning("the programs of the express path are not removed: %s", error)
        self.release()

    async def _remove(self, netlink: Netlink) -> None:
        async def remove(_: Any) -> None:
            with RouteSocket() as kernel:
                hooks.remove(kernel, self._tun, self._emptied)

        await netlink.work("removing the programs of the express path", remove)

    def _say(self, problem: str) -> None:
        if problem != self._said:
            self._said = problem
            if problem:
                log.warning("the express path: %s", problem)

    # -- the table --------------------------------------------------------------------------------

    def build(self, prepared: _core.PreparedSnapshot) -> Table | None:
        """Build the programs' table for a snapshot. None: the express path is off."""
        if self.off:
            return None
        keys, entries = prepared.express_entries()
        try:
            table = bpf.Map(
                "udptun_table", bpf.LPM_TRIE, KEY_BYTES, ENTRY_BYTES,
                max(len(keys) // KEY_BYTES, 1))
        except OSError as error:
            log.warning("no table for the express path: %s", error)
            return None
        try:
            table.fill(keys, entries)
        except OSError as error:
            log.warning("the table of the express path cannot be filled: %s", error)
            table.close()
            return None
        return Table(table, prepared.generation)

    def activate(self, table: Table | None) -> None:
        """Let the programs use the table, together with the snapshot that has just become active.

        table  None: there is none. The programs then leave all packets to the workers.
        """
        self._changed.set()
        if self.off:
            return
        try:
            if table is None:
                raise OSError(errno.ENOMEM, "there is no memory for the table of the programs")
            self._maps["table"][ZERO] = struct.pack("=I", table.map.fd)
        except OSError as error:  # the old table disagrees with the snapshot, until the next one
            if table is not None:
                table.map.close()
            self._stale = error.strerror or str(error)
            self._set_peers({})
            return
        self._stale = ""
        former, self._active = self._active, table
        if former is not None:
            former.map.close()

    # -- the peers --------------------------------------------------------------------------------

    def check(self) -> None:
        """Look at the host and the peers again soon."""
        self._changed.set()

    def pause(self) -> None:
        """Leave all packets to the workers until ``go_on``. Call it before the endpoints change."""
        self._paused = True
        self._pauses += 1
        if self.off:
            self._changed.set()
        else:
            self._write_settings(self._facts)

    def go_on(self) -> None:
        """Let the programs take packets again, after a look at the host with the new endpoints."""
        self._paused = False
        self._changed.set()

    async def _refresh(self, netlink: Netlink) -> None:
        """Compare the hooks and the peers with what they should be, and change what differs."""
        pauses = self._pauses
        limits = self._core.express_peers()

        async def look(_: Any) -> Facts:
            with RouteSocket() as kernel:
                return self._look(kernel, limits)

        facts = await netlink.work("looking at the underlay for the express path", look)
        if self.off:
            return
        if self._paused or pauses != self._pauses:  # the look may be at the former endpoints
            self._changed.set()
            return
        self._use(facts)

        async def attach(_: Any) -> set[int]:
            with RouteSocket() as kernel:
                return self._attach(kernel, facts)

        try:
            self._attached_to = await netlink.work(
                "attaching the programs of the express path", attach)
        except (UdptunError, OSError) as error:
            # Some of the programs may still be attached. Without the others, they must not take
            # packets, so the settings turn all of them off.
            self._attached_to = set()
            self._use(replace(facts, error=str(error)))
            raise
        self._say(facts.error)

    def _use(self, facts: Facts) -> None:
        self._facts = facts
        if not self.off:
            self._maps["tun"][ZERO] = struct.pack("=I", facts.tun)
            self._write_settings(facts)
            self.update()

    @property
    def _error(self) -> str:
        """Why no packet can pass in the kernel; "": packets can."""
        return self.off or self._stale or self._facts.error

    @property
    def receives(self) -> bool | None:
        """Whether the kernel has the programs that receive what peers send to us. None: we have not
        asked it yet."""
        facts = self._facts
        if not self.off and facts.error == STARTING:
            return None
        return not self._error and bool(facts.arrivals) and \
            facts.arrivals <= self._attached_to

    def update(self) -> None:
        """Set the peers that use the express path, with their present path MTUs."""
        if self.off:
            return
        facts, limits = self._facts, self._core.express_peers()
        self._known = set(limits)
        wanted = {}
        if not self._error:
            for key, path_limit in limits.items():
                way = facts.ways.get(key)
                if way is None or key in facts.reasons:
                    continue
                # The kernel does not compare these packets with the MTU of the device.
                overhead = OVERHEAD[4 if len(key[0]) == 4 else 6]
                limit = min(path_limit, facts.mtus[way.device] - overhead, 0xFFFF)
                if limit <= 0:
                    continue
                wanted[key] = PEER.pack(way.device, limit, way.device in facts.slow_bulk)
        self._set_peers(wanted)
        self._forget_peers(limits.keys())

    def _forget_peers(self, keep: Collection[Key]) -> None:
        """Delete the counters of the peers that have left. What was counted after the last read
        goes to the sums of such peers."""
        for key in self._counted.difference(keep):
            if self._core.has_peer(*key):  # its counters go on if it gets `express` again
                continue
            endpoint = _endpoint(key)
            counted = _summed(self._maps["counters"][endpoint])
            read = self._left.get(endpoint) or self._read.of(endpoint)
            sent, sent_bytes, received, received_bytes = (
                now - before for now, before in zip(counted, read, strict=True))
            self._core.inherit_gone({
                ENCAP: {"packets": sent, "bytes": sent_bytes},
                DECAP: {"packets": received, "bytes": received_bytes}})
            del self._maps["counters"][endpoint]
            self._counted.discard(key)
            self._left[endpoint] = NOTHING  # if it comes back, its counters begin at zero

    def _set_peers(self, wanted: Mapping[Key, bytes]) -> None:
        peers, counters = self._maps["peers"], self._maps["counters"]
        for key in self._peers.keys() - wanted.keys():
            del peers[_endpoint(key)]
            del self._peers[key]
        for key, value in wanted.items():
            if self._peers.get(key) == value:
                continue
            try:
                if key not in self._counted:
                    with contextlib.suppress(FileExistsError):  # its counters are inherited
                        counters.add(_endpoint(key), bytes(COUNTERS.size))
                    self._counted.add(key)
                peers[_endpoint(key)] = value
            except OSError as error:
                self._facts.reasons[key] = f"the map of peers: {error.strerror}"
                continue
            self._peers[key] = value

    def _write_settings(self, facts: Facts) -> None:
        listen = {one.address.version: one for one in self._config.listen}
        four, six = listen.get(4), listen.get(6)
        works = not facts.error and not self._paused
        self._maps["settings"][ZERO] = SETTINGS.pack(
            0 if self._config.mark is None else self._config.mark.value,
            b"" if four is None else four.address.packed,
            b"" if six is None else six.address.packed,
            0 if four is None else four.port, 0 if six is None else six.port,
            self._config.admit == "own", works, works,
            (self._config.dscp or 0) << 2, 0xFC if self._config.dscp is None else 0,
            time.monotonic_ns())

    # -- in the netlink thread --------------------------------------------------------------------

    def _look(self, kernel: RouteSocket, limits: Mapping[Key, int]) -> Facts:
        facts = Facts()
        try:
            facts.tun = socket.if_nametoindex(self._tun)
        except OSError:
            facts.error = f"there is no device {self._tun}"
            return facts
        if other := hooks.others(kernel, facts.tun, Hook.EGRESS):
            facts.error = f"{other} is at the egress of {self._tun}"
            return facts
        keys = list(limits)
        mark = 0 if self._config.mark is None else self._config.mark.value
        peers = [ipaddress.ip_address(key[0]) for key in keys]
        ways = ask_ways(kernel, [
            Question(peer, self._own(peer), mark) for peer in peers])
        policies = xfrm.policies()
        devices = {
            index: _device_reason(kernel, index)
            for index in {way.device for way in ways if way.device}}
        gone = {}
        for address in (endpoint.address for endpoint in self._config.listen):
            towards = {way.device for peer, way in zip(peers, ways, strict=True)
                       if way.device and peer.version == address.version}
            try:
                facts.arrivals |= _arrivals(kernel, address, towards, mark)
            except (DeviceError, OSError):
                gone[address.version] = f"no interface has {address}"
        devices |= {index: _device_reason(kernel, index)
                    for index in facts.arrivals if index not in devices}
        for key, peer, way in zip(keys, peers, ways, strict=True):
            facts.ways[key] = way
            reason = gone.get(peer.version) or way.error or devices.get(
                way.device, "the host does not send packets to it")
            if not reason and any(one.covers(self._own(peer), peer) for one in policies):
                reason = "an IPsec policy applies"
            if reason:
                facts.reasons[key] = reason
        facts.devices = {index for index, reason in devices.items() if not reason}
        if not facts.arrivals & facts.devices:
            facts.error = next(
                iter([*gone.values(), *(devices[one] for one in facts.arrivals)]), "")
        facts.mtus = {index: hooks.ethernet_mtu(kernel, index) for index in facts.devices}
        facts.slow_bulk = {index for index in facts.devices if _bulk_is_slow(index)}
        return facts

    def _own(self, peer: IPAddress) -> IPAddress:
        return next(one.address for one in self._config.listen
                    if one.address.version == peer.version)

    def _attach(self, kernel: RouteSocket, facts: Facts) -> set[int]:
        """Attach what is missing, and detach the rest. Return the devices on which the kernel then
        has our receive program."""
        wanted: dict[tuple[int, Hook], str] = {}
        if not facts.error:
            # The programs are attached also while no peer uses them: when a clsact qdisc is added
            # or removed, the kernel drops what the device sends at this moment. So the qdisc does
            # not come and go with the peers.
            wanted[facts.tun, Hook.EGRESS] = "send"
            wanted |= {(index, Hook.INGRESS): "receive" for index in facts.devices}
        for device, hook, one in hooks.attached(kernel, self._tun):
            program = wanted.get((device, hook))
            if program is None or one.name != hooks.filter_name(program, self._tun):
                if hooks.detach(kernel, device, hook, one.name):
                    self._emptied.add(device)
            elif one.program == bpf.program_id(self._programs[program]):
                del wanted[device, hook]
        for (device, hook), program in wanted.items():
            hooks.attach(kernel, device, hook, hooks.filter_name(program, self._tun),
                         self._programs[program], ours=device in self._emptied)
            self._emptied.discard(device)
        return {device for device, hook, one in hooks.attached(kernel, self._tun)
                if hook is Hook.INGRESS
                and one.program == bpf.program_id(self._programs["receive"])}

    # -- reading ----------------------------------------------------------------------------------

    def read(self) -> None:
        """Give the core what the programs have counted so far."""
        if self.off:
            return
        counts, totals = self._counts(), self._totals()
        own = {name: n - self._given[name] for name, n in totals.items()}
        absent = self._core.set_express(counts.keys, counts.values, self._cpus_n, (
            own["sent"], own["received"], own["send_dropped"], own["receive_dropped"]))
        endpoints = [counts.keys[at * ENDPOINT.size :][: ENDPOINT.size] for at in absent]
        self._left = {
            one: self._left.get(one) or self._read.of(one) for one in endpoints}
        self._read, self._read_totals = counts, totals

    def _counts(self) -> Counts:
        """Read the counters of all peers, if possible with one call of bpf(2) for many."""
        if not self._counted:
            return Counts()
        counters = self._maps["counters"]
        try:
            return Counts(*counters.items())
        except OSError as error:
            if error.errno not in (errno.EINVAL, bpf.ENOTSUPP):  # before Linux 5.6
                raise
        keys = [*map(_endpoint, self._counted)]
        return Counts(b"".join(keys), b"".join(counters[key] for key in keys))

    def _totals(self) -> dict[str, int]:
        """Return what the map has."""
        if self.off:
            return dict.fromkeys(TOTALS, 0)
        return dict(zip(TOTALS, map(sum, self._maps["totals"].per_cpu(ZERO)), strict=True))

    def _sums(self) -> dict[str, int]:
        """Return the totals, with those of all forwarders from which this one has taken over."""
        return {name: n + self._before[name] for name, n in self._totals().items()}

    # -- a take-over ------------------------------------------------------------------------------

    def descriptors(self) -> dict[str, int]:
        """Return the descriptors of the maps with the counters, by the names in MAPS."""
        return {} if self.off else {name: self._maps[name.partition("-")[2]].fd for name in MAPS}

    def counted(self) -> dict[str, Any]:
        """Return the fields of CountersDocument for ``inherit``: what the core has got."""
        return {
            "express": self._read_totals, "express_before": self._before,
            "express_peers": {
                one.hex(): self._left.get(one) or self._read.of(one)
                for one in map(_endpoint, self._counted)},
        }

    def inherit(self, earlier: CountersDocument) -> None:
        """Continue the counters of the other forwarder, also those of the peers in the core.

        Its programs run on, and count in the maps until ours replace them. So the core must have
        only what the other forwarder has counted elsewhere: its last values of the maps are
        subtracted. Raises TakeOverError.
        """
        shared = bool(self._shared)
        totals = {name: earlier.express.get(name, 0) for name in TOTALS}
        self._given = totals if shared else self._given
        self._before = {
            name: earlier.express_before.get(name, 0) + (0 if shared else totals[name])
            for name in TOTALS}
        counted = express_peers_of(earlier) if shared else {}
        self._counted = {*map(_key, counted)}
        peers = []
        for peer in map(peer_from_json, earlier.peers):
            values = counted.pop(_endpoint((peer.address, peer.port)), NOTHING)
            peers.append(_without(peer, values))
        self._left = counted
        self._core.inherit_peers(peers)
        if shared:
            self.read()
            self._core.take_traffic()  # what is inherited is no new traffic

    def report(self) -> dict[str, Any]:
        """Return the state of the express path. docs/control.md describes it."""
        error = self._error
        if not error and not self._peers:
            error = next(iter(self._facts.reasons.values()), NO_EXPRESS_PEER)
        return {
            "mode": self._config.accelerate,
            "active": not error,
            "receives": self.receives,
            "reason": error or None,
            "generation": self._core.snapshot_generation,
            "kernel_generation": self._kernel_generation(),
            "devices": sorted(map(device_name, self._facts.devices)),
            "packets": self._sums(),
        }

    def counters(self) -> dict[str, Any]:
        """Return the counters for /metrics. Packets by direction; those that were left also by
        reason."""
        totals = self._sums()
        return {
            "active": bool(self._peers) and not self._error,
            "receives": bool(self.receives),
            "peers_n": len(self._peers),
            "packets": {
                ENCAP: {"passed": totals["sent"], "dropped": totals["send_dropped"]},
                DECAP: {"passed": totals["received"], "dropped": totals["receive_dropped"]}},
            "left": {direction: {
                name.removeprefix(prefix): n for name, n in totals.items()
                if name.startswith(prefix) and not name.endswith(("_dropped", "_marked"))
            } for direction, prefix in ((ENCAP, "send_"), (DECAP, "receive_"))},
            "marked": totals["receive_marked"],
        }

    def _kernel_generation(self) -> int | None:
        """Return the generation of the table that the programs use now."""
        if self.off or self._active is None:
            return None
        (number,) = struct.unpack("=I", self._maps["table"][ZERO])
        return self._active.generation if number == self._active.map.id() else None

    def report_peer(self, key: Key) -> dict[str, Any]:
        """Return whether a peer uses the express path, and why not."""
        if key in self._peers and not self.off:
            return {"active": True, "reason": None}
        reason = self.off or self._stale or self._facts.reasons.get(key) or self._facts.error
        if not self.off and (not reason or key not in self._known):
            reason = NO_EXPRESS_WORD
        return {"active": False, "reason": reason}


def _arrivals(
    kernel: RouteSocket, address: IPAddress, towards: set[int], mark: int
) -> set[int]:
    """Return the interfaces on which packets to our address arrive. Raises DeviceError, OSError.

    towards  those through which this host reaches the peers
    """
    name, _ = underlay_mtu(address)
    if name != "lo":
        return {socket.if_nametoindex(name)}
    if not towards:
        (way,) = ask_ways(kernel, [
            Question(ipaddress.ip_address(FAR[address.version]), address, mark)])
        towards = {way.device} - {0}
    return towards


def _summed(value: bytes) -> Counted:
    """Return the counters of a value of the map "counters", summed over the CPUs."""
    return tuple(map(sum, list(zip(*COUNTERS.iter_unpack(value), strict=True))[:4]))


def _adopt(maps: Mapping[str, int]) -> dict[str, bpf.Map]:
    """Return the maps of another forwarder; {} if one is missing or has another layout."""
    found: dict[str, bpf.Map] = {}
    for name, fd in maps.items():
        try:
            found[name] = bpf.Map.adopt(fd, *MAPS[name])
        except OSError as error:
            log.info("the map %s of the express path is not continued: %s", name, error)
    if found.keys() == MAPS.keys():
        return found
    for each in found.values():
        each.close()
    return {}


def _without(peer: Peer, counted: Counted) -> Peer:
    """Return a peer without what the programs have counted of it."""
    sent, sent_bytes, received, received_bytes = counted
    return peer._replace(
        encap_packets=max(0, peer.encap_packets - sent),
        encap_bytes=max(0, peer.encap_bytes - sent_bytes),
        decap_packets=max(0, peer.decap_packets - received),
        decap_bytes=max(0, peer.decap_bytes - received_bytes))


def _endpoint(key: Key) -> bytes:
    return ENDPOINT.pack(key[0], key[1], 4 if len(key[0]) == 4 else 6)


def _key(endpoint: bytes) -> Key:
    address, port, version = ENDPOINT.unpack(endpoint)
    return address[:4] if version == 4 else address, port


def _device_reason(kernel: RouteSocket, index: int) -> str:
    """Return why packets cannot pass a device directly; "": they can."""
    name = device_name(index)
    if not hooks.ethernet_mtu(kernel, index):
        return f"{name} is not an Ethernet device"
    other = hooks.others(kernel, index, Hook.INGRESS)
    return f"{other} is at the ingress of {name}" if other else ""


def _bulk_is_slow(index: int) -> bool:
    """Return whether the workers send bulk through this device faster.

    The programs do not merge what they receive. So bulk is fast only on links that pass
    super-packets to the peer unsegmented.
    """
    name = device_name(index)
    try:
        return ethtool.driver(name) not in PASSING_DRIVERS or \
            not ethtool.active_features(name) >= SUPER_PACKETS
    except OSError:
        return True

