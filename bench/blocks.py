"""Runs the measurements in interleaved blocks: contenders are measured at almost the same time.

Owns: the order of the slots, the counters read before and after each slot, the rules that reject a
block, and the number of blocks. ``metrics`` has the measurements. Main thread only, like
udptun.lab.

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
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from udptun.lab import LabError

from . import stats, system
from .contenders import PathUnderTest
from .proof import refusal_reason
from .session import OutOfTime, Session

MAX_STOLEN = 0.02
MAX_DRIFT = 0.30
# The time of a slot in addition to its measurement, to start processes and to read counters.
_SLOT_OVERHEAD_SECONDS = 0.4


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


def run_blocks(
    s: Session, series: Series, contenders: Sequence[str], measure: Measure, *, blocks: int,
    slot_seconds: float, mirrored: bool = True,
) -> None:
    """Measure until ``blocks`` blocks are accepted. Measure at most 1.5 times ``blocks`` blocks."""
    names = [c.name for c in s.set_up_available(contenders, series.profile)]
    if not names:
        return
    s.set_profile(series.profile)
    accepted = 0
    for block in range(blocks + math.ceil(blocks / 2)):
        slots = slot_order(names, mirrored, block)
        if s.left() < len(slots) * (slot_seconds + _SLOT_OVERHEAD_SECONDS):
            s.recorder.note(f"{series}: {accepted} of {blocks} blocks, out of time")
            raise OutOfTime
        lines = [
            _slot(s, series, block, name, measure, f"block {accepted + 1} of {blocks}")
            for name in slots
        ]
        rejected = rejection_reason(lines, names[0], series.drift_value)
        s.recorder.write("block", **_key(series), block=block, rejected=rejected)
        if rejected:
            s.progress.step(f"{series}: block rejected: {rejected}")
            continue
        accepted += 1
        if accepted == blocks:
            break
    if accepted < blocks:
        s.recorder.note(f"{series}: {accepted} of {blocks} blocks, too many were rejected")
    s.progress.step(f"{series}: {accepted} of {blocks} blocks")


def run_local_blocks(
    s: Session, series: Series, measure: Callable[[], SlotResult], *, blocks: int
) -> None:
    """Run blocks of one slot each; a slot measures a step of udptun in this process, without hosts.
    """
    for block in range(blocks):
        s.progress.now(f"{series}, block {block + 1} of {blocks}")
        cpu_before, refused, result = system.cpu_time(), None, SlotResult({})
        try:
            result = measure()
        except Refused as e:
            refused = str(e)
        cpu = system.cpu_time() - cpu_before
        s.recorder.write(
            "slot", **_key(series), block=block, contender="udptun", values=result.values,
            refused=refused, stolen=round(cpu.stolen / cpu.total, 4), **result.facts,
        )
        s.recorder.write("block", **_key(series), block=block, rejected=None)
    s.progress.step(f"{series}: {blocks} blocks")


def _key(series: Series) -> dict[str, str]:
    return {"metric": series.metric, "profile": series.profile, "variant": series.variant}


def _slot(
    s: Session, series: Series, block: int, name: str, measure: Measure, where: str
) -> dict[str, Any]:
    s.progress.now(f"{series}, {where}: {name}")
    path, counters = s.path(name), s.counters(name)
    result, refused, counted = SlotResult({}), None, None
    before, cpu_before = counters.read(), system.cpu_time()
    try:
        result = measure(path)
    except (Refused, LabError) as e:
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
    if refused:
        s.progress.step(f"{series}: {name} refused: {refused.splitlines()[0]}")
    return s.recorder.write(
        "slot", **_key(series), block=block, contender=name,
        values={} if refused else result.values, refused=refused, received=result.received,
        busy=round(cpu.busy / cpu.total, 4), stolen=round(cpu.stolen / cpu.total, 4),
        wire=counted and [vars(count) for count in counted], **result.facts,
    )


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
