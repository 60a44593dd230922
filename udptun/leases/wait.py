"""Wait for an event, but not for ever. Asyncio, any loop."""

from __future__ import annotations

import asyncio
from contextlib import suppress


async def wait_at_most(event: asyncio.Event, seconds: float) -> bool:
    """Return when the event is set, or ``seconds`` later; whether it is set.

    Not ``asyncio.wait_for``: up to Python 3.11 that loses a cancellation which comes together with
    the event, and the task never ends.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
