"""Each package of a release works on a machine that has nothing else.

Installs it into a minimal Debian 12 with the command of its page (deploy/README.md), then runs
``udptun demo`` there: two hosts, a tunnel, pings and TCP. The machine is a directory with its own
mount namespace. Needs root, mmdebstrap, Debian's packages, PyPI, and the files in dist/:
``make deb bundle``.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

DIST = Path(__file__).resolve().parent.parent / "dist"
SECONDS = 900
ENTER = """
set -e
cd "$1"
shift
mount -t overlay machine -o lowerdir=base,upperdir=up,workdir=work root
cd root
mount --rbind /dev dev
mount -t proc proc proc
mount -t sysfs sys sys
mount -t tmpfs run run
cp /etc/resolv.conf /etc/hosts etc/
cp /etc/ssl/certs/ca-certificates.crt etc/ssl/certs/
exec chroot . "$@"
"""


@dataclass(frozen=True)
class Kind:
    """A package: its file in dist/, the Debian packages that it requires, and how to install it."""

    pattern: str
    requires: str
    command: str


KINDS = {
    "deb": Kind("udptun_*_amd64.deb", "", "apt-get install -qy /{file}"),
    "bundle": Kind("udptun-*-x86_64.run", "python3", "sh /{file}"),
    "wheel": Kind("udptun-*-cp311-*-manylinux*_x86_64.whl", "python3-venv", (
        "python3 -m venv /opt/udptun && /opt/udptun/bin/pip install '/{file}[etcd,kube]'"
        " && ln -s /opt/udptun/bin/udptun /usr/local/bin/udptun")),
}


def obstacle() -> str | None:
    if os.geteuid() != 0:
        return "a machine of its own needs root"
    if platform.machine() != "x86_64":
        return "the packages in dist/ are for x86_64"
    if shutil.which("mmdebstrap") is None:
        return "mmdebstrap is missing: apt-get install -y mmdebstrap"
    return None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3 * SECONDS),
    pytest.mark.skipif(obstacle() is not None, reason=str(obstacle())),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("debian") / "base"
    subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates",
                    "bookworm", str(folder)], check=True, timeout=SECONDS)
    return folder


class Machine:
    """A minimal Debian with this machine's name servers and certificates. What its programs write
    is below ``folder``."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        (folder / "base").symlink_to(base)
        for name in ("up", "work", "root"):
            (folder / name).mkdir()

    def add(self, file: Path) -> None:
        shutil.copy(file, self.folder / "up")

    def run(self, command: str, *, check: bool = True) -> str:
        """Run a shell command there. Return its output."""
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", ENTER, "sh", str(self.folder), "sh", "-c", command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS,
            check=False)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout[-3000:]}"
        return done.stdout


@pytest.mark.parametrize("name", KINDS)
def test_a_package_works_on_a_machine_that_has_nothing_else(name, base, tmp_path):
    kind = KINDS[name]
    if (file := next(iter(sorted(DIST.glob(kind.pattern))), None)) is None:
        pytest.skip(f"dist/{kind.pattern} is missing: make deb bundle")
    machine = Machine(tmp_path, base)
    machine.add(file)
    machine.run("apt-get update -q")
    if kind.requires:
        machine.run(f"apt-get install -qy --no-install-recommends {kind.requires}")
    machine.run(kind.command.format(file=file.name))
    version = file.name.replace("_", "-").split("-")[1]
    assert machine.run("udptun version").startswith(f"udptun {version}")
    # The demo names the Debian packages of its tools.
    missing = machine.run("udptun demo", check=False)
    install = re.search(r"apt-get install -y [a-z0-9 -]+", missing)
    assert install, missing
    machine.run(install[0])
    shown = machine.run("udptun demo")
    assert shown.count("20 of 20 came back") == 3, shown
    assert "removed 4 namespaces" in shown
