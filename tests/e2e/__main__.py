"""The command line: ``python -m tests.e2e``; the docstring of the package has examples."""

import argparse
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from udptun.lab import Lab, LabError

from . import migration  # noqa: F401 - it fills the table of steps
from .cluster import Cluster
from .programs import Tell, missing
from .step import NEEDS, STEPS, with_needed
from .worker import remove_cgroups

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    """One row of the table. ``error``: the reason if the step failed."""

    name: str
    seconds: float
    measured: str
    error: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e")
    parser.add_argument("--list", action="store_true", help="list the steps")
    parser.add_argument("--step", action="append", choices=list(STEPS), metavar="NAME",
                        help="run this step, after those that it needs; can be repeated")
    parser.add_argument("--image", type=Path, metavar="TAR",
                        help="udptun's image; default: the newest in dist/")
    parser.add_argument("--keep", action="store_true", help="keep the cluster until Ctrl-C")
    options = parser.parse_args()
    if options.list:
        for name, step in STEPS.items():
            print(f"{name:16} {step.__doc__}")
        return 0
    image = options.image or max(ROOT.glob("dist/udptun-*.oci.tar"), default=None,
                                 key=lambda path: path.stat().st_mtime)
    lacks = missing()
    if image is None or not image.exists():
        lacks.append("udptun's image (make image)")
    if lacks:
        print("e2e: this machine lacks " + ", ".join(lacks), file=sys.stderr)
        return 2
    return _run(with_needed(options.step or STEPS), image, options.keep)


def _run(names: list[str], image: Path, keep: bool) -> int:
    began = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)

    results: list[Result] = []
    try:
        with Lab() as lab:
            cluster = Cluster(lab, image, tell)
            cluster.start()
            for name in names:
                passed = {result.name for result in results if not result.error}
                if NEEDS[name] in {"", *passed}:
                    results.append(_one(cluster, name, tell))
                else:
                    results.append(Result(name, 0, "", f"not run: it needs {NEEDS[name]}"))
            if keep:
                kubeconfig = cluster.plane.kubeconfig("admin", "system:masters")
                tell(f"the cluster stays until Ctrl-C: ip netns exec {cluster.plane.host.namespace}"
                     f" {cluster.plane.programs / 'kubectl'} --kubeconfig {kubeconfig} get pods -A")
                signal.pause()
    except LabError as error:
        print(f"e2e: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        remove_cgroups()
    failed = [result for result in results if result.error]
    print(f"\n{'step':16} {'':6} {'time':>6}  measured")
    for result in results:
        word = "FAILED" if result.error else "ok"
        print(f"{result.name:16} {word:6} {result.seconds:4.0f} s  "
              f"{result.error or result.measured}")
    print(f"{len(results)} steps, {len(failed)} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def _one(cluster: Cluster, name: str, tell: Tell) -> Result:
    step = STEPS[name]
    tell(f"{name}: {step.__doc__}")
    began = time.monotonic()
    try:
        measured, error = step(cluster), ""
    except (LabError, OSError) as failure:
        measured, error = "", str(failure)
    except Exception as failure:  # a mistake in one step; the others still run
        traceback.print_exc()
        measured, error = "", f"{type(failure).__name__}: {failure}"
    seconds = time.monotonic() - began
    tell(f"{name}: {'FAILED: ' + error if error else measured} ({seconds:.0f} s)")
    if error:
        print(cluster.evidence(), file=sys.stderr, flush=True)
    return Result(name, seconds, measured, error)


if __name__ == "__main__":
    sys.exit(main())
