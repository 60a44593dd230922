"""Writes the comparison table in README.md from a recorded run.

Owns: the text between the two markers in README.md, and no other part of README.md. Any thread.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from .profiles import PROFILES
from .report import table
from .summary import Run
from .units import UNITS, spread

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

_TITLES = {
    "direct": "no tunnel", "vxlan": "kernel VXLAN", "udptun": "**udptun**",
    "udptun --offload off": "udptun, offloads off",
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
)


def comparison(run: Run) -> str:
    """Return the Markdown between the markers; ValueError if the run lacks the figures."""
    columns = [(h, f) for h, *at in _COLUMNS if (f := run.get(*at)) is not None]
    names = [name for name in _TITLES if any(name in f.names() for _, f in columns)]
    if "udptun" not in names:
        raise ValueError("this run has no figures of udptun: expected a run of quick or full")
    header = ["", *(f"{heading}, {UNITS[f.value].unit}" for heading, f in columns)]
    rows = [
        [_TITLES[name], *(spread(f.level(name), UNITS[f.value].factor) for _, f in columns)]
        for name in names
    ]
    day = time.strftime("%Y-%m-%d", time.gmtime(run.began))
    machine = run.machine
    used = dict.fromkeys(f.key[1] for _, f in columns)
    return "\n".join([
        *table(header, rows), "",
        f"Medians with 95 % intervals, measured {day} with udptun {machine.get('revision', '')} on "
        f"{_cores(str(machine.get('processor', '')))}, kernel "
        f"{machine.get('kernel', '')}. Both hosts, the tunnel and the load share these cores. TCP: "
        "one stream. CPU: seconds of the whole system per gigabyte. `make bench` measures your "
        "machine.", "",
        "The profiles differ in what happens to super-packets (TCP or UDP data of up to 64 KB that "
        "the kernel handles as one packet) on the wire between the hosts:", "",
        *(f"- {name}: {PROFILES[name].text}." for name in used),
    ])


def _cores(processor: str) -> str:
    """Return "a machine with 2 CPU cores (AMD EPYC)" for "2 x AMD EPYC"."""
    number, _, name = processor.partition(" x ")
    return f"a machine with {number} CPU cores ({name})"


def rewritten(text: str, block: str) -> str:
    """Return ``text`` with the part between the markers replaced by ``block``."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"markers not found: expected {BEGIN} ... {END}")
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def rewrite(path: Path, run: Run) -> int:
    """Update the file at ``path``; return the exit code."""
    text = path.read_text()
    new = rewritten(text, comparison(run))
    path.write_text(new)
    print(f"{path} {'unchanged' if new == text else 'updated'}", file=sys.stderr)
    return 0
