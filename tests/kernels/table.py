"""The page docs/kernels.md: which kernel has which feature, from the results of runs.

Owns: the text of the page. The results are the files that ``features.py`` writes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .features import FEATURES, YES

NOT_TRIED = "not tried"


@dataclass(frozen=True)
class Row:
    """``name``: a kernel, as on the command line. ``version``: of its package."""

    name: str
    version: str
    found: Mapping[str, str]


HEAD = """\
# Kernels

udptun needs Linux 5.10 or newer. It tries each feature when it starts, and does without those that
the kernel refuses. This table has the results of those kernels of Debian that were tried.
This command tries the features on each kernel, and writes this page, see
[CONTRIBUTING.md](../CONTRIBUTING.md#test-on-other-kernels):

<!-- not run: it downloads kernels, and takes long without KVM -->

```sh
make test-kernels ARGS=--features
```

"""


def rows(names: Iterable[str], saved: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Return the rows of these kernels. ``saved``: the content of results.json."""
    return [Row(name, **saved.get(name, {"version": "", "found": {}})) for name in names]


def page(rows: Sequence[Row]) -> str:
    names = [f"{row.name} (package {row.version})" if row.version else row.name for row in rows]
    lines = ["| feature | meaning | " + " | ".join(names) + " |",
             "|---" * (len(rows) + 2) + "|"]
    notes: dict[str, int] = {}
    for feature, meaning in FEATURES.items():
        cells = []
        for row in rows:
            why = row.found.get(feature, NOT_TRIED)
            cells.append(why if why in (YES, NOT_TRIED)
                         else f"no ({notes.setdefault(why, len(notes) + 1)})")
        lines.append(f"| {feature} | {meaning} | " + " | ".join(cells) + " |")
    text = HEAD + "\n".join(lines) + "\n"
    if notes:
        text += "\n" + "".join(f"{number}. {why}\n" for why, number in notes.items())
    return text
