"""Write lengths of time for people. Pure functions: any thread."""

from __future__ import annotations


def span(seconds: float) -> str:
    """Return the length in the largest unit of which it has at least two, such as ``90 s``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
