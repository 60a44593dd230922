"""Files that udptun owns: create their directory, replace one atomically, read one back, lock one.

A file that is replaced always has either the old or the new content, for a reader and after a
crash. A file that is read back may have been changed by another user, so its owner and type are
checked. A lock file has mode 0600: who can open a file for reading can also lock it.

A leaf: imports no other module of udptun. Calls block, except those of a lock on a file. Threading:
any thread, any number of writers. Source: rename(2), fsync(2), flock(2). A rename is on the disk
when the directory is synced.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Self

DIRECTORY_MODE = 0o750
# The disk is full, read-only or broken. An operator can repair it while udptun runs.
DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO))
_RANDOM_BYTES = 8  # in the name of a file that is being written


class UntrustedFile(OSError):
    """Another user could have written the file, or it is not a regular file."""

    def __init__(self, path: Path, found: str, expected: str) -> None:
        super().__init__(errno.EPERM, f"{path} {found}: expected {expected}")

    def __str__(self) -> str:
        return str(self.strerror)


def make_directory(directory: Path, mode: int = DIRECTORY_MODE) -> None:
    """Create the missing directories with this mode, whatever the umask. Change no others."""
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for made in reversed(missing):
        try:
            made.mkdir(mode)
        except FileExistsError:
            continue  # created by another process in the meantime
        handle = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(handle, mode)
        finally:
            os.close(handle)


def replace_file(path: Path, parts: Iterable[bytes], mode: int | None = None) -> None:
    """Write ``parts`` to ``path``, in order. The directory must exist.

    mode  mode of the file, independent of the umask. None: 0666 minus the umask, the usual mode
          of a new file

    Files that a killed writer of ``path`` has left are removed. Raises OSError, or an error of the
    ``parts`` iterator. The old file is then unchanged.
    """
    fresh, handle = _create(path, 0o666 if mode is None else mode & 0o600)
    try:
        _remove_leftovers(path)
        with os.fdopen(os.dup(handle), "wb") as file:
            file.writelines(parts)
            file.flush()
            if mode is not None:
                os.fchmod(handle, mode)
            os.fsync(handle)
        fresh.replace(path)
    except BaseException:
        with suppress(OSError):
            fresh.unlink()
        raise
    finally:
        os.close(handle)  # the lock is held until the file has its final name
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def remove_replaced(path: Path) -> None:
    """Remove a file that ``replace_file`` writes, and what a killed writer of it has left."""
    path.unlink(missing_ok=True)
    if path.parent.exists():
        _remove_leftovers(path)


def _create(path: Path, mode: int) -> tuple[Path, int]:
    """Create and lock the file that will replace ``path``. The lock shows that its writer lives."""
    while True:
        # a random name, because another process may replace the same file
        fresh = path.with_name(f".{path.name}.{os.urandom(_RANDOM_BYTES).hex()}")
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink:
                return fresh, handle
        os.close(handle)  # another writer took it for a leftover before it was locked


def _remove_leftovers(path: Path) -> None:
    ours = re.compile(re.escape(f".{path.name}.") + f"[0-9a-f]{{{2 * _RANDOM_BYTES}}}")
    for found in path.parent.iterdir():
        if not ours.fullmatch(found.name):
            continue
        with suppress(OSError):
            handle = os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.unlink()
            finally:
                os.close(handle)


def open_log(path: Path) -> int:
    """Open a log file to append to it. Return its descriptor. A new file has at most mode 0640.

    Raises UntrustedFile if it is a symbolic link, neither a regular file nor a character device
    (such as /dev/null), or if another user can write it. Raises OSError.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    handle = _open_own(path, flags, 0o640)
    try:
        found = os.fstat(handle)
        if not stat.S_ISCHR(found.st_mode):
            _refuse_foreign(path, found)
    except BaseException:
        os.close(handle)
        raise
    return handle


