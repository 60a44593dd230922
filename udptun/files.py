"""Replace a file atomically: the file always has either the old or the new content, for a reader
and after a crash.

A leaf: imports no other module of udptun. Calls block. Threading: any thread, any number of
writers. Source: rename(2), fsync(2). A rename is on the disk when the directory is synced.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def replace_file(path: Path, parts: Iterable[bytes], mode: int | None = None) -> None:
    """Write ``parts`` to ``path``, in order. The directory must exist.

    mode  mode of the file, independent of the umask. None: 0666 minus the umask, the usual mode
          of a new file

    Raises OSError, or an error of the ``parts`` iterator. The old file is then unchanged.
    """
    # a random name, because another process may replace the same file
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
