"""The C programs of this folder, built when they are asked for, and the root of the repository.

Owns: where they are. Refuses to know: how they are compiled; the Makefile does.
"""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@cache
def program(name: str) -> Path:
    """bench/<name>, compiled anew when its source changed."""
    subprocess.run(["make", "-s", f"bench/{name}"], cwd=ROOT, check=True)
    return HERE / name
