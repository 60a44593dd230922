"""Build the sdist and the wheel, and check what they contain: ``python scripts/check_package.py``.

The sdist is built from a copy of the checkout without generated files, and the wheel is built from
the unpacked sdist. So the build fails if a source is missing from the sdist, and neither package
contains other files of the checkout. The wheel must contain the modules of ``udptun/``, the
compiled core and nothing else: no tests, no C, no Cython. Then the wheel is unpacked into an empty
folder, and the command ``udptun version`` is started there. Prints each mistake. The exit code is 1
if there is a mistake.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("udptun", "src_ext")
FILES = ("setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE")
# Files that a build writes into src_ext/. An sdist has them too, but pip generates them again.
GENERATED = [
    line for line in (ROOT / ".gitignore").read_text().split() if line.startswith("src_ext/")
]
IGNORED = ("*.so", "__pycache__", *(Path(pattern).name for pattern in GENERATED))
MODULES = (".py", ".pyi", ".typed")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def copy_sources(target: Path) -> set[str]:
    for name in SOURCES:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns(*IGNORED))
    for name in FILES:
        shutil.copy(ROOT / name, target / name)
    return files(target)


def build(kind: str, source: Path, out: Path) -> Path:
    """Build with the backend that pip uses; ``kind`` is "sdist" or "wheel"."""
    out.mkdir()
    call = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=source, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"building the {kind} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    [built] = out.iterdir()
    return built


def sdist_mistakes(have: set[str], sources: set[str]) -> list[str]:
    own = {"PKG-INFO", "setup.cfg", *(name for name in have if name.startswith("udptun.egg-info/"))}
    own |= {name for name in have if any(Path(name).match(pattern) for pattern in GENERATED)}
    wanted = {name for name in sources if not name.endswith(".md")} | {"README.md"}
    return [
        *(f"sdist: {name} is missing" for name in sorted(wanted - have)),
        *(f"sdist: {name} does not belong there" for name in sorted(have - sources - own)),
    ]


def wheel_mistakes(have: set[str], sources: set[str]) -> list[str]:
    have = {name for name in have if ".dist-info/" not in name}
    wanted = {
        name for name in sources if name.startswith("udptun/") and Path(name).suffix in MODULES
    } | {f"udptun/_core{sysconfig.get_config_var('EXT_SUFFIX')}"}
    return [
        *(f"wheel: {name} is missing" for name in sorted(wanted - have)),
        *(f"wheel: {name} does not belong there" for name in sorted(have - wanted)),
    ]


def start_mistakes(wheel: Path, target: Path) -> list[str]:
    """Start the command line of the wheel, with the dependencies of this environment."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    script = "import udptun._core, udptun.cli; print(udptun.__file__); udptun.cli.main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, "version"], cwd=target.parent, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(target)}, text=True, check=False,
    )
    if done.returncode != 0 or not done.stdout.startswith(str(target)):
        return [f"wheel: `udptun version` failed: {done.stdout}{done.stderr}"]
    return []


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="udptun-package-") as name:
        folder = Path(name)
        (folder / "source").mkdir()
        sources = copy_sources(folder / "source")
        sdist = build("sdist", folder / "source", folder / "sdist")
        with tarfile.open(sdist) as archive:
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python >= 3.11.4
            archive.extractall(folder / "unpacked", **safe)
        [unpacked] = (folder / "unpacked").iterdir()
        mistakes = sdist_mistakes(files(unpacked), sources)
        wheel = build("wheel", unpacked, folder / "wheel")
        with zipfile.ZipFile(wheel) as archive:
            mistakes += wheel_mistakes(set(archive.namelist()), sources)
        mistakes += start_mistakes(wheel, folder / "installed")
    name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    print(*mistakes, sep="\n") if mistakes else print(f"{name}: {sdist.name}, {wheel.name}: good")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
