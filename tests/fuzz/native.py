"""Build the program of the native harnesses (native.pyx) with clang: libFuzzer, ASan and UBSan.

Owns the options of Cython and of the compiler. Does not depend on what the harnesses do.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HARNESSES = ("encap", "decap", "merge", "flush", "errors", "publish", "text", "json")
DIRECTIVES = ("boundscheck=False", "wraparound=False", "cdivision=True", "initializedcheck=False")
FLAGS = (
    "-O1", "-g", "-std=gnu11", "-D_GNU_SOURCE", "-fno-strict-aliasing", "-fno-omit-frame-pointer",
    "-w", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined",
    "-DCYTHON_WITHOUT_ASSERTIONS",
)


def translate(core: Path, out: Path) -> Path:
    """Translate the program and the core's sources in ``core`` to C. Return the path, in ``out``.

    ``core`` also has the generated .pxd files, which setup.py writes.
    """
    out.mkdir(parents=True, exist_ok=True)
    source = out / "native.c"
    cython = [sys.executable, "-m", "cython", "-3", "-I", str(core)]
    for directive in DIRECTIVES:
        cython += ["-X", directive]
    subprocess.run([*cython, "-o", str(source), str(HERE / "native.pyx")], check=True)
    return source


def build(core: Path, out: Path) -> Path:
    """Build the program from the core's sources in ``core``. Return its path, in ``out``."""
    source, program = translate(core, out), out / "native"
    compiler = os.environ.get("FUZZ_CC", "clang")
    includes = [f"-I{core}", f"-I{sysconfig.get_path('include')}"]
    # The program never calls Python, so it is not linked with it.
    linker = ["-no-pie", "-Wl,--unresolved-symbols=ignore-all", "-Wl,-z,lazy"]
    subprocess.run(
        [compiler, *FLAGS, "-include", str(HERE / "kernel.h"), *includes, str(source), *linker,
         "-o", str(program)],
        check=True,
    )
    return program
