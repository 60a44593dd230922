"""Install udptun from the bundle that this file is in, or from the tree that it was copied to.

    sh udptun-VERSION-CPU.run                     install VERSION, make it the active version
    sh udptun-VERSION-CPU.run install --inactive  install VERSION beside the active version
    python3 /opt/udptun/VERSION/installer.py activate
    python3 /opt/udptun/VERSION/installer.py uninstall

Each version has a directory of its own with a virtual environment. The active version also has the
command /usr/local/bin/udptun, units, man pages, shell completion and a few files more below
/usr/local. Uninstalling leaves the configuration (/etc/udptun) and the state (/var/lib/udptun) in
place.

Uses only the standard library, without venv and ensurepip, which Debian has in other packages.
"""

import argparse
import compileall
import filecmp
import os
import platform
import py_compile
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

BASE = "/opt/udptun"
SYSTEM = "/usr/local"
LAUNCHER = """#!{python}
import sys

from udptun.cli import main

if __name__ == "__main__":
    sys.exit(main())
"""


class Place:
    """The paths of one version. ``root`` stands before each path, as for a chroot.

    venv    directory of the virtual environment
    system  directory of the command, the units and the man pages
    """

    def __init__(self, root: str, venv: str, system: str) -> None:
        self.root, self.venv, self.system = root.rstrip("/"), venv, system

    def at(self, *parts: str) -> Path:
        return Path(self.root + "/".join(parts))

    @property
    def share(self) -> Path:
        """The files of the active version, as below ``system``."""
        return self.at(self.venv, "system")

    @property
    def command(self) -> Path:
        return self.at(self.system, "bin/udptun")

    @property
    def is_active(self) -> bool:
        return self.command.is_symlink() and str(self.command.readlink()).startswith(
            f"{self.venv}/"
        )


def fits(wheel: str) -> bool:
    """Does this Python take the wheel? The bundle has only wheels for one kind of CPU."""
    *_, python, abi, _ = wheel.removesuffix(".whl").split("-")
    own = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    return own in python.split(".") or abi == "abi3" or "py3" in python.split(".")


def unpack_wheel(wheel: zipfile.ZipFile, packages: Path) -> None:
    for entry in wheel.infolist():
        if entry.is_dir():
            continue
        name = entry.filename
        if ".data/" in name:  # NAME-VERSION.data/KIND/PATH
            _, kind, name = name.split("/", 2)
            if kind not in {"purelib", "platlib"}:
                continue
        target = packages / name
        if packages not in target.parents:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(wheel.read(entry))
        target.chmod(0o755 if ".so" in target.suffixes else 0o644)


