"""Formats the list of the checks for docs/doctor.md.

``python -m udptun.doctor.page > docs/doctor.md`` generates the page. A test compares the page with
the checks.
"""

from __future__ import annotations

import sys

from .checks import CHECKS

PAGE = """\
# The checks of `udptun doctor`

[diagnose.md](diagnose.md#doctor) describes the command. This page lists the checks, in the order in
which they run. It is generated from `udptun/doctor/checks/` by
`python -m udptun.doctor.page > docs/doctor.md`.

| check | looks at | more |
|---|---|---|
"""


def page() -> str:
    return PAGE + "".join(
        f"| `{one.name}` | {one.looks_at} | [{one.page.partition('#')[0]}]({one.page}) |\n"
        for one in CHECKS)


if __name__ == "__main__":
    sys.stdout.write(page())
