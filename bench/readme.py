"""Writes the figures in README.md from a recorded run: what udptun costs, and the comparison.

Owns: the text between each pair of markers in README.md, and no other part of README.md. Any
thread. Numbers of a benchmark in README.md come from here only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from .goals import EXPRESS, WORKERS
from .profiles import PROFILES
from .report import table
from .summary import Run
from .units import UNITS, number, spread

_TITLES = {
    "direct": "no tunnel", "vxlan": "kernel VXLAN", WORKERS: "**udptun**",
    EXPRESS: "**udptun, `--accelerate auto`**", "udptun --offload off": "udptun, offloads off",
    "onepacket": "a C program that sends one packet per system call, as flannel's UDP backend does",
}
# (heading, metric, profile, variant, value). The tcp variant "1 there" is one stream in the
# direction from host a to host b.
_COLUMNS = (
    ("TCP, P1", "tcp", "P1", "1 there", "bits_per_second"),
    ("TCP, P2", "tcp", "P2", "1 there", "bits_per_second"),
    ("TCP, P3", "tcp", "P3", "1 there", "bits_per_second"),
    ("64-byte packets at 0.5 % loss, P1", "pps", "P1", "64 bytes", "pps_at_half_percent"),
    ("CPU, P1", "tcp", "P1", "1 there", "cpu_seconds_per_gb"),
    ("round trip, idle, P1", "rtt", "P1", "udp idle", "p50_ns"),
    ("round trip beside TCP, P1", "rtt", "P1", "udp bulk", "p50_ns"),
    ("round trip beside TCP, P2", "rtt", "P2", "udp bulk", "p50_ns"),
)
# (title, metric, variant, value, profiles)
_COSTS = (
    ("TCP throughput, one stream", "tcp", "1 there", "bits_per_second", ("P1", "P2", "P3", "P4")),
    ("TCP throughput, four streams", "tcp", "4 there", "bits_per_second", ("P1", "P2", "P3", "P4")),
    ("64-byte packets per second at 0.5 % loss", "pps", "64 bytes", "pps_at_half_percent", ("P1",)),
    ("CPU time per byte, both hosts together", "tcp", "1 there", "cpu_seconds_per_gb",
     ("P1", "P2", "P3")),
    ("round trip on idle hosts", "rtt", "udp idle", "p50_ns", ("P1",)),
    ("round trip beside a TCP stream", "rtt", "udp bulk", "p50_ns", ("P1", "P2")),
)


def comparison(run: Run) -> str:
    """Return the comparison as Markdown; ValueError if the run lacks the figures."""
    _require(run)
    columns = [(h, f) for h, *at in _COLUMNS if (f := run.get(*at)) is not None]
    names = [name for name in _TITLES if any(name in f.names() for _, f in columns)]
    header = ["", *(f"{heading}, {UNITS[f.value].unit}" for heading, f in columns)]
    rows = [
        [_TITLES[name], *(spread(f.level(name), UNITS[f.value].factor) for _, f in columns)]
        for name in names
    ]
    used = dict.fromkeys(f.key[1] for _, f in columns)
    absent = "" if EXPRESS in names else " This run did not measure `--accelerate auto`."
    return "\n".join([
        *table(header, rows), "",
        f"Medians with 95 % intervals, {_when_and_where(run)}. Both hosts, the tunnel and the load "
        "share these cores. TCP: one stream. CPU: seconds of the whole system per gigabyte. Round "
        "trip: the median time of a 64-byte request and its reply over UDP, on idle hosts or "
        f"beside one TCP stream at full rate.{absent} `make bench` measures your machine.", "",
        "The profiles differ in what happens to super-packets (TCP or UDP data of up to 64 KB that "
        "the kernel handles as one packet) on the wire between the hosts:", "",
        *(f"- {name}: {PROFILES[name].text}." for name in used),
    ])


def costs(run: Run) -> str:
    """Return the ratios to VXLAN, without and with the express path, as Markdown."""
    _require(run)
    rows = []
    for title, metric, variant, value, names in _COSTS:
        figures = {p: f for p in names if (f := run.get(metric, p, variant, value)) is not None}
        if not figures:
            continue
        better = "more" if UNITS[value].more_is_better else "less"
        cells = []
        for subject in (WORKERS, EXPRESS):
            ratios = {p: f.ratio(subject, "vxlan") for p, f in figures.items()}
            cells.append(", ".join(
                f"{number(ratio.median)} ({p})" for p, ratio in ratios.items() if ratio)
                or "not measured")
        rows.append((title, better, *cells))
    lines = table(("ratio to the kernel's VXLAN", "better", "udptun", "`--accelerate auto`"), rows)
    memory = run.get("memory", "P1", "10000 routes", "rss_bytes")
    if memory and (level := memory.level(WORKERS)):
        unit = UNITS["rss_bytes"]
        lines += ["", f"Memory: {number(level.scaled(unit.factor).median)} {unit.unit} for the "
                      "forwarder process with 10,000 routes, while it forwards a TCP stream."]
    return "\n".join([*lines, "", f"Medians, {_when_and_where(run)}."])


BLOCKS: Mapping[str, Callable[[Run], str]] = {"bench:costs": costs, "bench": comparison}


def _require(run: Run) -> None:
    if not any(WORKERS in figures.names() for figures in run.figures.values()):
        raise ValueError("this run has no figures of udptun: expected a run of quick or full")


def _when_and_where(run: Run) -> str:
    day, machine = time.strftime("%Y-%m-%d", time.gmtime(run.began)), run.machine
    return (f"measured {day} with udptun {machine.get('revision', '')} on "
            f"{_cores(str(machine.get('processor', '')))}, kernel {machine.get('kernel', '')}")


def _cores(processor: str) -> str:
    """Return "a machine with 2 CPU cores (AMD EPYC)" for "2 x AMD EPYC"."""
    count, _, name = processor.partition(" x ")
    return f"a machine with {count} CPU cores ({name})"


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def rewritten(text: str, run: Run) -> str:
    """Return ``text`` with the part between each pair of markers replaced."""
    for name, block in BLOCKS.items():
        start, stop = markers(name)
        head, begin, rest = text.partition(start)
        _, end, tail = rest.partition(stop)
        if not begin or not end:
            raise ValueError(f"markers not found: expected {start} ... {stop}")
        text = f"{head}{begin}\n{block(run)}\n{end}{tail}"
    return text


def rewrite(path: Path, run: Run) -> int:
    """Update the file at ``path``; return the exit code."""
    text = path.read_text()
    new = rewritten(text, run)
    path.write_text(new)
    print(f"{path} {'unchanged' if new == text else 'updated'}", file=sys.stderr)
    return 0