def make_venv(bundle: zipfile.ZipFile, place: Place) -> None:
    python = os.path.realpath(sys.executable)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    home = place.at(place.venv)
    packages = home / "lib" / f"python{version}" / "site-packages"
    packages.mkdir(parents=True)
    (home / "bin").mkdir()
    (home / "pyvenv.cfg").write_text(
        f"home = {Path(python).parent}\ninclude-system-site-packages = false\n"
        f"version = {platform.python_version()}\n"
    )
    (home / "bin" / "python").symlink_to(python)
    for name in bundle.namelist():
        if name.endswith(".whl") and fits(name):
            with bundle.open(name) as file, zipfile.ZipFile(file) as wheel:
                unpack_wheel(wheel, packages)
    launcher = home / "bin" / "udptun"
    launcher.write_text(LAUNCHER.format(python=f"{place.venv}/bin/python"))
    launcher.chmod(0o755)
    # Files whose times do not matter: the same bytes at each installation.
    compileall.compile_dir(
        packages, quiet=2, maxlevels=20, stripdir=place.root or None,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def copy_system(bundle: zipfile.ZipFile, place: Place) -> None:
    """Copy the files of the active version into the version's directory."""
    for entry in bundle.infolist():
        if entry.filename.startswith("system/"):
            target = place.at(place.venv, entry.filename)
            target.parent.mkdir(parents=True, exist_ok=True)
            data = bundle.read(entry)
            if target.suffix == ".service":
                data = data.replace(f"{SYSTEM}/bin/".encode(), f"{place.system}/bin/".encode())
            target.write_bytes(data)


def install(bundle: zipfile.ZipFile, place: Place) -> None:
    home = place.at(place.venv)
    if home.exists():
        raise SystemExit(f"udptun: {home} exists; run its installer.py uninstall first")
    try:
        make_venv(bundle, place)
        copy_system(bundle, place)
        (home / "installer.py").write_bytes(bundle.read("__main__.py"))
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise


def system_files(place: Place) -> list[Path]:
    return sorted(p.relative_to(place.share) for p in place.share.rglob("*") if p.is_file())


def activate(place: Place) -> None:
    for other in versions(place):
        if other.is_active:
            deactivate(other)
    for path in system_files(place):
        target = place.at(place.system, str(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place.share / path, target)
    place.command.parent.mkdir(parents=True, exist_ok=True)
    place.command.unlink(missing_ok=True)
    place.command.symlink_to(f"{place.venv}/bin/udptun")
    reload_units(place)


def deactivate(place: Place) -> None:
    """Remove the files that ``activate`` wrote, unless they have changed since."""
    for path in system_files(place):
        target = place.at(place.system, str(path))
        if target.is_file() and filecmp.cmp(target, place.share / path, shallow=False):
            target.unlink()
            for parent in target.parents:
                if "udptun" in parent.parts and not any(parent.iterdir()):
                    parent.rmdir()
    if place.is_active:
        place.command.unlink()
    reload_units(place)


def uninstall(place: Place) -> None:
    home = place.at(place.venv)
    was_active = place.is_active
    if was_active:
        deactivate(place)
    shutil.rmtree(home)
    left = versions(place)
    if was_active and left:
        activate(left[-1])
        print(f"udptun: {left[-1].venv} is the active version now")
    elif not left and not any(home.parent.iterdir()):
        home.parent.rmdir()


def versions(place: Place) -> list[Place]:
    """Return the installed versions, the oldest first."""
    base = place.at(place.venv).parent

    def order(path: Path) -> list[tuple[bool, int, str]]:
        parts = path.name.replace("-", ".").split(".")
        return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]

    homes = [path.parent for path in base.glob("*/installer.py")]
    return [
        Place(place.root, f"{Path(place.venv).parent}/{path.name}", place.system)
        for path in sorted(homes, key=order)
    ]


def reload_units(place: Place) -> None:
    if not place.root and Path("/run/systemd/system").exists():
        subprocess.run(["systemctl", "daemon-reload"], check=False)


def parse(bundled: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="udptun-installer", description="Install udptun.")
    actions = ["install", "uninstall"] if bundled else ["activate", "uninstall"]
    parser.add_argument("action", nargs="?", choices=actions, default=actions[0])
    parser.add_argument("--inactive", action="store_true",
                        help="install beside the active version, without units and man pages")
    parser.add_argument("--root", default="", help="directory that stands for /")
    parser.add_argument("--venv", help=f"directory of this version  [default: {BASE}/VERSION]")
    parser.add_argument("--system", default=SYSTEM,
                        help="directory of the command and the units  [default: %(default)s]")
    return parser.parse_args()


def main() -> int:
    source = Path(__file__).resolve().parent  # the bundle, or the version's directory
    bundled = source.is_file()
    options = parse(bundled)
    if bundled:
        with zipfile.ZipFile(source) as bundle:
            version = bundle.read("VERSION").decode()
            place = Place(options.root, options.venv or f"{BASE}/{version}", options.system)
            if options.action == "install":
                install(bundle, place)
                print(f"udptun {version} is in {place.venv}")
    else:
        root = options.root.rstrip("/")
        place = Place(root, str(source).removeprefix(os.path.realpath(root) if root else ""),
                      options.system)
    if options.action == "uninstall":
        uninstall(place)
    elif not options.inactive:
        activate(place)
        print(f"udptun: the command is {place.system}/bin/udptun")
    return 0


if __name__ == "__main__":
    sys.exit(main())
