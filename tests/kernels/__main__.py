"""The command line: ``python -m tests.kernels``; the docstring of the package has examples."""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import debs, table
from .features import FEATURES, YES
from .machine import CHECKOUT, SHARE, Ended, Machine
from .table import NOT_TRIED

# What depends on the kernel: devices, sockets, netlink, whole tunnels. Without KVM a test takes ten
# to thirty times as long, so only the first of these run then. The core's tests on bytes
# (tests/wire, tests/table) run the same instructions on every kernel.
BASIC = ("tests/net", "tests/device", "tests/netns/test_tunnel_basics.py",
         "tests/netns/test_express.py", "tests/netns/test_ecn.py")
TESTS = ("tests/path", "tests/forwarder", "tests/takeover", *BASIC[:2], "tests/netns")
MINUTES = {True: 30, False: 90}  # the limit for one kernel, with and without KVM
PAGE = CHECKOUT / "docs" / "kernels.md"
SAVED = Path(__file__).with_name("results.json")


@dataclass(frozen=True)
class Result:
    kernel: debs.Kernel
    version: str
    verdict: str
    seconds: float
    last: str
    found: dict[str, str]

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels")
    parser.add_argument("--list", action="store_true", help="list the kernels")
    parser.add_argument("--kernel", action="append", choices=list(debs.KERNELS), metavar="NAME",
                        help="only this kernel; can be repeated")
    parser.add_argument("--features", action="store_true",
                        help="run no test; write what each kernel offers to docs/kernels.md")
    parser.add_argument("--minutes", type=float,
                        help="the limit for one kernel; default: 30 with KVM, 90 without")
    parser.add_argument("--out", type=Path, help="a folder for the logs of the machines; default: "
                        "a new one in /tmp")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest: tests, -k EXPRESSION")
    options, more = parser.parse_known_args()
    if options.list:
        for kernel in debs.KERNELS.values():
            print(f"{kernel.name:6} {kernel.package} of Debian {kernel.suite}")
        return 0
    if platform.machine() != "x86_64" or os.geteuid() != 0:
        print("kernels: NOT TESTED: this needs root on x86_64", file=sys.stderr)
        return 2
    out = options.out or Path(tempfile.mkdtemp(prefix="udptun-kernels-"))
    try:
        return _run_all(options, [*options.pytest, *more], out.resolve())
    except debs.Missing as error:
        print(f"kernels: NOT TESTED: this machine lacks {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run_all(options: argparse.Namespace, arguments: list[str], out: Path) -> int:
    names = options.kernel or list(debs.KERNELS)
    unpacked = [debs.get(debs.KERNELS[name], print) for name in names]
    results = []
    kvm = os.access("/dev/kvm", os.R_OK | os.W_OK)
    if not kvm:
        print(NO_KVM.format("there is no /dev/kvm that this user may open"))
    for kernel in unpacked:
        share = out / kernel.kernel.name
        began = time.monotonic()
        print(f"== kernel {kernel.kernel.name}: {kernel.release}, {kernel.version}", flush=True)
        ended = Ended(None, False)
        for with_kvm in (True, False) if kvm else (False,):
            command = _command(arguments, options.features, with_kvm)
            limit = 60 * (options.minutes or MINUTES[with_kvm])
            ended = Machine(kernel, share, with_kvm).run(command, limit, _tell)
            if ended.started or not with_kvm:
                break
            print(NO_KVM.format(f"/dev/kvm does not start this kernel ({ended.reason})"),
                  flush=True)
            kvm = False
        results.append(_result(kernel, ended, share, time.monotonic() - began))
    if options.features:
        _write_page(results)
    return _summary(results, out)


NO_KVM = "WARNING: {}. QEMU translates all instructions, which takes 10 to 30 times as long."


def _tell(text: str) -> None:
    print(text, end="", flush=True)


def _command(arguments: list[str], features: bool, kvm: bool) -> str:
    """Return the shell command for the virtual machine."""
    python = shlex.quote(sys.executable)
    steps = [f"{python} -m tests.kernels.features {SHARE}/features"]
    if not features:
        tests = [] if any(Path(word.partition("::")[0]).exists() for word in arguments) else [
            *(TESTS if kvm else BASIC)]
        slow = [] if "-m" in arguments else ["-m", "not slow"]
        words = [*slow, "-v", "--color=no", "-o", f"faulthandler_timeout={60 if kvm else 600}",
                 "-p", "no:cacheprovider", f"--junitxml={SHARE}/junit.xml", *arguments, *tests]
        steps.append(f"{python} -m pytest {shlex.join(words)}")
    return "status=0\n" + "".join(f"{step} || status=1\n" for step in steps) + "exit $status\n"


def _result(kernel: debs.Unpacked, ended: Ended, share: Path, seconds: float) -> Result:
    verdict = "passed" if ended.code == 0 else "FAILED"
    output = share / "output"
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    counts = [line.strip("= ") for line in lines if line.startswith("=") and " in " in line]
    last = ended.reason or (counts[-1] if counts else "")
    features = share / "features"
    found = json.loads(features.read_text()) if features.exists() else {}
    return Result(kernel.kernel, kernel.version, verdict, seconds, last, found)


def _write_page(results: list[Result]) -> None:
    """Write the page. A kernel that was not in this run keeps its last results."""
    saved: dict[str, dict[str, Any]] = json.loads(SAVED.read_text()) if SAVED.exists() else {}
    for result in results:
        if result.found:
            saved[result.kernel.name] = {"version": result.version, "found": result.found}
    SAVED.write_text(json.dumps(saved, indent=1) + "\n")
    PAGE.write_text(table.page(table.rows(debs.KERNELS, saved)))
    print(f"wrote {PAGE}")


def _summary(results: list[Result], out: Path) -> int:
    print(f"\n{'kernel':7} {'package':24} {'':7} {'time':>7}")
    for result in results:
        print(f"{result.kernel.name:7} {result.version:24} {result.verdict:7} "
              f"{result.seconds:5.0f} s  {result.last}")
        for name in FEATURES:
            if (why := result.found.get(name, NOT_TRIED)) != YES:
                print(f"{'':8}{name}: {why}")
    failed = not all(result.passed for result in results)
    print(f"the logs of the machines: {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
