"""Converts the lines of a run into figures. A figure has one value of one series, by block.

Owns: the selection of the lines to use. A refused slot has no value. The slots of a rejected block
are not used. The summary lists refused slots and rejected blocks with the reason. Independent of
the meaning of a value. The functions have no side effects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from . import stats
from .record import Line

Key = tuple[str, str, str]  # metric, profile, variant
Quantiles = list[list[float]]  # pairs of a quantile, 0..1, and its value


@dataclass
class Figures:
    """The measurements of one value of one series, by block and contender."""

    key: Key
    value: str
    blocks: list[dict[str, list[float]]] = field(default_factory=list)

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for block in self.blocks for name in block))

    def level(self, name: str) -> stats.Estimate | None:
        return stats.estimate(stats.levels(self.blocks, name))

    def ratio(self, name: str, against: str) -> stats.Estimate | None:
        return stats.estimate(stats.ratios(self.blocks, name, against))

    def noise(self) -> stats.Estimate | None:
        return stats.noise(self.blocks)


@dataclass
class Run:
    """One run: its figures, the slots and blocks that were left out, the machine and contenders.

    seconds    the duration of all parts together
    parts      how often the run was begun or continued
    in_kernel  the share of packets that the express path has sent, by series and contender
    quantiles  the distributions of round trips, one for each slot, by series and contender
    """

    figures: dict[tuple[Key, str], Figures] = field(default_factory=dict)
    rejected: list[tuple[Key, int, str]] = field(default_factory=list)
    refused: list[tuple[Key, int, str, str]] = field(default_factory=list)
    accepted: dict[Key, int] = field(default_factory=dict)
    busy: dict[Key, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    contenders: dict[str, Line] = field(default_factory=dict)
    offloads: dict[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    ended: str = "interrupted"
    began: float = 0.0
    seconds: float = 0.0
    parts: int = 1
    in_kernel: dict[Key, dict[str, float]] = field(default_factory=dict)
    quantiles: dict[Key, dict[str, list[Quantiles]]] = field(default_factory=dict)

    def get(self, metric: str, profile: str, variant: str, value: str) -> Figures | None:
        return self.figures.get(((metric, profile, variant), value))

    def of(self, metric: str, value: str) -> list[Figures]:
        """Return the figures of a metric that have this value, in the order of measurement."""
        return [f for (key, v), f in self.figures.items() if key[0] == metric and v == value]


def load(lines: Iterable[Line]) -> Run:
    """Build the summary of a run from its lines."""
    run, before, began = Run(), 0.0, 0.0
    slots: dict[tuple[Key, int], list[Line]] = {}
    for line in lines:
        match line["kind"]:
            case "run":
                run.machine, run.command = line["machine"], line["command"]
                run.began = began = line["at"]
            case "resume":
                before, began = run.seconds, line["at"]
                run.parts += 1
            case "note":
                run.notes.append(line["text"])
            case "contender":
                run.contenders[line["name"]] = line
            case "offloads":
                run.offloads[line["profile"]] = line["text"]
            case "slot":
                slots.setdefault((_key(line), line["block"]), []).append(line)
            case "block":
                _close(run, line, slots.pop((_key(line), line["block"]), []))
            case "end":
                run.ended = line["how"]
        run.seconds = max(run.seconds, before + line.get("at", 0.0) - began)
    # The slots of an unfinished block remain in ``slots`` and are not used, because an unfinished
    # block cannot be compared.
    return run


def _key(line: Line) -> Key:
    return line["metric"], line["profile"], line["variant"]


def _close(run: Run, end: Line, slots: list[Line]) -> None:
    key, block = _key(end), end["block"]
    run.refused += [(key, block, s["contender"], s["refused"]) for s in slots if s["refused"]]
    run.accepted.setdefault(key, 0)
    if end["rejected"]:
        run.rejected.append((key, block, end["rejected"]))
        return
    run.accepted[key] += 1
    names = dict.fromkeys(value for s in slots for value in s["values"])
    for name in names:
        figures = run.figures.setdefault((key, name), Figures(key, name))
        measured: dict[str, list[float]] = {}
        for s in slots:
            if name in s["values"]:
                measured.setdefault(s["contender"], []).append(s["values"][name])
        figures.blocks.append(measured)
    for contender in dict.fromkeys(s["contender"] for s in slots):
        own = [s for s in slots if s["contender"] == contender]
        if busy := [s["busy"] for s in own if "busy" in s]:
            run.busy.setdefault(key, {})[contender] = fmean(busy)
        if shares := [s["in_kernel"] for s in own if s.get("in_kernel") is not None]:
            run.in_kernel.setdefault(key, {})[contender] = fmean(shares)
        if found := [s["quantiles_ns"] for s in own if s.get("quantiles_ns") and not s["refused"]]:
            run.quantiles.setdefault(key, {}).setdefault(contender, []).extend(found)
