"""Runs the measurements in interleaved blocks: contenders are measured at almost the same time.

Owns: the order of the slots, the counters read before and after each slot, the rules that reject a
block, the number of blocks, and the expected duration. ``metrics`` has the measurements. Main
thread only, like udptun.lab.

A slot is one measurement of one contender. A block usually measures every contender twice, the
second time in reverse order: direct, vxlan, udptun, udptun, vxlan, direct. A steady drift of the
machine then affects all contenders equally. The difference between the two slots of one contender
shows the noise of a measurement.

A block is rejected in three cases:

- No slot has a figure.
- The hypervisor took CPU time from this machine (steal time).
- The two slots of the block's first contender differ too much.

No rule uses the ratios between contenders. A rejected block stays in the record, and another
block replaces it if there is time left.

A run that continues an earlier one measures only the blocks that are not in the record yet.
"""

from __future__ import annotations

import http.client
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from udptun.errors import UdptunError
from udptun.lab import Forwarder, LabError

from . import stats, system
from .contenders import PathUnderTest, find
from .proof import refusal_reason
from .record import Line
from .session import OutOfTime, Session

MAX_STOLEN = 0.02
MAX_DRIFT = 0.30
# The time of a slot in addition to its measurement, to start processes and to read counters.
_SLOT_OVERHEAD_SECONDS = 0.15
_SET_UP_SECONDS = 2.0  # of one contender

Sent = tuple[Forwarder, tuple[int, int]]  # see _sent_in_kernel


@dataclass
class SlotResult:
    """The result of one slot.

    values    the measured values by name; ``units`` lists the names
    received  payload bytes received at host b (from a), then at host a (from b); the counters on
              the wire must confirm them
    facts     further details for the record
    """

    values: dict[str, float]
    received: tuple[int, int] = (0, 0)
    facts: dict[str, Any] = field(default_factory=dict)


class Refused(Exception):
    """The operation that the slot measures did not take place, so the slot has no figure."""


Measure = Callable[[PathUnderTest], SlotResult]


@dataclass(frozen=True)
class Series:
    """Measurements that are compared with each other: one metric, profile and variant.

    drift_value  the name of the value that is compared between the two slots of a block's first
                 contender; None if the two slots are not compared
    """

    metric: str
    profile: str
    variant: str
    drift_value: str | None = None

    def __str__(self) -> str:
        return f"{self.metric} {self.profile} {self.variant}".strip()


def slot_order(names: Sequence[str], mirrored: bool, block: int) -> list[str]:
    """Return the contender of each slot of a block, in order.

    mirrored      two slots per contender; the second half of the block is in reverse order
    not mirrored  one slot per contender; every second block is in reverse order
    """
    forward = list(names)
    if mirrored:
        return forward + forward[::-1]
    return forward if block % 2 == 0 else forward[::-1]


@dataclass(frozen=True)
class Job:
    """The blocks of one series that a run measures.

    blocks        the number of accepted blocks to reach; at most 1.5 times as many are measured
    slot_seconds  the expected duration of one slot
    mirrored      as in ``slot_order``
    """

    series: Series
    contenders: tuple[str, ...]
    measure: Measure
    blocks: int
    slot_seconds: float
    mirrored: bool = True

    def seconds(self, lines: Sequence[Line] = ()) -> float:
        """Return the expected duration, if no block is rejected; ``lines`` has earlier blocks."""
        names = [n for n in self.contenders if self.series.profile in find(n).profiles]
        left = max(0, self.blocks - progress(lines, self.series, names)[0])
        return left * len(slot_order(names, self.mirrored, 0)) * self._slot_seconds

    @property
    def _slot_seconds(self) -> float:
        return self.slot_seconds + _SLOT_OVERHEAD_SECONDS

    def run(self, s: Session) -> None:
        names = [c.name for c in s.set_up_available(self.contenders, self.series.profile)]
        if not names:
            return
        s.set_profile(self.series.profile)
        accepted, number = progress(s.recorder.lines, self.series, names)
        before = accepted
        for block in range(number, number + self.blocks + math.ceil(self.blocks / 2) - accepted):
            if accepted >= self.blocks:
                break
            slots = slot_order(names, self.mirrored, block)
            if s.left() < len(slots) * self._slot_seconds:
                s.recorder.note(
                    f"{self.series}: {accepted} of {self.blocks} blocks, out of time")
                raise OutOfTime
            where = f"block {accepted + 1} of {self.blocks}"
            lines = [_slot(s, self.series, block, n, self.measure, where) for n in slots]
            rejected = rejection_reason(lines, names[0], self.series.drift_value)
            s.recorder.write("block", **_key(self.series), block=block, rejected=rejected)
            if rejected:
                s.progress.step(f"{self.series}: block rejected: {rejected}")
            else:
                accepted += 1
        if accepted < self.blocks:
            s.recorder.note(
                f"{self.series}: {accepted} of {self.blocks} blocks, too many were rejected")
        earlier = f", {before} of them in an earlier part" if before else ""
        s.progress.step(f"{self.series}: {accepted} of {self.blocks} blocks{earlier}")


