"""Runs the measurements in interleaved blocks, so that contenders are compared close in time.

Owns: the order of the slots, the counters read before and after each slot, the rules that reject a
block, and the number of blocks. ``metrics`` has the measurements. Main thread only, like
udptun.lab.

A slot is one measurement of one contender. A block measures every contender, usually twice, the
second time in reverse order: direct, vxlan, udptun, udptun, vxlan, direct. A steady drift of the
machine then affects all contenders equally, and the two slots of one contender show the noise of
repeating a measurement. A block is rejected if the hypervisor took CPU time from this machine
(steal time), or if the two slots of its first contender differ too much. Neither rule looks at the
ratios between contenders. A rejected block stays in the record, and another block replaces it if
time allows.
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
# Time of a slot in addition to its measurement: starting processes, reading counters.
_SLOT_OVERHEAD_SECONDS = 0.4


@dataclass
class SlotResult:
    """The result of one slot.

    values    by name; see ``units``
    received  payload bytes received at b and at a; the counters on the wire must confirm them
    facts     further details for the record
    """

    values: dict[str, float]
    received: tuple[int, int] = (0, 0)
    facts: dict[str, Any] = field(default_factory=dict)


class Refused(Exception):
    """The slot did not do what it should have measured; it gives no figure."""


Measure = Callable[[PathUnderTest], SlotResult]


@dataclass(frozen=True)
class Series:
    """Measurements that are compared with each other: one metric, profile and variant.

    drift_value  the name of the value by which the two slots of a block's first contender are
                 compared; None: they are not compared
    """

    metric: str
    profile: str
    variant: str
    drift_value: str | None = None

    def __str__(self) -> str:
        return f"{self.metric} {self.profile} {self.variant}".strip()


def slot_order(names: Sequence[str], mirrored: bool, block: int) -> list[str]:
    """Return the contenders of a block's slots.

    mirrored      two slots per contender, the second half in reverse order
    not mirrored  one slot per contender, every other block in reverse order
    """
    forward = list(names)
    if mirrored:
        return forward + forward[::-1]
    return forward if block % 2 == 0 else forward[::-1]


def run_blocks(
    s: Session, series: Series, contenders: Sequence[str], measure: Measure, *, blocks: int,
    slot_seconds: float, mirrored: bool = True,
) -> None:
    """Measure until ``blocks`` blocks are accepted; try at most half as many again."""
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
    """Run blocks of one slot each, for a step of udptun in this process, without hosts."""
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
        # A metric sets "cpu_seconds" to request the CPU time, which is measured here.
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
    """Return why a block is rejected, or None if it is accepted.

    first        the contender whose two slots are compared by ``drift_value``
    drift_value  as in Series
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
