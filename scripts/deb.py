"""Build a Debian package from a bundle: ``python scripts/deb.py [CPU]``.

Writes dist/udptun_VERSION_ARCH.deb, for Debian 12. The package has what the bundle installs, in
/usr instead of /usr/local, with a virtual environment in /usr/lib/udptun. This environment belongs
to python3.11, so the package depends on it. The build runs on Debian 12.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import bundle
import release
from release import DIST, VERSION

PYTHON = "/usr/bin/python3.11"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
HOME = "usr/lib/udptun"
CONTROL = """Package: udptun
Version: {version}
Architecture: {architecture}
Maintainer: {maintainer}
Installed-Size: {size}
Depends: python3.11, libc6 (>= 2.28)
Recommends: nftables | iptables, iproute2
Section: net
Priority: optional
Description: user-space network tunnel: IP packets over UDP
 udptun connects hosts by an overlay network, on the wire format of flannel's
 UDP backend. It forwards IP packets from a TUN device, and manages leases and
 routes from etcd, Kubernetes or a file.
"""
RELOAD = """#!/bin/sh
set -e
[ ! -d /run/systemd/system ] || systemctl daemon-reload
"""
# An upgrade leaves the processes alone: a running forwarder can hand over to the new version.
STOP = """#!/bin/sh
set -e
[ "$1" = remove ] && [ -d /run/systemd/system ] || exit 0
systemctl stop 'udptun-node*.service' 'udptun-forwarder*.service'
"""


def maintainer() -> str:
    return str(release.pyproject()["project"]["authors"][0]["name"]) + " <root@localhost>"


def lay_out(run_file: Path, tree: Path) -> None:
    subprocess.run(
        [PYTHON, "-I", str(run_file), "install", "--root", str(tree), "--venv", f"/{HOME}",
         "--system", "/usr"],
        check=True, stdout=subprocess.DEVNULL,
    )
    shutil.rmtree(tree / HOME / "system")  # "activate" has copied it
    (tree / HOME / "installer.py").unlink()
    for path in [tree, *tree.rglob("*")]:
        os.utime(path, (release.epoch(), release.epoch()), follow_symlinks=False)


def write_control(tree: Path, cpu: str) -> None:
    control = tree / "DEBIAN"
    size = sum(path.lstat().st_size for path in tree.rglob("*")) // 1024
    control.mkdir()
    (control / "control").write_text(CONTROL.format(
        version=VERSION, architecture=ARCHITECTURES[cpu], maintainer=maintainer(), size=size
    ))
    for name, script in {"postinst": RELOAD, "postrm": RELOAD, "prerm": STOP}.items():
        (control / name).write_text(script)
        (control / name).chmod(0o755)


def build(cpu: str) -> Path:
    if not Path(PYTHON).exists():
        raise SystemExit(f"{PYTHON} is missing; a Debian package is built on Debian 12")
    run_file = bundle.build(cpu)
    target = DIST / f"udptun_{VERSION}_{ARCHITECTURES[cpu]}.deb"
    with tempfile.TemporaryDirectory(prefix="udptun-deb-") as scratch:
        tree = Path(scratch) / "tree"
        lay_out(run_file, tree)
        write_control(tree, cpu)
        tree.chmod(0o755)
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(tree), str(target)],
            check=True, stdout=subprocess.DEVNULL,
            env={**os.environ, "SOURCE_DATE_EPOCH": str(release.epoch())},
        )
    print(f"package: dist/{target.name}, {target.stat().st_size / 1e6:.0f} MB")
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cpu", nargs="?", choices=bundle.CPUS, default=platform.machine())
    build(parser.parse_args().cpu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
