"""Draws a CPU profile of the whole machine while one TCP stream crosses the tunnel.

    python -m bench flame [--contender SPEC] [--profile P1] [--seconds 5] --out FOLDER

The output is a flame graph and a table.

Owns: sampling (perf, all cores, kernel and user space), folding of the stacks, drawing. Main thread
only, like udptun.lab. Needs perf and root. Samples of the idle loop are counted separately, so all
shares are shares of the busy time.
"""

from __future__ import annotations

import html
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from udptun.lab import Lab, LabError

from . import system
from .contenders import find
from .load import bulk
from .profiles import PROFILES

HERTZ = 1999  # no multiple or divisor of the timer tick: samples must not align with the tick
_EXTRA_SECONDS = 2  # the stream runs longer than the sampling, so it runs at each sample
_IDLE = ("swapper", "[idle]")
_FRAME = re.compile(r"\s*[0-9a-f]+ (?P<symbol>.+?)(?:\+0x[0-9a-f]+)? \((?P<where>[^()]*)\)$")

# Categories for the innermost frame. The first expression that matches gives the category.
KINDS = (
    ("copying", r"rep_movs|copy_(?:to|from)|_copy_|memcpy|memmove|copyin|copyout|__pi_memcpy"),
    ("checksums", r"csum"),
    ("udptun's core, other than checksums", r"__pyx_"),
    ("waking and switching", r"sched|wake|futex|finish_task_switch|(?<!napi_)poll|select|_raw_spin|"
                             r"pick_next|update_curr|enqueue_task|dequeue"),
    ("entering the kernel", r"syscall|entry_|exit_to_user|irqentry|sysret"),
    ("memory for packets", r"alloc|kfree|free|page|slab|kmem|skb_release|put_page"),
    ("packets in the kernel", r"tcp|udp|ip_|ip6|skb|dev_|netif|veth|tun_|sock|net_rx|fib|napi|gro|"
                              r"nf_|dst|neigh|process_backlog|softirq"),
)
OTHER = "everything else"

_WIDTH, _ROW, _TEXT, _TOP = 1200, 17, 6.6, 44
_COLOURS = {"kernel": "#e8895b", "core": "#5aa469", "user": "#8fa7c4", "thread": "#c9c9c9"}


@dataclass
class Node:
    """One stack frame, with the number of samples in this frame and in its callees."""

    name: str
    kind: str = "thread"
    samples: int = 0
    children: dict[str, Node] = field(default_factory=dict)

    def add(self, frames: Sequence[tuple[str, str]]) -> None:
        self.samples += 1
        if frames:
            (name, kind), *rest = frames
            self.children.setdefault(name, Node(name, kind)).add(rest)


def stacks(script: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield (comm, frames from root to leaf) for each sample in the output of ``perf script``."""
    for block in script.split("\n\n"):
        comm, *lines = block.strip("\n").split("\n")
        if not comm.strip():
            continue
        frames = [(m["symbol"], _kind(m["symbol"], m["where"])) for m in map(_FRAME.match, lines)
                  if m]
        yield comm.strip(), frames[::-1]


def _kind(symbol: str, where: str) -> str:
    if "kernel" in where or where.endswith(".ko"):
        return "kernel"
    return "core" if "__pyx_" in symbol or "udptun_" in symbol else "user"


def shares(samples: Iterable[tuple[str, Sequence[tuple[str, str]]]]) -> tuple[Counter[str], int]:
    """Return the busy samples by category of the innermost frame, and the idle samples' number."""
    found: Counter[str] = Counter()
    idle = 0
    for comm, frames in samples:
        if comm in _IDLE:
            idle += 1
        else:
            leaf = frames[-1][0] if frames else ""
            found[next((k for k, pattern in KINDS if re.search(pattern, leaf)), OTHER)] += 1
    return found, idle


def table(found: Counter[str], idle: int, title: str) -> str:
    busy = found.total()
    rows = [f"| {kind} | {n / busy:.1%} |" for kind, n in found.most_common()]
    return "\n".join([
        f"{title}: {busy} samples, {idle / (busy + idle):.0%} of the time idle.", "",
        "| own time in | of the busy time |", "|---|---|", *rows, "",
    ])


def draw(root: Node, title: str) -> str:
    """Return the flame graph as SVG: width is time, depth is the call depth, the root is on top."""
    boxes: list[str] = []
    height = _boxes(root, 0.0, _WIDTH / root.samples, 0, boxes)
    full = _TOP + height * _ROW + 10
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {full}" '
        'font-family="Verdana, DejaVu Sans, sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="8" y="18" font-size="14">{html.escape(title)}</text>',
        '<text x="8" y="34" fill="#555">kernel orange, udptun\'s core green, other programs '
        "blue; the tooltip shows the share</text>",
        *boxes, "</svg>", "",
    ])


def _boxes(node: Node, x: float, scale: float, depth: int, out: list[str]) -> int:
    width = node.samples * scale
    if width < 0.5:
        return depth
    y = _TOP + depth * _ROW
    name = html.escape(node.name)
    label = node.name if len(node.name) * _TEXT < width - 6 else (
        node.name[: int((width - 6) / _TEXT)] if width > 30 else ""
    )
    out.append(
        f'<g><title>{name}: {node.samples * scale / _WIDTH:.1%}</title>'
        f'<rect x="{x:.1f}" y="{y}" width="{max(width - 0.4, 0.2):.1f}" height="{_ROW - 1}" '
        f'fill="{_COLOURS[node.kind]}"/>'
        f'<text x="{x + 3:.1f}" y="{y + 12}">{html.escape(label)}</text></g>'
    )
    deepest = depth + 1
    for child in sorted(node.children.values(), key=lambda c: c.name):
        deepest = max(deepest, _boxes(child, x, scale, depth + 1, out))
        x += child.samples * scale
    return deepest


def run(contender: str, profile: str, seconds: int, folder: Path) -> None:
    """Sample one stream; write FOLDER/flame.svg and FOLDER/profile.md."""
    found = find(contender)
    if profile not in found.profiles:
        raise ValueError(
            f"contender {contender!r} on profile {profile}: "
            f"expected profile {', '.join(found.profiles)}"
        )
    with Lab() as lab, tempfile.TemporaryDirectory() as scratch:
        path = found.set_up(lab)
        path.link.profile(profile)
        data = Path(scratch) / "perf.data"
        with bulk(path, seconds + _EXTRA_SECONDS):
            print(f"sampling {contender} for {seconds} s", flush=True)
            _perf("record", "-a", "-g", "-F", str(HERTZ), "-e", "cpu-clock", "-o", str(data), "--",
                  "sleep", str(seconds))
        script = _perf("script", "-i", str(data), "-F", "comm,ip,sym,dso")
    samples = list(stacks(script))
    busy, idle = shares(samples)
    if not busy:
        raise LabError("perf recorded no sample of a busy CPU")
    machine = system.facts()
    title = (
        f"{contender}, one TCP stream, {profile} ({PROFILES[profile].title}), "
        f"kernel {machine['kernel']}"
    )
    root = Node("all")
    for comm, frames in samples:
        if comm not in _IDLE:
            root.add([(comm, "thread"), *frames])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "flame.svg").write_text(draw(root, title))
    text = table(busy, idle, title)
    (folder / "profile.md").write_text(text)
    print(f"\n{text}\n{folder}/flame.svg")


def _perf(*argv: str) -> str:
    try:
        done = subprocess.run(["perf", *argv], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LabError("needs perf: apt-get install -y linux-perf") from None
    if done.returncode != 0:
        raise LabError(f"perf {argv[0]}: {done.stderr.strip()}")
    return done.stdout
