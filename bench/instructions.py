"""Instructions that the single steps take on fixed input, counted by valgrind's callgrind.

    python -m bench instructions [--check FILE] [--save FILE]

Owns: the replay and its counting. Unlike a time, a count is the same on a busy machine: two counts
of the same build are to differ by less than ``TOLERANCE``, and CI can hold a change to it. It says
nothing of caches and branches, and valgrind offers no AVX-512: the checksum is the best it has.
The Python objects around a step are counted, too; they are the same before and after a change.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import tables
from .tools import ROOT

TOLERANCE = 0.02
_ROUNDS = 10
# Each step is collected while inside the function of the extension that wraps it.
_COLLECT = {
    "cut": "__pyx_pw_5tests_5steps_6_steps_*cut", "merge": "__pyx_pw_5tests_5steps_6_steps_*merge",
    "lookup": "__pyx_pw_5tests_5steps_6_steps_*bench",
    "out": "__pyx_pw_6udptun_5_core_6Worker_*run", "in": "__pyx_pw_6udptun_5_core_6Worker_*run",
}
STEPS = {
    "cut tcp 44 x 1420": "cut", "cut udp 64 x 64": "cut", "merge tcp 44 x 1420": "merge",
    "merge udp 64 x 64": "merge", "lookup v4 random 1000": "lookup",
    "lookup v6 random 1000": "lookup", "out tcp 44 x 1420": "out", "in tcp 44 x 1420": "in",
}


def replay(step: str) -> None:
    """What runs under valgrind: the step on its input, a few rounds."""
    kind, *words = step.split()
    with contextlib.ExitStack() as stack:
        if kind == "lookup":
            work = _look_up(words)
        elif kind in ("out", "in"):
            work = _path(stack, kind, words)
        else:
            work = _packets(kind, words)
        for _ in range(_ROUNDS):
            work()


def _packets(kind: str, words: list[str]) -> Callable[[], object]:
    from tests.steps import cut, merge

    from .micro import packets

    run = packets.run(words[0], int(words[1]), int(words[3]))
    if kind == "merge":
        return lambda: merge(run)
    frame = _super_packet(run)
    return lambda: cut(frame)


def _path(stack: contextlib.ExitStack, kind: str, words: list[str]) -> Callable[[], object]:
    """A worker's whole way with one frame, or one received run; the kernel's part not counted."""
    from .micro import packets
    from .micro.loopback import LoopbackWorker as Worker

    run = packets.run(words[0], int(words[1]), int(words[3]))
    frame, worker = _super_packet(run), stack.enter_context(Worker())

    def out() -> None:
        worker.send_frame(frame)
        worker.work()
        worker.received(worker.peer)

    def into() -> None:
        worker.send_run(run)
        worker.work()
        worker.received(worker.tun)

    return out if kind == "out" else into


def _super_packet(run: list[bytes]) -> bytes:
    """One super-packet, by the reference: the compiled merge is not to be counted here."""
    from tests import reference

    [frame] = reference.merge(run)
    return bytes(frame)


def _look_up(words: list[str]) -> Callable[[], object]:
    from tests.steps import Lpm

    family, n = int(words[0][1]), int(words[2])
    table, blob = Lpm(tables.text(n, family)), tables.addresses(words[1], n, family)
    return lambda: table.bench(blob, family, 1)


def count(step: str) -> int:
    """Instructions of one round."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        argv = [
            "valgrind", "--tool=callgrind", "--collect-atstart=no",
            f"--toggle-collect={_COLLECT[STEPS[step]]}", f"--callgrind-out-file={out}",
            sys.executable, "-m", "bench.instructions", step,
        ]
        env = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONMALLOC": "malloc"}
        done = subprocess.run(
            argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=600
        )
        if done.returncode != 0:
            raise OSError(f"valgrind failed: {done.stderr.strip()[-500:]}")
        return parse(out.read_text()) // _ROUNDS


def parse(text: str) -> int:
    """The total of a callgrind file; ValueError when nothing was collected."""
    found = re.search(r"^(?:summary|totals): (\d+)", text, re.MULTILINE)
    if found is None or int(found[1]) == 0:
        raise ValueError("valgrind collected nothing: is the extension built as it should be?")
    return int(found[1])


def compared(now: dict[str, int], before: dict[str, int]) -> list[str]:
    """The steps that take more than before, in words."""
    return [
        f"{step}: {n} instructions, {n / before[step] - 1:+.1%} of {before[step]}"
        for step, n in now.items()
        if step in before and n > before[step] * (1 + TOLERANCE)
    ]


def run(save: Path | None, check: Path | None) -> int:
    """Count all; 1 when a step takes more than in ``check``."""
    if shutil.which("valgrind") is None:
        raise OSError("needs valgrind: apt-get install -y valgrind")
    before: dict[str, int] = json.loads(check.read_text()) if check else {}
    now = {}
    for step in STEPS:
        now[step] = count(step)
        print(f"{step:<24}{now[step]:>12}", flush=True)
    if save:
        save.write_text(json.dumps(now, indent=1) + "\n")
    worse = compared(now, before)
    for line in worse:
        print(f"more than before: {line}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    replay(" ".join(sys.argv[1:]))
