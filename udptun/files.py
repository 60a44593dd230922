"""Replace a file atomically: a reader, or a crash at any point, finds the old or the new content.

A leaf: imports no other module of udptun. Blocking calls; any thread, any number of writers.
Source: rename(2), fsync(2) (a rename is on the disk when its directory is).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def replace_file(path: Path, parts: Iterable[bytes], mode: int | None = None) -> None:
    """Write ``parts`` to ``path``, in order. The directory must exist.

    mode  of the file, independent of the umask; None: 0666 minus the umask, as for any new file

    Raises OSError, or an error of the ``parts`` iterator; the old file is then unchanged.
    """
    # a random name: another process may be replacing the same file
    fresh = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(parts)
            file.flush()
            if mode is not None:
                os.fchmod(handle, mode)
            os.fsync(handle)
        fresh.replace(path)
    except BaseException:
        fresh.unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
