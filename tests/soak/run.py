"""One run: the cluster, the traffic, the events, a sample every SAMPLE_SECONDS, the report."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.chaos.world import ACCELERATED, ClusterKind, World
from udptun.lab import Lab

from .counts import CONGESTION, NodeCounts, grown, growth, unaccelerated, unexplained
from .events import Events
from .traffic import Traffic

SAMPLE_SECONDS = 10.0
PROGRESS_SECONDS = 10.0
EVENT_SECONDS = (2.0, 5.0)  # between two events
TICK_SECONDS = 0.2


class Soak:
    """tell    gets each line of the output
    accelerate  one of ACCELERATED: the nodes that have the express path
    folder  gets the logs of all nodes if something was wrong; None: they are not saved
    """

    def __init__(
        self, seed: str, seconds: float, tell: Callable[[str], object], folder: Path | None = None,
        accelerate: str = "mixed",
    ) -> None:
        self._folder, self._accelerate = folder, accelerate
        self._rng, self._seconds, self._tell = Random(seed), seconds, tell
        self._over = threading.Event()
        self._samples_n = 0
        self.wrong: list[str] = []

    def run(self) -> list[str]:
        """Return what was wrong."""
        with Lab() as lab:
            world = World(lab, ClusterKind("udp", ipv6=True, accelerate=self._accelerate), nodes=4)
            try:
                world.start()
                world.mesh.stop()
                self._soak(world)
            finally:
                world.close()
        return self.wrong

    def _soak(self, world: World) -> None:
        self._nodes = [NodeCounts(member, number in ACCELERATED[self._accelerate])
                       for number, member in enumerate(world.members, start=1)]
        stay = world.members[:3]
        self._traffic = traffic = Traffic(
            (member.host.name, member.pod, (member.pod_v4, member.pod_v6)) for member in stay)
        self._events = events = Events(world, self._rng, self._say)
        self._kernel = {node.name: node.kernel_drops() for node in self._nodes[:3]}
        self._began = time.monotonic()
        self._sample()
        progress = threading.Thread(target=self._progress, daemon=True)
        progress.start()
        event_at, sample_at = self._began + 5.0, self._began + SAMPLE_SECONDS
        while (now := time.monotonic()) < self._began + self._seconds:
            events.tick()
            if now >= sample_at:  # then no event begins
                if not events.busy:
                    self._sample()
                    sample_at = time.monotonic() + SAMPLE_SECONDS
            elif now >= event_at:
                events.random()
                event_at = time.monotonic() + self._rng.uniform(*EVENT_SECONDS)
            time.sleep(TICK_SECONDS)
        events.finish()
        self._sample()
        self.wrong += traffic.finish()
        self._over.set()
        progress.join()
        self._judge(world)

    def _say(self, text: str) -> None:
        self._tell(f"{time.monotonic() - self._began:6.0f} s  {text}")

    def _sample(self) -> None:
        self._traffic.pause()
        try:
            for node in self._nodes:
                if node.member is not self._events.n4 or self._events.is_n4_there:
                    wrong = node.sample()
                    self.wrong += wrong
                    for text in wrong:
                        self._say(f"WRONG {text}")
        finally:
            self._traffic.resume()
        self._samples_n += 1

    def _progress(self) -> None:
        while not self._over.wait(PROGRESS_SECONDS):
            self._say(self._line())

    def _line(self) -> str:
        happened = ", ".join(f"{n} {what}" for what, n in self._events.counts.items())
        memory = " ".join(
            f"{node.name} {node.daemon.rss[-1] / 1024:.0f}+{node.forwarder.rss[-1] / 1024:.0f}"
            for node in self._nodes if node.forwarder.rss)
        sent = sum(flow.sent for flow in self._traffic.tcp) >> 20
        return (f"{self._traffic.sent} datagrams, {sent} MiB by TCP; {self._samples_n} samples, "
                f"MiB of daemon+forwarder: {memory}; {happened}")

    # -- at the end -------------------------------------------------------------------------------

    def _judge(self, world: World) -> None:
        lost = [(flow.names, at) for flow in self._traffic.udp for at in flow.lost_at()]
        by_reason, rest = unexplained(lost, self._events.intervals)
        congestion = self._congestion()
        if len(rest) > sum(congestion.values()):
            where = Counter(names for names, _ in rest).most_common(3)
            times = ", ".join(f"{at - self._began:.1f}" for _, at in rest[:10])
            self.wrong.append(f"{len(rest)} datagrams are lost, and drops explain "
                              f"{sum(congestion.values())}; most: {where}; sent after s: {times}")
        if repeated := sum(flow.repeated() for flow in self._traffic.udp):
            self.wrong.append(f"{repeated} datagrams arrived twice")
        for node in self._nodes:
            self.wrong += unaccelerated(node)
            self.wrong += grown(f"{node.name} daemon", node.daemon)
            self.wrong += grown(f"{node.name} forwarder", node.forwarder)
        self.wrong += self._events.wrong
        for member in world.members:
            self.wrong += [f"{member.host.name}: a traceback in {file}"
                           for file, text in world.logs(member).items() if "Traceback" in text]
        if self.wrong and self._folder is not None:
            self._save_logs(world, self._folder)
        self._table(by_reason, len(rest), congestion)

    def _save_logs(self, world: World, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for member in world.members:
            for file, text in world.logs(member).items():
                (folder / f"{member.host.name}-{file.name}").write_text(text)

    def _congestion(self) -> Counter[str]:
        """Return what full queues have dropped, by place or reason."""
        found: Counter[str] = Counter()
        for node in self._nodes[:3]:
            found.update({reason: node.drops[reason] for reason in CONGESTION})
            found.update(node.kernel_drops() - self._kernel[node.name])
        return +found

    def _table(self, by_reason: Counter[str], rest: int, congestion: Counter[str]) -> None:
        tell, traffic = self._tell, self._traffic
        tell(f"\nsamples               {self._samples_n}")
        tell(f"datagrams sent        {traffic.sent}")
        tell(f"refused by the kernel {sum(flow.refused for flow in traffic.udp)}")
        for why, n in by_reason.items():
            tell(f"lost during {why:9} {n}, in {len(self._events.intervals)} intervals of together "
                 f"{sum(one.end - one.begin for one in self._events.intervals):.0f} s")
        tell(f"lost otherwise        {rest}; dropped by full queues: {dict(congestion)}")
        tell(f"bytes by TCP          {sum(flow.received for flow in traffic.tcp)}")
        for node in self._nodes:
            if node.express:
                tell(f"express path of {node.name}    {node.kernel['sent']} packets sent, "
                     f"{node.kernel['received']} received; at the samples {node.active} times "
                     f"active, {node.idle} times not")
        for what, n in self._events.counts.items():
            tell(f"{what:21} {n}")
        tell("\nprocess          MiB at the end  growth, KiB  descriptors  growth")
        for node in self._nodes:
            for role, series in (("daemon", node.daemon), ("forwarder", node.forwarder)):
                if series.rss:
                    tell(f"{node.name} {role:13} {series.rss[-1] / 1024:14.1f} "
                         f"{growth(series.rss):12.0f} {series.fds[-1]:12.0f} "
                         f"{growth(series.fds):7.0f}")
        drops: Counter[str] = Counter()
        for node in self._nodes:
            drops += node.drops
        tell(f"\ndrops of the forwarders, by reason: {dict(drops)}")