@dataclass(frozen=True)
class LocalJob:
    """Blocks of one slot each. A slot measures a step of udptun in this process, without hosts."""

    series: Series
    measure: Callable[[], SlotResult]
    blocks: int
    slot_seconds: float

    @property
    def contenders(self) -> tuple[str, ...]:
        return ()

    def seconds(self, lines: Sequence[Line] = ()) -> float:
        return max(0, self.blocks - progress(lines, self.series, ["udptun"])[0]) * self.slot_seconds

    def run(self, s: Session) -> None:
        accepted, number = progress(s.recorder.lines, self.series, ["udptun"])
        for block in range(number, number + self.blocks - accepted):
            s.progress.now(f"{self.series}, block {block + 1} of {self.blocks}")
            cpu_before, refused, result = system.cpu_time(), None, SlotResult({})
            try:
                result = self.measure()
            except Refused as e:
                refused = str(e)
            cpu = system.cpu_time() - cpu_before
            s.recorder.write(
                "slot", **_key(self.series), block=block, contender="udptun",
                values=result.values, refused=refused,
                stolen=cpu.share(cpu.stolen), **result.facts,
            )
            s.recorder.write("block", **_key(self.series), block=block, rejected=None)
        s.progress.step(f"{self.series}: {self.blocks} blocks")


def duration(jobs: Iterable[Job | LocalJob], lines: Sequence[Line] = ()) -> float:
    """Return the expected seconds of a run, if no block is rejected; ``lines`` as in ``Job``."""
    jobs = tuple(jobs)
    names = {name for job in jobs for name in job.contenders}
    return sum(job.seconds(lines) for job in jobs) + _SET_UP_SECONDS * len(names)


def progress(lines: Iterable[Line], series: Series, names: Sequence[str]) -> tuple[int, int]:
    """Return the number of accepted blocks with these contenders, and the first unused number.

    An interrupted block has slots, but no end. Its number is not used again.
    """
    key, accepted, number = _key(series), 0, 0
    contenders: dict[int, set[str]] = {}
    for line in lines:
        if line["kind"] not in ("slot", "block") or key != {name: line[name] for name in key}:
            continue
        number = max(number, line["block"] + 1)
        if line["kind"] == "slot":
            contenders.setdefault(line["block"], set()).add(line["contender"])
        elif not line["rejected"] and contenders.get(line["block"]) == set(names):
            accepted += 1
    return accepted, number


def _key(series: Series) -> dict[str, str]:
    return {"metric": series.metric, "profile": series.profile, "variant": series.variant}


def _slot(
    s: Session, series: Series, block: int, name: str, measure: Measure, where: str
) -> dict[str, Any]:
    s.progress.now(f"{series}, {where}: {name}")
    path, counters = s.path(name), s.counters(name)
    result, refused, counted = SlotResult({}), None, None
    sent = _sent_in_kernel(path)
    before, cpu_before = counters.read(), system.cpu_time()
    try:
        result = measure(path)
    except (Refused, LabError, UdptunError, OSError) as e:  # a forwarder may not answer
        refused = str(e)
    cpu = system.cpu_time() - cpu_before
    after = counters.read()
    path.discard_ended_processes()
    if refused is None:
        counted = tuple(new - old for new, old in zip(after, before, strict=True))
        refused = refusal_reason(series.profile, result.received, (counted[0], counted[1]))
    received = sum(result.received)
    if received and "cpu_seconds" in result.values:
        # A metric sets "cpu_seconds" to request the CPU time. This function measures the CPU time.
        del result.values["cpu_seconds"]
        result.values["cpu_seconds_per_gb"] = cpu.busy / (received / 1e9)
    if path.in_kernel and not refused:
        result.facts["in_kernel"] = _share(sent, _sent_in_kernel(path))
    if refused:
        s.progress.step(f"{series}: {name} refused: {refused.splitlines()[0]}")
    return s.recorder.write(
        "slot", **_key(series), block=block, contender=name,
        values={} if refused else result.values, refused=refused, received=result.received,
        busy=cpu.share(cpu.busy), stolen=cpu.share(cpu.stolen),
        wire=counted and [vars(count) for count in counted], **result.facts,
    )


def _sent_in_kernel(path: PathUnderTest) -> Sent | None:
    """Return the forwarder of host a, and its answer to ``in_kernel``; None: there is none."""
    if path.in_kernel is None:
        return None
    try:
        return path.forwarders[0], path.in_kernel()
    except (LabError, OSError, http.client.HTTPException):
        return None


def _share(before: Sent | None, after: Sent | None) -> float | None:
    """Return the share of the packets that the express path has sent. None: it is unknown, because
    the forwarder did not answer, or the slot has restarted it, or its counters began again."""
    if before is None or after is None or before[0] is not after[0]:
        return None
    express, total = (new - old for new, old in zip(after[1], before[1], strict=True))
    return round(express / total, 4) if 0 <= express <= total > 0 else None


def rejection_reason(
    lines: Sequence[dict[str, Any]], first: str, drift_value: str | None
) -> str | None:
    """Return the reason to reject a block, or None if the block is accepted.

    first        the contender whose two slots are compared
    drift_value  the name of the compared value, as in Series
    """
    if not any(line["values"] for line in lines):
        return "every figure was refused"
    stolen = max(line["stolen"] for line in lines)
    if stolen > MAX_STOLEN:
        return f"the hypervisor took {stolen:.1%} of the CPU time, limit {MAX_STOLEN:.0%}"
    values = [
        line["values"][drift_value] for line in lines
        if drift_value and line["contender"] == first and drift_value in line["values"]
    ]
    if stats.drift(values) > MAX_DRIFT:
        return (
            f"the two slots of {first} differ by {stats.drift(values):.0%}, "
            f"limit {MAX_DRIFT:.0%}"
        )
    return None
