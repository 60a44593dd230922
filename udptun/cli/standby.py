"""``udptun forward --standby N``: load the program, and wait until a forwarder is needed.

Owns what is loaded: all that runs before the first packet. pyroute2 and aiohttp are not among it,
because they are used later and need as much memory as all the rest. Threading: main thread, before
the loop runs.
"""

from __future__ import annotations

import os
import socket

import click

from ..takeover.kept import variable
from ..takeover.standby import wait


def wait_until_needed(
    ctx: click.Context, _: click.Parameter, number: int | None
) -> int | None:
    """Callback of an eager option. The options after it are read when a forwarder is needed."""
    if number is None or ctx.resilient_parsing:  # resilient: a shell completes the command line
        return number
    _load()
    try:
        sock = socket.socket(fileno=number)
    except OSError as exc:
        raise click.BadParameter(f"the descriptor {number}: {exc.strerror}", ctx) from exc
    with sock:
        kept = wait(sock)
    if kept is None:
        ctx.exit()
    os.environ |= variable(kept)
    return number


def _load() -> None:
    from .. import forwarder, notify, privileges  # noqa: F401
    from ..build import build_id
    from ..forwarder import needs  # noqa: F401

    build_id()  # now, because an update replaces the files
