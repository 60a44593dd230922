"""Write lengths of time and numbers of bytes for people. Pure functions: any thread."""

from __future__ import annotations

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def span(seconds: float) -> str:
    """Return the length in the largest unit of which it has at least two, such as ``90 s``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def milliseconds(microseconds: int) -> str:
    """Return the length with fewer decimals if it is longer: ``1.23 ms``, ``123 ms``."""
    value = microseconds / 1000
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} ms"


def duration(seconds: float) -> str:
    """Return the length in its two largest units: ``2 hours, 5 minutes``."""
    left, parts = int(seconds), []
    for name, length in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        count, left = divmod(left, length)
        if count:
            parts.append(f"{count} {name}{'s' if count > 1 else ''}")
    return ", ".join(parts[:2]) or "0 seconds"


def size(count: int) -> str:
    """Return a number of bytes in the largest unit that it fills."""
    power = min(max(count.bit_length() - 1, 0) // 10, len(UNITS) - 1)
    return f"{count / 1024**power:.2f} {UNITS[power]}" if power else f"{count} B"
