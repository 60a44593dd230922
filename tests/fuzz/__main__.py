"""Run the harnesses: ``python -m tests.fuzz check|run|planted|minimize|repeat``; see ``--help``.

Owns build/fuzz, the time of each harness, and the corpora in tests/fuzz/corpus.
"""

import argparse
import base64
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import native, planted
from .seeds import seeds

HERE = Path(__file__).resolve().parent
OUT = native.ROOT / "build" / "fuzz"
CORPUS = HERE / "corpus"
MAX_LEN = "1500"  # bytes of one input
KEPT_INPUTS = 150  # the shortest inputs, which ``minimize`` keeps
PYTHON = tuple(bug.harness for bug in planted.PYTHON)
ALL = (*native.HARNESSES, *PYTHON)
GROUPS = {"native": native.HARNESSES, "python": PYTHON}


@dataclass(frozen=True)
class Result:
    harness: str
    passed: bool
    seconds: float
    text: str  # of the fuzzer

    @property
    def found(self) -> bool:
        """Return whether an input failed, and not the start of the program."""
        return not self.passed and "Test unit written to" in self.text

    @property
    def runs(self) -> str:
        for line in self.text.splitlines():
            if line.startswith("stat::number_of_executed_units:"):
                return line.split()[-1]
        return "?"


def unpack(harness: str, folder: Path) -> None:
    """Write the inputs of a corpus as files, because libFuzzer reads a directory."""
    folder.mkdir(parents=True, exist_ok=True)
    path = CORPUS / f"{harness}.txt"
    lines = path.read_text().split() if path.exists() else []
    for i, data in enumerate([*seeds(harness), *map(base64.b64decode, lines)]):
        (folder / f"known-{i:04}").write_bytes(data)


def command(harness: str, program: Path) -> list[str]:
    if harness in PYTHON:
        return [sys.executable, "-m", "tests.fuzz.guided", harness]
    return [str(program)]


def fuzz(harness: str, arguments: list[str], program: Path, *, tree: Path = native.ROOT,
         bug: int = 0, deadline: float = 600) -> Result:
    """Run a harness with libFuzzer's arguments. ``passed`` is False if it found something."""
    environment = os.environ | {
        "FUZZ_HARNESS": harness, "FUZZ_PLANTED": str(bug), "PYTHONPATH": str(tree),
        "ASAN_OPTIONS": "detect_leaks=1:quarantine_size_mb=16",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    began = time.monotonic()
    done = subprocess.run(
        [*command(harness, program), "-print_final_stats=1", f"-max_len={MAX_LEN}", *arguments],
        cwd=tree, env=environment, text=True, errors="replace", timeout=deadline, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    return Result(harness, done.returncode == 0, time.monotonic() - began, done.stdout)


def build() -> Path:
    return native.build(native.ROOT / "src_ext", OUT / "native")


def in_parallel(jobs: Iterable[tuple[object, ...]], function: object) -> list[Result]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: function(*job), jobs))  # type: ignore[operator]


