"""Text in the cells of a terminal: how wide a text is, how it is cut, small numbers, bars.

Names come from other hosts. So each text is escaped (``text.printable``) before it is measured.
Pure functions: any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import combining, east_asian_width

from ...spans import UNITS
from ...text import printable

BARS, ASCII_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"


def width(text: str) -> int:
    """Return the number of cells of an escaped text."""
    return len(text) if text.isascii() else sum(map(_width, text))


def _width(char: str) -> int:
    return 0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1


def fit(text: object, cells: int, right: bool = False) -> str:
    """Return the text in exactly this number of cells: escaped, cut, and filled with blanks."""
    escaped = printable("-" if text is None else str(text))
    if width(escaped) > cells:
        escaped = _cut(escaped, cells)
    blanks = " " * (cells - width(escaped))
    return blanks + escaped if right else escaped + blanks


def _cut(text: str, cells: int) -> str:
    """Cut a text that is too long. The last cell shows that it was cut."""
    kept, left = [], cells - 1
    for char in text:
        left -= _width(char)
        if left < 0:
            break
        kept.append(char)
    return "".join(kept) + "~" if cells else ""


def amount(rate: float | None) -> str:
    """Return a number of bytes in at most eight characters: ``1.23 MiB``. ``-``: not known."""
    if rate is None:
        return "-"
    value, unit = rate, 0
    while value >= 1023.5 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if value >= 99.95 or not unit else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {UNITS[unit]}"


def count(rate: float | None) -> str:
    """Return a number per second in three digits: ``12.3k``. ``-``: not known."""
    if rate is None:
        return "-"
    value, unit = rate, 0
    while value >= 999.5 and unit < 3:
        value, unit = value / 1000, unit + 1
    digits = 0 if value >= 99.95 or value == int(value) else 1
    return f"{value:.{digits}f}{' kMG'[unit].strip()}"


def bars(
    values: Sequence[float | None], length: int, cells: int, characters: str = BARS
) -> str:
    """Return one bar for each part of the last ``length`` values, the newest at the right.

    A bar has the height of the largest value of its part. The highest bar is the largest value of
    all. A value above 0 always has a bar. None, and times before the first value: a blank.
    """
    highest = max((value for value in values if value is not None), default=0.0)
    known = [None] * (length - len(values)) + [*values]
    drawn = []
    for cell in range(cells):
        start = cell * length // cells
        part = known[start : max((cell + 1) * length // cells, start + 1)]
        value = max((one for one in part if one is not None), default=None)
        steps = len(characters) - 1
        drawn.append(characters[0] if not value or not highest else
                     characters[max(round(value / highest * steps), 1)])
    return "".join(drawn)
