"""Interleaved blocks: every contender measured close in time to what it is compared with.

Owns: the order of the slots, what is read around each slot, what spoils a block, and when there
are enough. Refuses to know: what a slot measures; see ``metrics``.

A block is a palindrome, D V U O O U V D: what drifts steadily through a block hits all contenders
alike, and the two slots of each tell the noise of measuring the same thing twice. A block is
rejected when the machine was not ours (stolen time) or the anchor, its first contender, was far
from itself. Neither looks at the ratio that the block is for. Rejected blocks stay in the record,
and others take their place as far as time allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from udptun.lab import LabError

from . import stats, system
from .contenders import Road
from .proof import judge
from .session import OutOfTime, Session

STOLEN_MOST = 0.02
ANCHOR_DRIFT_MOST = 0.30
# Room for what one slot takes beside its measuring: processes, counters.
_SLOT_EXTRA_SECONDS = 0.4


@dataclass
class Measured:
    """What one slot found. ``received``: payload bytes at b and at a, to be proved on the wire."""

    values: dict[str, float]
    received: tuple[int, int] = (0, 0)
    facts: dict[str, Any] = field(default_factory=dict)


class Refused(Exception):
    """What was to be timed did not happen."""


Measure = Callable[[Road], Measured]


@dataclass(frozen=True)
class Series:
    """What is compared with each other: one metric, on one profile, in one variant.

    anchor   the value by which a block's first contender must be close to itself; None: no check
    """

    metric: str
    profile: str
    variant: str
    anchor: str | None = None

    def __str__(self) -> str:
        return f"{self.metric} {self.profile} {self.variant}".strip()


def order(names: Sequence[str], mirrored: bool, block: int) -> list[str]:
    """The slots of a block. Not ``mirrored``: one each, every other block backwards."""
    there = list(names)
    if mirrored:
        return there + there[::-1]
    return there if block % 2 == 0 else there[::-1]


def run_blocks(
    s: Session, series: Series, contenders: Sequence[str], measure: Measure, *, blocks: int,
    slot_seconds: float, mirrored: bool = True,
) -> None:
    """Measure until ``blocks`` are accepted, or half as many again were tried."""
    names = [c.name for c in s.present(contenders, series.profile)]
    if not names:
        return
    s.set_profile(series.profile)
    accepted = 0
    for block in range(blocks + math.ceil(blocks / 2)):
        slots = order(names, mirrored, block)
        if s.left() < len(slots) * (slot_seconds + _SLOT_EXTRA_SECONDS):
            s.recorder.note(f"{series}: {accepted} of {blocks} blocks, then the time was up")
            raise OutOfTime
        lines = [
            _slot(s, series, block, name, measure, f"block {accepted + 1} of {blocks}")
            for name in slots
        ]
        rejected = spoiled(lines, names[0], series.anchor)
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


def record_alone(
    s: Session, series: Series, measure: Callable[[], Measured], *, blocks: int
) -> None:
    """Blocks of one slot for what needs no road: udptun's own steps in this process."""
    for block in range(blocks):
        s.progress.now(f"{series}, block {block + 1} of {blocks}")
        cpu_before, refused, result = system.cpu_time(), None, Measured({})
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
    road, watch = s.road(name), s.watch(name)
    result, refused, proof = Measured({}), None, None
    before, cpu_before = watch.read(), system.cpu_time()
    try:
        result = measure(road)
    except (Refused, LabError) as e:
        refused = str(e)
    cpu = system.cpu_time() - cpu_before
    after = watch.read()
    road.forget_ended()
    if refused is None:
        proof = tuple(new - old for new, old in zip(after, before, strict=True))
        refused = judge(series.profile, result.received, (proof[0], proof[1]))
    received = sum(result.received)
    if received and "cpu_seconds" in result.values:
        # The metric asks for the system's CPU time by naming it; only we know it.
        del result.values["cpu_seconds"]
        result.values["cpu_seconds_per_gb"] = cpu.busy / (received / 1e9)
    if refused:
        s.progress.step(f"{series}: {name} refused: {refused.splitlines()[0]}")
    return s.recorder.write(
        "slot", **_key(series), block=block, contender=name,
        values={} if refused else result.values, refused=refused, received=result.received,
        busy=round(cpu.busy / cpu.total, 4), stolen=round(cpu.stolen / cpu.total, 4),
        wire=proof and [vars(count) for count in proof], **result.facts,
    )


def spoiled(
    lines: Sequence[dict[str, Any]], anchor_name: str, anchor: str | None
) -> str | None:
    """Why a block is rejected; None when it is not."""
    if not any(line["values"] for line in lines):
        return "every figure was refused"
    stolen = max(line["stolen"] for line in lines)
    if stolen > STOLEN_MOST:
        return f"{stolen:.1%} of the CPU time was stolen by the host"
    values = [
        line["values"][anchor] for line in lines
        if anchor and line["contender"] == anchor_name and anchor in line["values"]
    ]
    if stats.drift(values) > ANCHOR_DRIFT_MOST:
        return f"{anchor_name} was {stats.drift(values):.0%} from itself"
    return None
