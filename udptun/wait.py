"""Wait for an event with a time limit, or until a file was removed. Asyncio, any loop."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

FILE_CHECK_SECONDS = 2.0


async def wait_at_most(event: asyncio.Event, seconds: float) -> bool:
    """Wait until the event is set or the time is over. Return whether the event is set.

    ``asyncio.wait_for`` is not used because of a bug up to Python 3.11: if a cancellation arrives
    together with the event, ``wait_for`` loses the cancellation, and the task never ends.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


async def until_removed(path: Path) -> None:
    """Return when the path does not exist any more.

    inotify is not used, because it would have to watch every directory above the file.
    """
    while os.path.lexists(path):
        await asyncio.sleep(FILE_CHECK_SECONDS)
