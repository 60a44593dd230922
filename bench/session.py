"""One run: its lab, the paths under test, its recorder, its time limit and its progress line.

Owns: the objects that exist during the whole run. Independent of the metrics. Main thread only,
like udptun.lab.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

from udptun.lab import Lab, Unavailable

from . import system
from .contenders import Contender, PathUnderTest, find
from .proof import WireCounters
from .record import Recorder


class OutOfTime(Exception):
    """The run has reached its time limit. The results up to this point are valid."""


class Progress:
    """Shows the current measurement on stderr.

    On a terminal, one line is updated all the time. If stderr is not a terminal, only completed
    steps are printed.
    """

    def __init__(self, out: TextIO, budget: float) -> None:
        self._out, self._budget = out, budget
        self._live = out.isatty()
        self._began = time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def _clock(self) -> str:
        spent, most = (f"{int(s) // 60}:{int(s) % 60:02}" for s in (self.elapsed(), self._budget))
        return f"{spent} of at most {most}"

    def now(self, what: str) -> None:
        """Show the current activity; the next message replaces it."""
        if self._live:
            print(f"\r{self._clock()}  {what[:90]}\x1b[K", end="", file=self._out, flush=True)

    def step(self, what: str) -> None:
        """Print a completed step."""
        start = "\r" if self._live else ""
        end = "\x1b[K" if self._live else ""
        print(f"{start}{self._clock()}  {what}{end}", file=self._out, flush=True)

    def done(self) -> None:
        """Clear the line."""
        if self._live:
            print("\r\x1b[K", end="", file=self._out, flush=True)


@dataclass(eq=False)
class Session:
    """One run. ``budget`` is its time limit in seconds.

    A block that would end after the limit is not started.
    """

    lab: Lab
    recorder: Recorder
    budget: float
    progress: Progress = field(init=False)
    _paths: dict[str, tuple[PathUnderTest, WireCounters]] = field(default_factory=dict)
    _unavailable: set[str] = field(default_factory=set)
    _profile: str = ""

    def __post_init__(self) -> None:
        self.progress = Progress(sys.stderr, self.budget)

    def left(self) -> float:
        return self.budget - self.progress.elapsed()

    def set_up_available(self, names: Sequence[str], profile: str) -> list[Contender]:
        """Set up and return the contenders that work on this profile and on this machine.

        The record gets a note for each contender that does not work on this machine.
        """
        found = []
        for name in names:
            contender = find(name)
            if profile in contender.profiles and self._set_up(contender):
                found.append(contender)
        return found

    def _set_up(self, contender: Contender) -> bool:
        name = contender.name
        if name in self._paths or name in self._unavailable:
            return name in self._paths
        self.progress.now(f"preparing {name}")
        self._profile = ""  # the wire of the new path has no profile yet
        try:
            path = contender.set_up(self.lab)
        except Unavailable as e:
            self._unavailable.add(name)
            self.recorder.note(f"{name} was not measured: {e}")
            self.progress.step(f"{name} is not measured: {e}")
            return False
        self._paths[name] = path, WireCounters(path)
        self.recorder.write(
            "contender", name=name, inner_mtu=path.inner_mtu, carries=path.carries, **path.facts
        )
        return True

    def path(self, name: str) -> PathUnderTest:
        return self._paths[name][0]

    def counters(self, name: str) -> WireCounters:
        return self._paths[name][1]

    def set_profile(self, profile: str) -> None:
        """Set the offloads of all wires, and record what ethtool reports."""
        if profile == self._profile:
            return
        for path, _ in self._paths.values():
            path.link.profile(profile)
        self._profile = profile
        path = next(iter(self._paths.values()))[0]
        device = path.a.interfaces[0].name
        lines = path.a.run(["ethtool", "-k", device]).stdout
        self.recorder.write("offloads", profile=profile, text=system.offloads(lines))
