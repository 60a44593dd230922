"""``udptun`` without the measurement of paths in the node daemon: what ``bench probes`` compares.

    python -m bench.unmeasured node ...

Everything else is the same. There is no option for this, because no cluster needs it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from udptun.cli import main
from udptun.node.paths.paths import Paths


async def _wait(self: Paths) -> None:
    await asyncio.Event().wait()


def _ignore(self: Paths, *_: Any) -> None:
    return


if __name__ == "__main__":
    Paths.update = _ignore  # type: ignore[method-assign, assignment]
    Paths.run = _wait  # type: ignore[method-assign]
    main()
