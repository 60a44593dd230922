"""Waiting in asyncio tests: for a condition, never for a time.

``udptun.lab.wait_for`` is the same for synchronous tests. The seconds are a deadline for a test
that would hang otherwise, generous for a busy machine.
"""

import asyncio

import pytest


async def until(predicate, what="its condition", seconds=60.0):
    """Return the first true value of ``predicate``, which may be async; called every 10 ms.

    what  the condition, for the message of the failure after ``seconds``
    """
    async def poll():
        while True:
            value = predicate()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
            await asyncio.sleep(0.01)

    try:
        return await asyncio.wait_for(poll(), seconds)
    except TimeoutError:
        pytest.fail(f"timeout after {seconds:g} s: waited for {what}")
