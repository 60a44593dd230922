"""Counts the instructions that each step of the core executes on fixed input (with callgrind).

    python -m bench instructions [--check FILE] [--save FILE]

Owns: the replay of the steps, the counting, and the file of saved counts.

A time depends on the load of the machine; a count does not, so CI can compare counts. A step may
execute at most ``TOLERANCE`` more instructions than the saved count. A count does not show the
effects of caches and branch prediction. Valgrind does not emulate AVX-512, so the checksum uses
AVX2 at most.

Only the instructions in udptun's own compiled modules are counted. For a call into the C library or
the interpreter, the call is counted, but not the instructions of the called function. The reason is
malloc: its number of instructions depends on the layout of the heap, and the layout changes with
the length of a path or an environment variable. This changed the sum of a step by more than 1 %.

Two counts can be compared only if they have the same build and the same kind of CPU. ``build_key``
names everything that can change the executed instructions. The file has one set of counts per key.
If the file has no set for this build, ``--check`` prints "NOT COMPARED" and succeeds.

Runs in one thread. Each step runs in its own process.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from . import tables
from .tools import ROOT

TOLERANCE = 0.01
_ROUNDS = 10
_OURS = (ROOT / "udptun", ROOT / "tests")  # folders of udptun's compiled modules
_POSITIONS = tuple("0123456789+-*")  # a cost line begins with a line number: 12, +3, -3 or *
# The function of the extension that wraps the step. callgrind collects only inside this function.
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
    """Run a step on its input for ``_ROUNDS`` rounds. valgrind runs a program that calls this."""
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
    """Return a function that sends one frame, or receives one run, through a whole worker.

    valgrind does not count the kernel's instructions.
    """
    from .micro import packets
    from .micro.loopback import LoopbackWorker as Worker

    run = packets.run(words[0], int(words[1]), int(words[3]))
    frame, worker = _super_packet(run), stack.enter_context(Worker())

    def send() -> None:
        worker.send_frame(frame)
        worker.work()
        worker.received(worker.peer)

    def receive() -> None:
        worker.send_run(run)
        worker.work()
        worker.received(worker.tun)

    return send if kind == "out" else receive


def _super_packet(run: list[bytes]) -> bytes:
    """Build one super-packet with the reference implementation, which valgrind does not count."""
    from tests import reference

    [frame] = reference.merge(run)
    return bytes(frame)


def _look_up(words: list[str]) -> Callable[[], object]:
    from tests.steps import Lpm

    family, n = int(words[0][1]), int(words[2])
    table, blob = Lpm(tables.text(n, family)), tables.addresses(words[1], n, family)
    return lambda: table.bench(blob, family, 1)


def count(step: str) -> int:
    """Return the number of instructions in one round of ``step``."""
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
        return round(parse(out.read_text()) / _ROUNDS)


def parse(text: str, folders: Sequence[Path] = _OURS) -> int:
    """Return the number of instructions in the objects in ``folders``, without called functions.

    ValueError if the file has no counts. ``text`` is a callgrind file:

    - "ob=(id) path" selects an object. The cost lines after this line belong to the object.
      Only the first line with an id has the path.
    - The cost line after a "calls=" line has the cost of the called function.
    """
    paths: dict[str, str] = {}
    total, counts, callee = 0, False, False
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and name in ("ob", "cob"):
            number, _, path = value.partition(" ")
            path = paths.setdefault(number, path)
            if name == "ob":
                counts = any(Path(path).is_relative_to(folder) for folder in folders)
        elif equals and name == "calls":
            callee = True
        elif line[:1] in _POSITIONS:
            if counts and not callee:
                total += int(line.split()[1])
            callee = False
    if not total:
        raise ValueError(
            "valgrind counted no instructions of the compiled extension: run make build")
    return total


def build_key() -> str:
    """Name the build and the CPU. Two counts can be compared if and only if their keys are equal.

    A key has these parts:

    - the architecture and the SIMD path
    - the compiler that built the extension, and the Cython version that wrote the C code
    - the interpreter and the compiler that built the interpreter
    - the C library
    """
    from udptun import _core

    libc = " ".join(platform.libc_ver())
    return ", ".join((
        f"{platform.machine()} {_simd_path(Path('/proc/cpuinfo').read_text())}".strip(),
        _compiler(Path(_core.__file__).read_bytes()),
        f"Cython {metadata.version('Cython')}",
        f"{platform.python_implementation()} {platform.python_version()}"
        f" ({platform.python_compiler()})",
        libc,
    ))


def _simd_path(cpuinfo: str) -> str:
    """Return the widest instruction set that valgrind reports to the program on this CPU.

    On x86-64, valgrind emulates a CPU with AVX2, with AVX or with SSE4.2: the widest of these that
    the real CPU has. The emulated CPU decides which code of the checksum, of glibc's memcpy and of
    other functions runs.
    """
    found = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = found[1].split() if found else []
    return next((name for name in ("avx2", "avx", "sse4_2") if name in flags), "")


def _compiler(extension: bytes) -> str:
    """Return the name and version of the compiler from the extension's .comment section."""
    found = re.search(rb"GCC: \([^)]*\) [0-9.]+|clang version [0-9.]+", extension)
    return found[0].decode() if found else "unknown compiler"


def compared(now: dict[str, int], before: dict[str, int]) -> list[str]:
    """Describe each step whose count is more than ``TOLERANCE`` above the saved count."""
    return [
        f"{step}: {n} instructions, {n / before[step] - 1:+.1%} of {before[step]}"
        for step, n in now.items()
        if step in before and n > before[step] * (1 + TOLERANCE)
    ]


def run(save: Path | None, check: Path | None) -> int:
    """Count every step; return 1 if a count is too far above the count in ``check``, else 0."""
    key = build_key()
    saved = _load(check) if check else {}
    if check and not save and key not in saved:
        print(f"instruction counts NOT COMPARED: {check} has none for this build: {key}")
        return 0
    if shutil.which("valgrind") is None:
        raise OSError("needs valgrind: apt-get install -y valgrind")
    before, now = saved.get(key, {}), {}
    print(key)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for step, n in zip(STEPS, pool.map(count, STEPS), strict=True):
            now[step] = n
            change = f"{n / before[step] - 1:+9.2%}" if step in before else ""
            print(f"{step:<24}{n:>12}{change}", flush=True)
    if save:
        every = (_load(save) if save.exists() else {}) | {key: now}
        save.write_text(json.dumps(every, indent=1, sort_keys=True) + "\n")
    worse = compared(now, before)
    for line in worse:
        print(f"more than before: {line}", file=sys.stderr)
    return 1 if worse else 0


def _load(path: Path) -> dict[str, dict[str, int]]:
    """Read saved counts: ``{build key: {step: instructions}}``."""
    saved: dict[str, dict[str, int]] = json.loads(path.read_text())
    return saved


if __name__ == "__main__":
    replay(" ".join(sys.argv[1:]))
