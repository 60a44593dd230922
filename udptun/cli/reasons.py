"""Formats the list of drop reasons for ``udptun drops --explain`` and docs/drops.md.

``python -m udptun.cli.reasons > docs/drops.md`` generates the page. A test compares the page with
the list.
"""

from __future__ import annotations

import sys

from ..drops import DROP_REASONS

COLUMNS = ("reason", "direction", "meaning")

PAGE = """\
# Drop reasons

Every packet that udptun drops is counted once, under one of these reasons. `udptun drops` shows
the counts. *encap* is the direction from the TUN to UDP, *decap* from UDP to the TUN. In each
direction, counted in inner IP packets and probes:
read + generated = delivered + consumed + dropped + queued.

This page is generated from `udptun/drops.py` by `python -m udptun.cli.reasons > docs/drops.md`.

"""


def rows() -> list[tuple[str, str, str]]:
    return [(r.name, ", ".join(r.directions), r.meaning) for r in DROP_REASONS]


def page() -> str:
    lines = ["| reason | direction | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | {directions} | {meaning} |" for name, directions, meaning in rows()]
    return PAGE + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
