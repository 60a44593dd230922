"""The build: which code this process runs, also if two builds have the same version.

After an update from source the version can be the same. So the node daemon compares builds, to see
whether the running forwarder is the installed one. A leaf. Any thread.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

LENGTH = 12  # hexadecimal digits
SUFFIXES = (".py", ".so")


@cache
def build_id() -> str:
    """Return the hash of the package's sources and compiled modules.

    Call it first soon after the start: it reads the files, and an update replaces them. It takes
    some milliseconds. A file that cannot be read counts with its name only.
    """
    return build_of(Path(__file__).parent)


def build_of(package: Path) -> str:
    """Return the hash of the files in this directory."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.suffix in SUFFIXES:
            try:
                content = path.read_bytes()
            except OSError:
                content = b""
            name = str(path.relative_to(package)).encode()
            found.update(b"%d %s %d " % (len(name), name, len(content)) + content)
    return found.hexdigest()[:LENGTH]
