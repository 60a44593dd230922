"""The kernels, and their packages: downloaded, unpacked, kept in a cache.

Owns: the list of kernels, and the cache, ``~/.cache/udptun-kernels``. Does not depend on the
virtual machine. apt-get verifies the packages. It uses lists of its own, so the host's apt does not
change.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "udptun-kernels"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


@dataclass(frozen=True)
class Kernel:
    """A kernel: its version, Debian's release, and the package that depends on the newest build."""

    name: str
    suite: str
    package: str = "linux-image-amd64"


# The packages of the flavours "cloud" and "rt" have other names.
KERNELS = {kernel.name: kernel for kernel in (
    Kernel("5.10", "bullseye"),
    Kernel("6.1", "bookworm"),
    Kernel("6.12", "trixie"),
)}


class Missing(Exception):
    """The host lacks something that the run needs."""


@dataclass(frozen=True)
class Unpacked:
    """A kernel in the cache. ``release`` is its ``uname -r``."""

    kernel: Kernel
    release: str
    version: str
    root: Path

    @property
    def image(self) -> Path:
        return self.root / f"boot/vmlinuz-{self.release}"

    @property
    def modules(self) -> Path:
        return self.root / f"lib/modules/{self.release}"


def get(kernel: Kernel, tell: Callable[[str], None]) -> Unpacked:
    """Return the newest build of the kernel. Download and unpack it if the cache does not have it.

    Without a connection, the build in the cache is used.
    """
    folder = CACHE / kernel.name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        package, version = _newest(kernel, folder)
    except subprocess.CalledProcessError as error:
        if not (builds := sorted(folder.glob("root/*"), key=lambda path: path.stat().st_mtime)):
            raise Missing(f"the package of kernel {kernel.name}: {error.stderr.strip()}") from error
        package, _, version = builds[-1].name.partition("_")
        tell(f"{kernel.name}: the mirror does not answer, the build in {folder} is used")
    release = package.removeprefix("linux-image-")
    root = folder / "root" / f"{package}_{version}"
    if not root.exists():
        tell(f"{kernel.name}: downloading {package} {version}")
        _unpack(kernel, package, folder, root, release)
    return Unpacked(kernel, release, version, root)


def _apt(kernel: Kernel, folder: Path) -> list[str]:
    """Return the options of apt with which it knows only the kernel's release."""
    (folder / "lists/partial").mkdir(parents=True, exist_ok=True)
    (folder / "archives/partial").mkdir(parents=True, exist_ok=True)
    sources = folder / "sources.list"
    sources.write_text("".join(
        f"deb [arch=amd64 signed-by={KEYRING}] {site} {suite} main\n"
        for site, suite in _sites(kernel.suite)
    ))
    return [
        "-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=/dev/null",
        "-o", f"Dir::State::lists={folder / 'lists'}", "-o", f"Dir::Cache={folder}",
        "-o", "APT::Sandbox::User=root", "-qq",
    ]


def _sites(suite: str) -> list[tuple[str, str]]:
    """Return the mirrors that this host uses for Debian and its security updates."""
    lines = _output(["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)",
                     "Created-By: Packages"]).splitlines()
    found = dict(reversed(line.split(" ", 1)) for line in lines[::-1])
    sites = [(uri, {"Debian": suite, "Debian-Security": f"{suite}-security"}[label])
             for uri, label in found.items() if label in ("Debian", "Debian-Security")]
    if not sites or not Path(KEYRING).exists():
        raise Missing("the lists of a Debian mirror: this needs Debian, and `apt-get update`")
    return sites


def _newest(kernel: Kernel, folder: Path) -> tuple[str, str]:
    """Return the package with the newest build of the kernel, and its version."""
    options = _apt(kernel, folder)
    _output(["apt-get", *options, "update"])
    depends = _output(["apt-cache", *options, "depends", kernel.package])
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if not found:
        raise Missing(f"a kernel in Debian {kernel.suite}: {kernel.package} depends on none")
    shown = _output(["apt-cache", *options, "show", "--no-all-versions", found[1]])
    version = re.search(r"^Version: (\S+)", shown, re.MULTILINE)
    assert version is not None, shown
    return found[1], version[1]


def _unpack(kernel: Kernel, package: str, folder: Path, root: Path, release: str) -> None:
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _output(["apt-get", *_apt(kernel, folder), "download", package], cwd=partial)
    [deb] = partial.glob("*.deb")
    _output(["dpkg-deb", "-x", str(deb), str(partial / "root")])
    deb.unlink()
    if not (partial / "root/lib").exists():  # Debian 13 has the modules in /usr/lib
        (partial / "root/lib").symlink_to("usr/lib")
    _output(["/sbin/depmod", "-b", str(partial / "root"), release])
    shutil.rmtree(folder / "root", ignore_errors=True)  # older builds
    root.parent.mkdir()
    (partial / "root").rename(root)


def _output(command: list[str], cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, check=True, text=True, capture_output=True).stdout
