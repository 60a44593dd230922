"""What happens to the cluster, chosen by a seed.

Main thread, except for floods and for n4, which have threads of their own.

Owns: the events, and the intervals in which they may cost datagrams. n1 gets take-overs, n2 also
kills of its forwarder. The forwarder of n3 is never replaced, so its memory is observed for the
whole run. n4 leaves and comes back.
"""

import json
import os
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from random import Random

from tests.chaos.world import World
from tests.netns.test_tunnel_path_mtu import checksum
from udptun.lab import LabError, wait_for
from udptun.lab.cluster import PREFIX, Member, unreachable
from udptun.lab.tunnels import PORT

from .counts import Interval

STRANGERS = 30  # leases that come and go
BEFORE_SECONDS = 0.5  # datagrams that were sent this long before a kill may still be in its queues
AFTER_SECONDS = 1.0
LATE_SECONDS = 30.0  # limit for a forwarder or a node to be there again
FLOOD_SECONDS, FLOOD_BURST, FLOOD_PAUSE = 3.0, 10, 0.002


@dataclass
class Pending:
    """A forwarder that is being replaced. killed: else another one takes over."""

    member: Member
    pid: int
    since: float
    killed: bool


class Events:
    """All events of one run. ``tick`` continues those that last; ``random`` begins one."""

    def __init__(self, world: World, rng: Random, tell: Callable[[str], object]) -> None:
        self.world, self._rng, self._tell = world, rng, tell
        # of its own, because the number of ticks depends on the machine
        self._churn_rng = Random(rng.random())
        self.n1, self.n2, _, self.n4 = world.members
        self.counts: Counter[str] = Counter()
        self.intervals: list[Interval] = []
        self.wrong: list[str] = []
        self.is_n4_there = True
        self._etcd = world.store.etcd
        self._pending: list[Pending] = []
        self._store_back: float | None = None
        self._strangers: dict[str, str] = {}  # keys and values of the leases that are there
        self._floods: list[threading.Thread] = []
        self._moving: threading.Thread | None = None  # n4 leaves or comes back
        self._template = self._read_template()

    def _read_template(self) -> dict:
        key = self.world.store.key(self.n4)
        return self._etcd.leases()[key]

    @property
    def busy(self) -> bool:
        """Whether a forwarder is being replaced."""
        return bool(self._pending)

    def random(self) -> None:
        """Begin one event."""
        choices = [(self._take_over, 4), (self._kill, 2), (self._outage, 1), (self._flood, 2),
                   (self._come_or_go, 1)]
        doing = self._rng.choices([one for one, _ in choices], [n for _, n in choices])[0]
        try:
            doing()
        except (LabError, OSError) as error:
            self._fail(f"{doing.__name__.strip('_')} cannot be done: {error}")

    def tick(self) -> None:
        """Called several times a second."""
        now = time.monotonic()
        for pending in tuple(self._pending):
            self._look_at(pending, now)
        if self._store_back is None:
            self._churn()
        elif now >= self._store_back:
            self._store_back = None
            self._etcd.start()

    def finish(self) -> None:
        """End what has begun, and bring everything back."""
        end = time.monotonic() + LATE_SECONDS
        while self._pending and time.monotonic() < end:
            self.tick()
            time.sleep(0.1)
        for flood in self._floods:
            flood.join()
        if self._store_back is not None:
            self._store_back = None
            self._etcd.start()
        if self._moving is not None:
            self._moving.join()
        if not self.is_n4_there:
            self._return()

    # -- leases -----------------------------------------------------------------------------------

    def _churn(self) -> None:
        """One lease of another node appears or disappears."""
        number = self._churn_rng.randrange(STRANGERS)
        end = self.world.store.host.interfaces[0]
        key = f"10.244.{200 + number}.0-24&fd00:10:244:{0xC8 + number:x}::-64"
        if self._strangers.pop(key, None):
            self._etcd.delete(f"{PREFIX}/subnets/{key}")
        else:
            lease = self._template | {"PublicIP": str(end.v4.network[60 + number])}
            if "PublicIPv6" in lease:
                lease["PublicIPv6"] = str(end.v6.network[600 + number])
            self._strangers[key] = json.dumps(lease)
            self._etcd.put(f"{PREFIX}/subnets/{key}", self._strangers[key])
        self.counts["lease changes"] += 1

    def _outage(self) -> None:
        if self._store_back is not None:
            return
        self._etcd.stop()
        self._store_back = time.monotonic() + self._rng.uniform(3, 10)
        self.counts["etcd outages"] += 1

    # -- forwarders -------------------------------------------------------------------------------

    def _is_free(self, member: Member) -> bool:
        return all(one.member is not member for one in self._pending)

    def _take_over(self) -> None:
        member = self._rng.choice((self.n1, self.n1, self.n2))
        if self._is_free(member):
            self._signal(member, signal.SIGUSR2, killed=False)
            self.counts["take-overs"] += 1

    def _kill(self) -> None:
        if self._is_free(self.n2):
            self._signal(self.n2, signal.SIGKILL, killed=True)
            self.counts["kills"] += 1

    def _signal(self, member: Member, number: int, killed: bool) -> None:
        pid = member.forwarder_pid()
        self._pending.append(Pending(member, pid, time.monotonic(), killed))
        os.kill(pid, number)

    def _look_at(self, pending: Pending, now: float) -> None:
        """Find out whether another forwarder answers now."""
        what = "kill -9" if pending.killed else "take-over"
        name = pending.member.host.name
        try:
            there = pending.member.forwarder_pid() != pending.pid
        except (OSError, LabError, ValueError):
            there = False
        if not there and now < pending.since + LATE_SECONDS:
            return
        self._pending.remove(pending)
        if not there:
            self._fail(f"{name}: no other forwarder within {LATE_SECONDS:g} s after the {what}")
        if pending.killed:
            self.intervals.append(Interval(
                name, pending.since - BEFORE_SECONDS, now + AFTER_SECONDS, what))
            self._tell(f"{name}: another forwarder {now - pending.since:.1f} s after the kill")

    # -- the network ------------------------------------------------------------------------------

    def _flood(self) -> None:
        """Forged errors about datagrams of one node to another: unreachable, and a small MTU."""
        self._floods = [one for one in self._floods if one.is_alive()]
        if self._floods:
            return
        victim, peer = self._rng.sample([*self.world.members[:3]], 2)
        kind = self._rng.choice(((3, 3, 0), (3, 4, 552)))
        raw = self.world.store.host.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self._floods.append(threading.Thread(
            target=_send_errors, args=(raw, victim.host.v4, peer.host.v4, *kind), daemon=True))
        self._floods[-1].start()
        self.counts["ICMP floods"] += 1

    def _come_or_go(self) -> None:
        if self._moving is not None and self._moving.is_alive():
            return
        leaves, self.is_n4_there = self.is_n4_there, False
        self._moving = threading.Thread(
            target=self._leave if leaves else self._return, daemon=True)
        self._moving.start()

    def _leave(self) -> None:
        try:
            self.n4.remove_pod()
            self.n4.clean_up()
        except LabError as error:
            self._fail(f"n4 cannot leave: {error}")
        self.counts["departures"] += 1

    def _return(self) -> None:
        """n4 comes back. While etcd is away, it waits for its lease."""
        try:
            self.n4.start()
            self.n4.wait_ready()
            self.n4.add_pod()
            wait_for(lambda: not unreachable([self.n1, self.n4]), "n1 and n4 to reach each other",
                     LATE_SECONDS)
        except LabError as error:
            self._fail(f"n4 cannot come back: {error}")
        self.is_n4_there = True
        self.counts["returns"] += 1

    def _fail(self, text: str) -> None:
        self.wrong.append(text)
        self._tell(f"WRONG {text}")


def _send_errors(raw, victim, peer, kind: int, code: int, mtu: int) -> None:
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 1500, 1, 0x4000, 64, 17, 0, victim.packed,
                     peer.packed)
    body = struct.pack("!HH", 0, mtu) + ip + struct.pack("!HHHH", PORT, PORT, 1480, 0)
    message = struct.pack("!BBH", kind, code, 0) + body
    message = struct.pack("!BBH", kind, code, checksum(message)) + body
    end = time.monotonic() + FLOOD_SECONDS
    while time.monotonic() < end:
        with suppress(OSError):
            for _ in range(FLOOD_BURST):
                raw.sendto(message, (str(victim), 0))
        time.sleep(FLOOD_PAUSE)
    raw.close()
