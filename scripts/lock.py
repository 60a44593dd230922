"""Write deploy/bundle.lock: the versions and hashes of all packages that a bundle contains.

Run ``python scripts/lock.py`` after a change of the dependencies in pyproject.toml, and to update
them. pip resolves the dependencies for each Python and CPU of the bundles; all must get the same
versions.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from release import ROOT, normal_name, pyproject

LOCK = ROOT / "deploy" / "bundle.lock"
EXTRAS = ("etcd", "kube")
PYTHONS = ("3.11", "3.13")  # of Debian 12 and 13
CPUS = ("x86_64", "aarch64")
HEAD = "# The packages of a bundle, with the hashes of their wheels. Written by scripts/lock.py.\n"


def requirements() -> list[str]:
    project = pyproject()["project"]
    extra = (name for extra in EXTRAS for name in project["optional-dependencies"][extra])
    return [*project["dependencies"], *extra]


def platforms(version: str, cpu: str) -> list[str]:
    """Return pip's options that stand for Debian 12 and newer."""
    tags = [*(f"manylinux_2_{n}_{cpu}" for n in range(36, 16, -1)), f"manylinux2014_{cpu}"]
    return ["--only-binary=:all:", "--implementation=cp", f"--python-version={version}",
            *(f"--platform={tag}" for tag in tags)]


def resolve(version: str, cpu: str) -> dict[str, tuple[str, str]]:
    """Return name -> (version, hash) of each package."""
    with tempfile.TemporaryDirectory(prefix="udptun-lock-") as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed",
             f"--report={report}", f"--target={folder}/none", *platforms(version, cpu),
             *requirements()],
            check=True,
        )
        packages = json.loads(report.read_text())["install"]
    return {
        normal_name(package["metadata"]["name"]): (
            package["metadata"]["version"],
            package["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for package in packages
    }


def main() -> None:
    found: dict[str, tuple[str, set[str]]] = {}
    for version in PYTHONS:
        for cpu in CPUS:
            print(f"resolving for CPython {version}, {cpu}", flush=True)
            for name, (chosen, digest) in resolve(version, cpu).items():
                known, digests = found.setdefault(name, (chosen, set()))
                if known != chosen:
                    raise SystemExit(f"{name}: {known} and {chosen}; limit it in pyproject.toml")
                digests.add(digest)
    lines = [
        " \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{d}" for d in sorted(digests))])
        for name, (version, digests) in sorted(found.items())
    ]
    LOCK.write_text(HEAD + "\n".join(lines) + "\n")
    print(f"{LOCK.relative_to(ROOT)}: {len(found)} packages")


if __name__ == "__main__":
    main()
