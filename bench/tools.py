"""The C programs of this folder, built when they are needed, and the root of the repository.

Owns: the paths of the programs. The Makefile compiles them. Any thread.
"""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@cache
def program(name: str) -> Path:
    """Return the path of bench/<name>. make compiles a program whose source has changed."""
    subprocess.run(["make", "-s", f"bench/{name}"], cwd=ROOT, check=True)
    return HERE / name