def open_new(path: Path, mode: int) -> int:
    """Open a file to write it from the beginning. Return its descriptor.

    mode  mode of a new file

    In a directory that other users own or can write, such as /tmp, they can put a link or a file of
    their own at the path. There, links and files of other users are refused with UntrustedFile.
    Raises OSError.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    directory = path.parent.stat()
    if directory.st_uid in (0, os.geteuid()) and not directory.st_mode & 0o022:
        return os.open(path, flags | os.O_TRUNC, mode)
    handle = _open_own(path, flags, mode)
    try:
        _refuse_foreign(path, found := os.fstat(handle))
        if found.st_nlink > 1:
            raise UntrustedFile(path, "has several names", "a file with one name")
        os.ftruncate(handle, 0)
    except BaseException:
        os.close(handle)
        raise
    return handle


def read_tail(path: Path, most: int) -> bytes:
    """Return at most the last ``most`` bytes of a regular file. Do not follow a symbolic link.

    Raises UntrustedFile, OSError.
    """
    handle = _open_own(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise UntrustedFile(path, "is not a regular file", "a regular file")
        return os.pread(handle, most, max(found.st_size - most, 0))
    finally:
        os.close(handle)


def read_own_file(path: Path) -> bytes:
    """Return the content of a file that only this user and root can have written.

    Raises UntrustedFile, which says what is wrong with the file. Raises OSError.
    """
    handle = _open_own(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _refuse_foreign(path, os.fstat(handle))
        with os.fdopen(os.dup(handle), "rb") as file:
            return file.read()
    finally:
        os.close(handle)


def _open_own(path: Path, flags: int, mode: int = 0) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode)  # a FIFO does not block
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UntrustedFile(path, "is a symbolic link", "a regular file") from None
        if error.errno == errno.ENXIO:
            raise UntrustedFile(path, "is not a regular file", "a regular file") from None
        raise


def _refuse_foreign(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UntrustedFile(path, "is not a regular file", "a regular file")
    if found.st_uid not in (0, os.geteuid()):
        raise UntrustedFile(path, f"belongs to the user {found.st_uid}",
                            f"a file of root or of the user {os.geteuid()}")
    if found.st_mode & 0o022:
        raise UntrustedFile(path, f"has mode {stat.S_IMODE(found.st_mode):04o}",
                            "a file that only its owner can write, such as mode 0600")


class FileLock:
    """A lock that one process holds. The kernel releases it when the process ends.

    A process that gets a copy of the descriptor holds the lock too.

    owns_file  ``release`` removes the file. False: the file belongs to another process that holds
               the lock
    """

    def __init__(self, path: Path, fd: int, owns_file: bool = True) -> None:
        self.path = path
        self.fd = fd
        self.owns_file = owns_file

    @classmethod
    def wait(cls, path: Path) -> Self:
        """Create the file if necessary, and lock it, after other processes have released it."""
        lock = cls._take(path, fcntl.LOCK_EX)
        assert lock is not None
        return lock

    @classmethod
    def take(cls, path: Path) -> Self | None:
        """Create the file if necessary, and lock it. Return None if another process holds the lock.

        Raises UntrustedFile if another user can lock the file. Raises OSError.

        A process that ends removes the file. It may do so between our open and our flock. Then
        other processes lock a new file, and our lock has no effect. So check this, and open the
        path again.
        """
        return cls._take(path, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @classmethod
    def _take(cls, path: Path, how: int) -> Self | None:
        while True:
            handle = _open_lock(path)
            try:
                found = os.fstat(handle)
                _refuse_foreign(path, found)
                if found.st_mode & 0o077:
                    raise UntrustedFile(path, f"has mode {stat.S_IMODE(found.st_mode):04o}",
                                        "a file that only its owner can open")
                fcntl.flock(handle, how)
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise
            lock = cls(path, handle)
            if lock.is_valid:
                return lock
            os.close(handle)

    @property
    def is_valid(self) -> bool:
        """False if the file was removed: then another process can lock a new file."""
        return os.fstat(self.fd).st_nlink > 0

    def set_text(self, text: str) -> None:
        """Write the content of the file. Processes that do not get the lock can read it."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, text.encode(), 0)

    def release(self) -> None:
        if self.owns_file and self.is_valid:
            with suppress(OSError):
                self.path.unlink()  # before the lock is released: see ``take``
        os.close(self.fd)


def is_unlocked(path: Path) -> bool:
    """Return whether no process holds the lock on this file. Create nothing, so the disk may be
    read-only. Raises OSError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _open_lock(path: Path) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        try:
            return os.open(path, flags | os.O_RDONLY)  # enough to lock a file that exists
        except FileNotFoundError:
            raise error from None


def remove_free_locks(directory: Path, pattern: str) -> None:
    """Remove the lock files that no process holds. Let only one process at a time call this and
    lock these files: for a moment, this function holds each of them."""
    for path in directory.glob(pattern):
        with suppress(OSError):  # held, or removed by its holder
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(handle)
