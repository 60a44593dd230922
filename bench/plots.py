"""PNG plots of a run, if matplotlib is installed (the `bench` extra).

Owns: the layout of the plots. Main thread only.
There is one plot per metric and value. If this plot has too many groups of bars, there is one plot
per variant instead. A bar is a median, and its whiskers are the 95 % interval. The axis names the
profile of each group and describes the profile.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .profiles import PROFILES
from .summary import Figures, Run
from .units import UNITS

_PLOTTED = (
    "bits_per_second", "cpu_seconds_per_gb", "p50_ns", "p99_ns", "pps_at_half_percent",
    "pps_delivered",
)
_MAX_GROUPS = 8  # groups of bars in one plot
_COLOURS = {
    "direct": "#9aa0a6", "vxlan": "#5f6368", "udptun": "#1a73e8", "udptun --offload off": "#8ab4f8",
    "onepacket": "#d93025", "copylimit": "#188038",
}


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(run: Run, folder: Path) -> list[str]:
    """Draw the plots into ``folder``; return the file names of the plots."""
    if not available():
        return []
    made = []
    for metric in dict.fromkeys(key[0] for key, _ in run.figures):
        for value in _PLOTTED:
            for part, figures in _parts(run.of(metric, value)):
                parts = [metric, part, value] if part else [metric, value]
                name = "-".join(parts).replace("_", "-").replace(" ", "-") + ".png"
                _bars(figures, folder / name)
                made.append(name)
    return made


def _parts(series: list[Figures]) -> list[tuple[str, list[Figures]]]:
    """Return (variant, series) per plot: one plot per variant if one plot has too many groups."""
    variants = dict.fromkeys(figures.key[2] for figures in series)
    if len(series) <= _MAX_GROUPS or len(variants) == len(series):
        return [("", series)] if series else []
    return [(v, [figures for figures in series if figures.key[2] == v]) for v in variants]


def _label(figures: Figures) -> str:
    """Return three lines: the profile, the description of the profile, and the variant."""
    _, profile, variant = figures.key
    lines = [profile, PROFILES[profile].title.replace(", ", ",\n")] if profile in PROFILES else []
    return "\n".join([*lines, variant])


def _bars(series: list[Figures], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    unit = UNITS[series[0].value]
    names = list(dict.fromkeys(name for figures in series for name in figures.names()))
    width = 0.8 / len(names)
    figure, axes = plt.subplots(figsize=(max(6.0, 1.9 * len(series) + 2), 4), dpi=120)
    for i, name in enumerate(names):
        positions, heights, below, above = [], [], [], []
        for at, figures in enumerate(series):
            level = figures.level(name)
            if level is None:
                continue
            scaled = level.scaled(unit.factor)
            positions.append(at + (i - (len(names) - 1) / 2) * width)
            heights.append(scaled.median)
            below.append(scaled.median - scaled.low)
            above.append(scaled.high - scaled.median)
        axes.bar(
            positions, heights, width, yerr=(below, above), label=name, color=_COLOURS.get(name),
            error_kw={"elinewidth": 1, "capsize": 2},
        )
    axes.set_xticks(range(len(series)), [_label(figures) for figures in series], fontsize="small")
    better = "more" if unit.more_is_better else "less"
    axes.set_title(f"{unit.title}, {unit.unit} ({better} is better)", fontsize="medium")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
