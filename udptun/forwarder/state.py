"""The state file: a copy of the active route table, loaded at the next start.

Owns the file, its lock, and the check that the file is complete. The file has the grammar of a
route file: its first line and its last line are comments. The last line has the length and the
checksum of the lines before it. A file without the first line is that of an earlier version; it has
no checksum.

The file is replaced atomically, at most once per DELAY_SECONDS. If it is removed, it is written
again. Forwarding does not depend on the file: if the disk is full or read-only, this is reported,
and the file is written later.
Threading: control loop only; a helper thread writes the file.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..device.fault import device_error
from ..errors import DeviceError, FieldError
from ..files import FileLock, UntrustedFile, make_directory, read_own_file, replace_file
from ..text import os_reason
from ..wait import until_removed

if TYPE_CHECKING:
    from .._core import RouteTable

DELAY_SECONDS = 0.05
RETRY_SECONDS = 5.0
SLICE = 4096  # routes formatted at a time
HEADER = b"# udptun's route table; the last line has the length and the checksum of the rest\n"
_END = b"# end of "
_TRAILER = _END + b"%d bytes, crc32 %08x\n"
_DISK_ERRORS = {errno.EIO, errno.EUCLEAN, errno.ESTALE, errno.ENODATA}

log = logging.getLogger(__name__)


class StateFile:
    """One state file. ``load`` locks it, ``unlock`` releases it.

    lock  None: this process does not have it. A forwarder that takes over sets it
    """

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self.path = path
        self._report = report
        self._table: RouteTable | None = None  # the table to write; None: the file is up to date
        self._saved: RouteTable | None = None
        self._watch: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self.lock: FileLock | None = None
        self._failure = ""  # the last reported one, until the file is written again

    def load(self) -> RouteTable | None:
        """Lock the file. Return the table of the last run, or None if there is none.

        An invalid or incomplete file is renamed to NAME.bad and reported. Raises DeviceError if
        another forwarder has the file, if another user could have written it, or if it is not a
        readable file.
        """
        from .._core import RouteTable

        try:
            self._take_lock()
        except UntrustedFile as error:
            raise DeviceError(error.errno, f"the state file's lock {error}") from None
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise DeviceError(error.errno, os_reason(error)) from None
            self._report_failure(error)  # the disk is full or read-only: each write tries again
        try:
            return RouteTable.parse_text(_checked(read_own_file(self.path)))
        except FileNotFoundError:
            return None
        except FieldError as error:
            self._move_aside(f"is not a valid route table: {error}")
            return None
        except UntrustedFile as error:
            raise DeviceError(error.errno, f"the state file {error}") from None
        except OSError as error:
            if error.errno in _DISK_ERRORS:
                self._move_aside(f"cannot be read: {os_reason(error)}")
                return None
            raise device_error(error.errno or 0, f"reading the state file {self.path}") from None

    @property
    def lock_path(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")

    def unlock(self) -> None:
        """Let another forwarder use the file. Call it after ``flush``."""
        lock, self.lock = self.lock, None
        if lock is not None:
            lock.release()

    async def save(self, table: RouteTable) -> None:
        """Write this table now, or later if this fails. Create the directory if necessary."""
        self._table = table
        if not await self._save():
            self.save_soon(table)
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._restore_removed())

    def save_soon(self, table: RouteTable) -> None:
        """Write this table within about DELAY_SECONDS, or a later table that replaces it."""
        self._table = table
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._save_later())

    async def write_pending(self) -> None:
        """Write the last table that was passed to ``save_soon``, if it is not on disk yet."""
        await self._save()

    async def flush(self) -> None:
        """Write the last table that was passed to ``save_soon``, if it is not on disk yet. Stop
        watching the file.
        """
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})
        if self._task is not None and not self._task.done():
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._save()

    async def _restore_removed(self) -> None:
        while True:
            await until_removed(self.path)
            if self._table is None and self._saved is not None:
                self._report(f"{self.path} was removed: writing it again")
                self.save_soon(self._saved)
            await asyncio.sleep(RETRY_SECONDS)

    async def _save_later(self) -> None:
        await asyncio.sleep(DELAY_SECONDS)
        while self._table is not None:
            # flush cancels this task; the shield lets a write that has begun complete
            if not await asyncio.shield(self._save()):
                await asyncio.sleep(RETRY_SECONDS)

    async def _save(self) -> bool:
        """Write the pending table. Return False if this failed; the table is then still pending."""
        async with self._writing:
            table, self._table = self._table, None
            if table is None:
                return True
            try:
                await asyncio.to_thread(self._write, table)
            except OSError as error:
                self._table = self._table or table
                self._report_failure(error)
                return False
            if self._failure:
                log.info("the route table is written to %s again", self.path)
                self._failure = ""
            return True

    def _write(self, table: RouteTable) -> None:
        self._take_lock()
        replace_file(self.path, _content(table), mode=0o600)
        self._saved = table

    def _take_lock(self) -> None:
        """Lock the file, unless it is locked already. Raises OSError."""
        if self.lock is not None and self.lock.is_valid:
            return
        self.unlock()
        make_directory(self.path.parent)
        self.lock = FileLock.take(self.lock_path)
        if self.lock is None:
            raise OSError(errno.EBUSY, f"another forwarder uses the state file {self.path}: give "
                                       f"this one another --state")

    def _report_failure(self, error: OSError) -> None:
        text = f"cannot write the route table to {self.path}: {os_reason(error)}"
        if text != self._failure:
            self._failure = text
            self._report(f"{text}; forwarding continues, and the file is written later")

    def _move_aside(self, why: str) -> None:
        aside = self.path.with_name(self.path.name + ".bad")
        try:
            self.path.replace(aside)
        except OSError as error:
            self._report(f"{self.path} {why}; it is not used, and cannot be renamed: "
                         f"{os_reason(error)}")
        else:
            self._report(f"{self.path} {why}; it is not used, and is renamed to {aside}")


def _content(table: RouteTable) -> Iterator[bytes]:
    length, checksum = len(HEADER), zlib.crc32(HEADER)
    yield HEADER
    for start in range(0, len(table), SLICE):
        text = table.text_slice(start, SLICE)
        length, checksum = length + len(text), zlib.crc32(text, checksum)
        yield text
    yield _TRAILER % (length, checksum)


def _checked(content: bytes) -> bytes:
    """Return ``content``. Raises FieldError if it is the beginning of a file, or was changed."""
    if HEADER.startswith(content):
        raise FieldError("the text", content, "a complete file")
    end = content.rfind(b"\n", 0, -1) + 1
    if not content.startswith(HEADER) and not content.startswith(_END, end):
        return content  # of an earlier version
    if content[end:] != _TRAILER % (end, zlib.crc32(memoryview(content)[:end])):
        raise FieldError("the last line", content[end:][:80],
                         "the length and the checksum of the lines before it")
    return content
