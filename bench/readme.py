"""README.md's comparison, from a real run.

Owns: what stands between the two markers there, and nothing else of that file.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from .report import table
from .summary import Run
from .units import UNITS, spread

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

_TITLES = {
    "direct": "no tunnel", "vxlan": "kernel VXLAN", "udptun": "**udptun**",
    "udptun --offload off": "udptun, offloads off",
    "onepacket": "one packet a system call, as flannel's UDP mode does it (in C)",
}
# (heading, metric, profile, variant, value)
_COLUMNS = (
    ("TCP, super-packets pass", "tcp", "P1", "1 there", "bits_per_second"),
    ("TCP, cut in software", "tcp", "P2", "1 there", "bits_per_second"),
    ("TCP, no receive offload", "tcp", "P3", "1 there", "bits_per_second"),
    ("64-byte packets at 0.5 % loss", "pps", "P1", "64 bytes", "pps_at_half_percent"),
    ("CPU", "tcp", "P1", "1 there", "cpu_seconds_per_gb"),
    ("round trip, idle", "rtt", "P1", "udp idle", "p50_ns"),
)


def comparison(run: Run) -> str:
    """The Markdown between the markers; ValueError when the run has no such figures."""
    columns = [(h, f) for h, *at in _COLUMNS if (f := run.get(*at)) is not None]
    names = [name for name in _TITLES if any(name in f.names() for _, f in columns)]
    if "udptun" not in names:
        raise ValueError("this run did not compare udptun with anything")
    header = ["", *(f"{heading}, {UNITS[f.value].unit}" for heading, f in columns)]
    rows = [
        [_TITLES[name], *(spread(f.level(name), UNITS[f.value].factor) for _, f in columns)]
        for name in names
    ]
    day = time.strftime("%Y-%m-%d", time.gmtime(run.began))
    machine = run.machine
    return "\n".join([
        *table(header, rows), "",
        f"Medians with their 95 % intervals, {day}, udptun {machine.get('revision', '')}, "
        f"{machine.get('processor', '')}, kernel {machine.get('kernel', '')}: both hosts, the "
        "tunnel and the load share these cores. One TCP stream. Make your own with `make bench`.",
    ])


def rewritten(text: str, block: str) -> str:
    """``text`` with what is between its markers replaced."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END} there")
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def rewrite(path: Path, run: Run) -> int:
    text = path.read_text()
    new = rewritten(text, comparison(run))
    path.write_text(new)
    print(f"{path} {'is as it was' if new == text else 'was rewritten'}", file=sys.stderr)
    return 0
