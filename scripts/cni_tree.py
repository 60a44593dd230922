"""Build what the CNI plugin needs on a host without Python: ``python scripts/cni_tree.py OUT``.

OUT gets ``launcher``, a static program that the container runtime starts, and ``tree``: a copy of
the interpreter that runs this script, its libraries and dynamic loader, the needed part of the
standard library, and the plugin. ``udptun cni install`` copies both to a host. OUT must not exist.

Without ``--launcher`` it needs a C compiler (the variable CC), and the static C library. The script
imports nothing but the standard library, so it also runs in an image that has only Python.
"""

import argparse
import compileall
import modulefinder
import os
import py_compile
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "deploy" / "cni" / "launcher.c"
MAX_BYTES = 40_000_000
PT_INTERP = 3  # elf(5)
# What the plugin loads from udptun: all of udptun.cni, and leaves.
ENTRY = "udptun.cni.plugin, udptun.instance, traceback"
NOT_COPIED = {"udptun.cni.install"}
# The standard library imports these only in functions that the plugin does not call.
EXCLUDED = [
    "_pyrepl", "asyncio", "bz2", "concurrent", "ctypes", "curses", "doctest", "email", "getpass",
    "gzip", "hashlib", "http", "idlelib", "lzma", "multiprocessing", "pdb", "pydoc", "random",
    "readline", "ssl", "tarfile", "test", "tkinter", "unittest", "webbrowser", "xml", "xmlrpc",
    "zipfile",
]


def loaded(package: Path) -> dict[str, Path]:
    """Return the modules with a file that the plugin loads, without other names of a module."""
    script = (f"import {ENTRY}, encodings.latin_1, encodings.idna, sys\n"
              "for name, module in sorted(sys.modules.items()):\n"
              "    path = getattr(module, '__file__', None)\n"
              "    if path: print(name, path)\n")
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(package)})
    lines = (line.partition(" ") for line in done.stdout.splitlines())
    return {name: Path(path) for name, _, path in lines
            if Path(path).name.split(".")[0] in ("__init__", name.split(".")[-1])}


def library(names: list[str]) -> dict[str, Path]:
    """Return these modules of the standard library, and all that they import anywhere."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    path = [str(stdlib), str(stdlib / "lib-dynload")]
    finder = modulefinder.ModuleFinder(path, excludes=EXCLUDED)
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write("".join(f"import {name}\n" for name in names))
        script.flush()
        finder.run_script(script.name)
    return {name: Path(module.__file__) for name, module in finder.modules.items()
            if module.__file__ and name != "__main__"}


def copy_modules(package: Path, target: Path) -> None:
    stdlib = target / sys.platlibdir / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    dynload = stdlib / "lib-dynload"
    dynload.mkdir(parents=True)  # Python warns if it is missing
    found = loaded(package)
    foreign = [name for name in found if name.split(".")[0] != "udptun"]
    for name, path in (library(foreign) | found).items():
        if name in NOT_COPIED:
            continue
        if path.suffix == ".so":
            shutil.copy(path, dynload / path.name)
            continue
        parts = name.split(".")
        place = stdlib.joinpath(*parts, path.name) if path.stem == "__init__" else (
            stdlib.joinpath(*parts[:-1], path.name))
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    compileall.compile_dir(
        stdlib, quiet=1, force=True, stripdir=target,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


def loader_of(program: Path) -> Path:
    """Return the dynamic loader that a program names: elf(5), 64 bits."""
    content = program.read_bytes()
    order = "<" if content[5] == 1 else ">"
    (at,) = struct.unpack_from(f"{order}Q", content, 32)
    size, count = struct.unpack_from(f"{order}HH", content, 54)
    for header in range(at, at + size * count, size):
        (kind,) = struct.unpack_from(f"{order}I", content, header)
        if kind == PT_INTERP:
            offset, _, _, length = struct.unpack_from(f"{order}4Q", content, header + 8)
            return Path(content[offset : offset + length].rstrip(b"\0").decode())
    sys.exit(f"{program} has no dynamic loader: use a Python that is linked dynamically")


def copy_programs(target: Path) -> None:
    program = Path(sys.executable).resolve()
    loader, lib = loader_of(program), target / "lib"
    lib.mkdir(exist_ok=True)
    (target / "bin").mkdir()
    shutil.copy(program, target / "bin" / "python3")
    shutil.copy(loader.resolve(), lib / "ld.so")
    programs = [program, *target.rglob("lib-dynload/*.so")]
    for one in programs:
        listed = subprocess.run(
            [loader, "--list", one], check=True, capture_output=True, text=True).stdout
        for name, path in re.findall(r"^\s*(\S+) => (/\S+)", listed, re.MULTILINE):
            if not (lib / name).exists():
                shutil.copy(Path(path).resolve(), lib / name)
    strip = shutil.which("strip")  # distributions have already stripped theirs
    for one in {target / "bin" / "python3", *target.rglob("*.so"), *lib.glob("*.so.*")}:
        one.chmod(0o755)
        if strip:
            subprocess.run([strip, "--strip-unneeded", one], check=True)


def build_launcher(out: Path, compiler: str) -> None:
    options = ["-static", "-Os", "-s", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*shlex.split(compiler), *options, "-o", out, LAUNCHER], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the CNI plugin for hosts without Python.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--launcher", type=Path, help="the launcher, already compiled")
    parser.add_argument("--package", type=Path, default=ROOT, help="the directory with udptun/")
    options = parser.parse_args()
    out, target = options.out, options.out / "tree"
    target.mkdir(parents=True)
    copy_modules(options.package, target)
    copy_programs(target)
    if options.launcher:
        shutil.copyfile(options.launcher, out / "launcher")
    else:
        build_launcher(out / "launcher", os.environ.get("CC", "gcc"))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB, Python {sys.version.split()[0]}")
    if size > MAX_BYTES:
        sys.exit(f"more than {MAX_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