def run(names: list[str], seconds: int) -> int:
    """Fuzz each harness for its share of ``seconds``, which is the time of the whole run."""
    program = build()
    share = max(1, seconds * (os.cpu_count() or 1) // len(names))

    def one(harness: str) -> Result:
        found, known = OUT / "found" / harness, OUT / "known" / harness
        shutil.rmtree(known, ignore_errors=True)
        unpack(harness, known)
        found.mkdir(parents=True, exist_ok=True)
        crashes = OUT / "crashes" / f"{harness}-"
        crashes.parent.mkdir(exist_ok=True)
        result = fuzz(
            harness, [f"-max_total_time={share}", f"-artifact_prefix={crashes}", str(found),
                      str(known)], program,
        )
        print(f"{harness:14} {'passed' if result.passed else 'FAILED':7} {result.seconds:5.1f} s "
              f"{result.runs:>10} inputs", flush=True)
        return result

    results = in_parallel([(name,) for name in names], one)
    failed = [result for result in results if not result.passed]
    for result in failed:
        print(f"\n== {result.harness}\n{result.text[-6000:]}")
        print(f"The input is in {OUT}/crashes. To repeat:"
              f" python -m tests.fuzz repeat {result.harness} FILE")
    return 1 if failed else 0


def find_planted(names: list[str], seconds: int) -> int:
    """Run each harness with one bug at a time. It must be found within ``seconds``."""
    program = native.build(planted.plant_native(OUT / "planted"), OUT / "planted" / "native")
    jobs = [(bug, number) for number, bug in enumerate(planted.NATIVE, start=1)]
    jobs += [(bug, 0) for bug in planted.PYTHON]
    jobs = [job for job in jobs if job[0].harness in names]

    def one(bug: planted.Bug, number: int) -> Result:
        folder = OUT / "planted" / f"{bug.harness}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        unpack(bug.harness, folder / "corpus")
        tree = native.ROOT if number else planted.plant_python(bug, folder / "tree")
        result = fuzz(
            bug.harness, [f"-max_total_time={seconds}", f"-artifact_prefix={folder}/",
                          str(folder / "corpus")], program, tree=tree, bug=number,
        )
        verdict = "found" if result.found else "NOT FOUND"
        print(f"{bug.harness:14} {verdict:9} {result.seconds:5.1f} s  without: {bug.check}",
              flush=True)
        return result

    missed = [result for result in in_parallel(jobs, one) if not result.found]
    for result in missed:
        print(f"\n== {result.harness}\n{result.text[-2000:]}")
    return 1 if missed else 0


def check() -> int:
    """Check without clang that the harnesses match the source: that Cython can translate them, and
    that each bug can be planted."""
    out = OUT / "check"
    try:
        for bug in planted.PYTHON:
            bug.plant((native.ROOT / bug.file).read_text(), str(bug.without))
        native.translate(planted.plant_native(out), out / "native")
    except ValueError as error:
        print(f"tests/fuzz/planted.py: {error}", file=sys.stderr)
    except subprocess.CalledProcessError:  # Cython has printed the errors
        print("tests/fuzz/native.pyx does not match src_ext", file=sys.stderr)
    else:
        return 0
    return 1


def merge(harness: str, program: Path, known: Path, found: Path) -> list[bytes]:
    """Return inputs that reach the same code as those in both directories."""
    if harness in PYTHON:  # atheris cannot merge; each input of ``found`` reached new code
        return [path.read_bytes() for path in (*known.iterdir(), *found.iterdir())]
    small = OUT / "small" / harness
    shutil.rmtree(small, ignore_errors=True)
    small.mkdir(parents=True)
    result = fuzz(harness, ["-merge=1", str(small), str(known), str(found)], program)
    if not result.passed:
        raise SystemExit(result.text[-3000:])
    return [path.read_bytes() for path in small.iterdir()]


def minimize(names: list[str]) -> int:
    """Replace each corpus in the repository by few small inputs that reach the same code."""
    program = build()
    CORPUS.mkdir(exist_ok=True)
    for harness in names:
        known = OUT / "known" / harness
        unpack(harness, known)
        found = OUT / "found" / harness
        found.mkdir(parents=True, exist_ok=True)
        inputs = set(merge(harness, program, known, found)) - set(seeds(harness))
        kept = sorted(inputs, key=lambda data: (len(data), data))[:KEPT_INPUTS]
        (CORPUS / f"{harness}.txt").write_text(
            "".join(f"{base64.b64encode(data).decode()}\n" for data in kept)
        )
        print(f"{harness:14} {len(kept)} of {len(inputs)} inputs", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("check", help="show that the harnesses match the source; a few seconds")
    one = actions.add_parser("run", help="fuzz all harnesses, or those named")
    one.add_argument("--seconds", type=int, default=120, help="time of the whole run")
    one.add_argument("names", nargs="*", metavar="HARNESS", help=" ".join((*GROUPS, *ALL)))
    one = actions.add_parser("planted", help="show that each harness finds a bug")
    one.add_argument("--seconds", type=int, default=20, help="time for each bug")
    one.add_argument("names", nargs="*", metavar="HARNESS")
    one = actions.add_parser("minimize", help="write the corpora of the repository again")
    one.add_argument("names", nargs="*", metavar="HARNESS")
    one = actions.add_parser("repeat", help="run one harness on the inputs in files")
    one.add_argument("harness", choices=ALL)
    one.add_argument("files", nargs="+")
    arguments = parser.parse_args()
    if arguments.action == "check":
        return check()
    if arguments.action == "repeat":
        files = [str(Path(name).resolve()) for name in arguments.files]
        result = fuzz(arguments.harness, files, build())
        print(result.text)
        return 0 if result.passed else 1
    names = [one for name in arguments.names for one in GROUPS.get(name, (name,))] or list(ALL)
    if unknown := set(names) - set(ALL):
        parser.error(f"unknown: {' '.join(sorted(unknown))}")
    if arguments.action == "minimize":
        return minimize(names)
    return {"run": run, "planted": find_planted}[arguments.action](names, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
