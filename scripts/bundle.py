"""Build a file that installs udptun, dist/udptun-VERSION-CPU.run: ``python scripts/bundle.py``.

The file is a zip archive behind a few lines of shell. It has udptun's wheels from dist/ (it builds
those that are missing), the wheels of all dependencies with the versions and hashes of
deploy/bundle.lock, the units, the man pages, shell completion, and scripts/installer.py, which
installs all this. The host needs CPython 3.11 or 3.13, as Debian 12 and 13 have it, and neither
network nor compiler.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import cni_tree
import release
import share_files
from lock import CPUS, LOCK, PYTHONS, platforms
from release import BUILD, DIST, ROOT, VERSION

STUB = """#!/bin/sh
# udptun {version} for {cpu}: a zip archive that installs itself; "sh {name} --help".
if [ "$(uname -m)" != {cpu} ]; then
  echo "udptun: this file is for {cpu}, not $(uname -m)" >&2
  exit 1
fi
for python in {pythons}; do
  for dir in /usr/bin /usr/local/bin; do
    [ -x "$dir/$python" ] && exec "$dir/$python" -I "$0" "$@"
  done
done
echo "udptun: {wanted} is missing; on Debian: apt-get install python3" >&2
exit 1
"""
# file of the repository -> directory below /usr/local, where the active version has it
SYSTEM = {
    "deploy/*.service": "lib/systemd/system",
    "deploy/modules-load.d/*.conf": "lib/modules-load.d",
    "deploy/*.env": "share/udptun",
    "deploy/*.conf": "share/udptun",
    "deploy/sysctl.d/*.conf": "share/udptun/sysctl.d",
    "deploy/networkd/*": "share/udptun/networkd",
    "deploy/NetworkManager/*": "share/udptun/NetworkManager",
    "scripts/cni_tree.py": "share/udptun/cni",
}
# The pages, and the files that they link to: each has the same path below DOC as in the repository.
DOC = "share/doc/udptun"
DOCUMENTS = (
    "LICENSE", "NOTICE", "*.md", "docs/*.md", "docs/*.toml", "docs/*.yaml", "docs/bench/*",
    "bench/README.md",
    "src_ext/README.md", "examples/*.py",
    "deploy/README.md", "deploy/Dockerfile", "deploy/*.service", "deploy/*.env", "deploy/*.conf",
    "deploy/kubernetes/**/*", "deploy/helm/**/*", "deploy/monitoring/*", "deploy/networkd/*",
    "deploy/NetworkManager/*",
)


def is_packed(name: str) -> bool:
    return name.startswith(("udptun/", "src_ext/")) or name in {"setup.py", "pyproject.toml"}


def own_wheels(cpu: str) -> list[Path]:
    """Return udptun's wheels for the CPU; build those that are missing or older than a source."""
    patterns = {
        f"{v}-glibc-{cpu}": f"udptun-{VERSION}-cp{v.replace('.', '')}-*manylinux*_{cpu}.whl"
        for v in PYTHONS
    }
    newest = max((ROOT / name).stat().st_mtime for name in release.sources() if is_packed(name))
    missing = [
        target for target, pattern in patterns.items()
        if not any(path.stat().st_mtime > newest for path in DIST.glob(pattern))
    ]
    if missing:
        subprocess.run([sys.executable, str(ROOT / "scripts" / "wheels.py"), *missing], check=True)
    return [path for pattern in patterns.values() for path in sorted(DIST.glob(pattern))]


def dependencies(cpu: str) -> list[Path]:
    """Download the wheels of the lock file; pip compares their hashes."""
    folder = BUILD / f"wheelhouse-{cpu}"
    stamp = folder / LOCK.name
    if not stamp.exists() or stamp.read_bytes() != LOCK.read_bytes():
        shutil.rmtree(folder, ignore_errors=True)
        for version in PYTHONS:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes",
                 "-d", str(folder), *platforms(version, cpu), "-r", str(LOCK)],
                check=True,
            )
        shutil.copy(LOCK, stamp)
    return sorted(folder.glob("*.whl"))


def cni_launcher(cpu: str, scratch: Path) -> bytes:
    """Return the launcher of the CNI plugin, a static program."""
    out = scratch / "launcher"
    compiler = os.environ.get("CC", "gcc") if cpu == platform.machine() else (
        f"{sys.executable} -m ziglang cc -target {cpu}-linux-musl")
    cni_tree.build_launcher(out, compiler)
    return out.read_bytes()


def documents() -> list[str]:
    """Return the paths of the DOCUMENTS in the repository."""
    return sorted({
        str(path.relative_to(ROOT))
        for pattern in DOCUMENTS for path in ROOT.glob(pattern) if path.is_file()
    })


def system_files(cpu: str, scratch: Path) -> dict[str, bytes]:
    """Return path in the archive -> content."""
    files = {
        f"system/{folder}/{path.name}": path.read_bytes()
        for pattern, folder in SYSTEM.items() for path in sorted(ROOT.glob(pattern))
    }
    files |= {f"system/{DOC}/{name}": (ROOT / name).read_bytes() for name in documents()}
    files["system/share/udptun/cni/launcher"] = cni_launcher(cpu, scratch)
    return files | {
        f"system/share/{name}": content for name, content in share_files.files().items()
    }


def write_bundle(target: Path, cpu: str, files: dict[str, bytes]) -> None:
    names = [f"python{version}" for version in reversed(PYTHONS)]
    stub = STUB.format(
        version=VERSION, cpu=cpu, name=target.name, pythons=" ".join(names),
        wanted=" or ".join(f"Python {version}" for version in PYTHONS),
    )
    with target.open("wb") as file:
        file.write(stub.encode())
        with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name, content in sorted(files.items()):
                entry = zipfile.ZipInfo(name, release.zip_time())
                entry.external_attr = 0o100644 << 16
                packed = zipfile.ZIP_STORED if name.endswith(".whl") else zipfile.ZIP_DEFLATED
                archive.writestr(entry, content, packed)
    target.chmod(0o755)


def build(cpu: str) -> Path:
    DIST.mkdir(exist_ok=True)
    wheels = [*own_wheels(cpu), *dependencies(cpu)]
    with tempfile.TemporaryDirectory(prefix="udptun-bundle-") as scratch:
        files = system_files(cpu, Path(scratch))
    files |= {f"wheels/{path.name}": path.read_bytes() for path in wheels}
    files["__main__.py"] = (ROOT / "scripts" / "installer.py").read_bytes()
    files["VERSION"] = VERSION.encode()
    target = DIST / f"udptun-{VERSION}-{cpu}.run"
    write_bundle(target, cpu, files)
    print(f"bundle: dist/{target.name}, {target.stat().st_size / 1e6:.0f} MB", flush=True)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cpu", nargs="?", choices=CPUS, default=platform.machine())
    options = parser.parse_args()
    build(options.cpu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
