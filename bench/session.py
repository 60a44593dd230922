"""One run: its lab, its roads, its recorder, its deadline, and its word to the person who waits.

Owns: what lives as long as the run does. Refuses to know: what is measured.
Main thread only, as the lab is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

from udptun.lab import Lab, Unavailable

from . import system
from .contenders import Contender, Road, find
from .proof import Watch
from .record import Recorder


class OutOfTime(Exception):
    """The run's time is up; what was measured so far stands."""


class Progress:
    """One line on stderr that says what is going on; on no terminal, a line only now and then."""

    def __init__(self, out: TextIO, budget: float) -> None:
        self._out, self._budget = out, budget
        self._live = out.isatty()
        self._began = time.monotonic()
        self._said = ""

    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def _clock(self) -> str:
        spent, most = (f"{int(s) // 60}:{int(s) % 60:02}" for s in (self.elapsed(), self._budget))
        return f"{spent} of at most {most}"

    def now(self, what: str) -> None:
        """A passing remark."""
        if self._live:
            print(f"\r{self._clock()}  {what[:90]}\x1b[K", end="", file=self._out, flush=True)

    def step(self, what: str) -> None:
        """Something that stays."""
        start = "\r" if self._live else ""
        end = "\x1b[K" if self._live else ""
        print(f"{start}{self._clock()}  {what}{end}", file=self._out, flush=True)

    def done(self) -> None:
        if self._live:
            print("\r\x1b[K", end="", file=self._out, flush=True)


@dataclass(eq=False)
class Session:
    """``budget``: seconds that the whole run may take; blocks that would not fit are left out."""

    lab: Lab
    recorder: Recorder
    budget: float
    progress: Progress = field(init=False)
    _roads: dict[str, tuple[Road, Watch]] = field(default_factory=dict)
    _absent: set[str] = field(default_factory=set)
    _profile: str = ""

    def __post_init__(self) -> None:
        self.progress = Progress(sys.stderr, self.budget)

    def left(self) -> float:
        return self.budget - self.progress.elapsed()

    def present(self, names: Sequence[str], profile: str) -> list[Contender]:
        """Those that exist here and have the profile, their roads laid; the others are noted."""
        found = []
        for name in names:
            contender = find(name)
            if profile in contender.profiles and self._lay(contender):
                found.append(contender)
        return found

    def _lay(self, contender: Contender) -> bool:
        name = contender.name
        if name in self._roads or name in self._absent:
            return name in self._roads
        self.progress.now(f"preparing {name}")
        self._profile = ""  # the new road's wires have none yet
        try:
            road = contender.road(self.lab)
        except Unavailable as e:
            self._absent.add(name)
            self.recorder.note(f"{name} was not measured: {e}")
            self.progress.step(f"{name} is not measured: {e}")
            return False
        self._roads[name] = road, Watch(road)
        self.recorder.write(
            "contender", name=name, inner_mtu=road.inner_mtu, carries=road.carries, **road.facts
        )
        return True

    def road(self, name: str) -> Road:
        return self._roads[name][0]

    def watch(self, name: str) -> Watch:
        return self._roads[name][1]

    def set_profile(self, profile: str) -> None:
        """On the wires of all roads."""
        if profile == self._profile:
            return
        for road, _ in self._roads.values():
            road.link.profile(profile)
        self._profile = profile
        road = next(iter(self._roads.values()))[0]
        device = road.a.interfaces[0].name
        lines = road.a.run(["ethtool", "-k", device]).stdout
        self.recorder.write("offloads", profile=profile, text=system.offloads(lines))
