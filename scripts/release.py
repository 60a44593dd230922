"""What the scripts that make packages share: the version, the time stamp, the list of the sources.

Uses only the standard library.
"""

import gzip
import os
import re
import runpy
import shutil
import subprocess
import tarfile
import time
import tomllib
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
DIST = ROOT / "dist"
VERSION: str = runpy.run_path(str(ROOT / "udptun" / "_version.py"))["__version__"]
EARLIEST = 315532800  # 1980-01-01, the earliest time that a zip archive can hold


def epoch() -> int:
    """Return the time stamp of all files in packages: SOURCE_DATE_EPOCH, or the last commit's."""
    return max(int(os.environ.get("SOURCE_DATE_EPOCH") or commit_time()), EARLIEST)


@cache
def commit_time() -> str:
    if not (ROOT / ".git").exists():
        return "0"
    return output(["git", "log", "-1", "--format=%ct"], cwd=ROOT)


def pyproject() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def output(command: list[str], **options: object) -> str:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options)
    return done.stdout.strip()


def sources() -> list[str]:
    """Return the files of the repository, also new ones, or those of an unpacked sdist."""
    if (ROOT / ".git").exists():
        listed = output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT).splitlines()
        return sorted(name for name in listed if (ROOT / name).is_file())
    text = (ROOT / "udptun.egg-info" / "SOURCES.txt").read_text()
    return sorted(name for name in text.splitlines() if not name.startswith("udptun.egg-info/"))


def copy_sources(target: Path) -> None:
    for name in sources():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)


def build(kind: str, source: Path, out: Path, python: str, env: dict[str, str]) -> Path:
    """Build with the backend that pip uses; ``kind`` is "sdist" or "wheel"."""
    out.mkdir(parents=True)
    call = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = subprocess.run(
        [python, "-c", call], cwd=source, capture_output=True, text=True, check=False,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch()), **env},
    )
    if done.returncode != 0:
        raise SystemExit(f"building the {kind} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    [built] = out.iterdir()
    return built


def write_tar(target: Path, names: dict[str, Path]) -> None:
    """Write an archive whose bytes depend only on the content, the modes and ``epoch()``."""
    packed = target.suffix == ".gz"
    with target.open("wb") as file, (
        gzip.GzipFile("", "wb", 9, file, epoch()) if packed else nullcontext(file)
    ) as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, path in sorted(names.items()):
            entry = tarfile.TarInfo(name)
            entry.mtime, entry.size = epoch(), path.stat().st_size
            entry.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
            with path.open("rb") as content:
                archive.addfile(entry, content)


def unpack(archive: Path, target: Path) -> Path:
    """Unpack an archive with one directory at the top; return this directory."""
    with tarfile.open(archive) as file:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python >= 3.11.4
        file.extractall(target, **safe)
    [top] = target.iterdir()
    return top


def make_sdist(out: Path, python: str, scratch: Path) -> Path:
    """Build the sdist from a copy of the sources, and write it again with one time stamp."""
    copy_sources(scratch / "source")
    built = build("sdist", scratch / "source", scratch / "sdist", python, {})
    top = unpack(built, scratch / "unpacked")
    out.mkdir(parents=True, exist_ok=True)
    write_tar(out / built.name, {
        f"{top.name}/{path.relative_to(top)}": path for path in top.rglob("*") if path.is_file()
    })
    return out / built.name


def bare_name(requirement: str) -> str:
    """Return the name in a requirement, for example of ``aiohttp>=3``."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def normal_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def zip_time() -> tuple[int, int, int, int, int, int]:
    return time.gmtime(epoch())[:6]
