"""Build the sdist and the wheel, and check what they contain: ``python scripts/check_package.py``.

The sdist must have the files of the repository and no others. The wheel is built from the unpacked
sdist, so the build fails if a source is missing there. The wheel must contain the modules of
``udptun/`` and the files of its page, the compiled core, man pages, shell completion and nothing
else: no tests, no C, no Cython. The core must be stripped and hardened, without paths of this
machine. Then the wheel is unpacked into an empty folder, and the command ``udptun version`` is
started there. Prints each mistake. The exit code is 1 if there is a mistake.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import release
import share_files
from release import ROOT

GENERATED = [
    line for line in (ROOT / ".gitignore").read_text().split() if line.startswith("src_ext/")
]
MODULES = (".py", ".pyi", ".typed", ".css", ".js", ".svg", ".o")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def sdist_mistakes(have: set[str], sources: set[str]) -> list[str]:
    own = {"PKG-INFO", "setup.cfg", *(name for name in have if name.startswith("udptun.egg-info/"))}
    own |= {name for name in have if any(Path(name).match(pattern) for pattern in GENERATED)}
    return [
        *(f"sdist: {name} is missing" for name in sorted(sources - have)),
        *(f"sdist: {name} does not belong there" for name in sorted(have - sources - own)),
    ]


def wheel_mistakes(have: set[str], sources: set[str]) -> list[str]:
    have = {
        re.sub(r"^udptun-[^/]*\.data/data/", "", name) for name in have if ".dist-info/" not in name
    }
    wanted = {
        name for name in sources if name.startswith("udptun/") and Path(name).suffix in MODULES
    } | {f"udptun/_core{sysconfig.get_config_var('EXT_SUFFIX')}"}
    wanted |= {f"share/{name}" for name in share_files.files()}
    return [
        *(f"wheel: {name} is missing" for name in sorted(wanted - have)),
        *(f"wheel: {name} does not belong there" for name in sorted(have - wanted)),
    ]


def core_mistakes(core: Path) -> list[str]:
    """Check the compiled core with readelf, if there is one."""
    try:
        shown = release.output(["readelf", "-W", "-S", "-l", "-d", str(core)])
    except FileNotFoundError:
        return []
    wrong = {
        "it has symbols": ".symtab" in shown,
        "it has debug information": ".debug_info" in shown,
        "it has a run path": "RPATH" in shown or "RUNPATH" in shown,
        "its relocations stay writable": "GNU_RELRO" not in shown or "BIND_NOW" not in shown,
        "its stack is executable": "GNU_STACK" not in shown or " RWE " in shown,
        "it names a directory of this machine": str(ROOT).encode() in core.read_bytes(),
        "it has no stack protector": b"__stack_chk_fail" not in core.read_bytes(),
    }
    return [f"wheel: {core.name}: {mistake}" for mistake, found in wrong.items() if found]


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
        sdist = release.make_sdist(folder / "dist", sys.executable, folder)
        source = release.unpack(sdist, folder / "again")
        sources = set(release.sources())
        mistakes = sdist_mistakes(files(source), sources)
        wheel = release.build("wheel", source, folder / "wheel", sys.executable, {
            "LDSHARED": f"{os.environ.get('CC', 'gcc')} -shared",
        })
        with zipfile.ZipFile(wheel) as archive:
            mistakes += wheel_mistakes(set(archive.namelist()), sources)
        mistakes += start_mistakes(wheel, folder / "installed")
        for core in (folder / "installed" / "udptun").glob("_core*.so"):
            mistakes += core_mistakes(core)
    print(*mistakes, sep="\n") if mistakes else print(f"{sdist.name}, {wheel.name}: good")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
