"""The state file: a copy of the active route table, loaded at the next start.

Owns the file, which has the grammar of a route file. The file is replaced atomically, at most once
per DELAY_SECONDS. If it is removed, it is written again.
Threading: control loop only; a helper thread writes the file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..device.fault import device_error
from ..errors import FieldError
from ..files import replace_file
from ..wait import until_removed

if TYPE_CHECKING:
    from .._core import RouteTable

DELAY_SECONDS = 0.05
RETRY_SECONDS = 5.0
SLICE = 4096  # routes formatted at a time


class StateFile:
    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self.path = path
        self._report = report
        self._table: RouteTable | None = None  # the table to write; None: the file is up to date
        self._saved: RouteTable | None = None
        self._watch: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()

    def load(self) -> RouteTable | None:
        """Return the table of the last run, or None. Rename an invalid file to NAME.bad."""
        from .._core import RouteTable

        try:
            return RouteTable.parse_text(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except FieldError as error:
            aside = self.path.with_name(self.path.name + ".bad")
            self.path.replace(aside)
            self._report(
                f"{self.path} is not a valid route table and is renamed to {aside}: {error}"
            )
            return None
        except OSError as error:
            raise device_error(error.errno or 0, f"reading the state file {self.path}") from None

    async def save(self, table: RouteTable) -> None:
        """Write this table now. Create the directory if necessary. Raises DeviceError."""
        try:
            await asyncio.to_thread(self._write, table)
        except OSError as error:
            raise device_error(error.errno or 0, f"writing the state file {self.path}") from None
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._restore_removed())

    def save_soon(self, table: RouteTable) -> None:
        """Write this table within about DELAY_SECONDS, or a later table that replaces it."""
        self._table = table
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._save_later())

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
                self._report(f"cannot write the route table to {self.path}: {error.strerror}")
                return False
            return True

    def _write(self, table: RouteTable) -> None:
        starts = range(0, len(table), SLICE)
        self.path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        replace_file(self.path, (table.text_slice(start, SLICE) for start in starts))
        self._saved = table
