"""Make untrusted text safe for a log, a terminal or an HTTP answer. A leaf. Any thread.

This host shows text from the store, from servers and from peers. Such text can be long, and can
contain line ends, escape sequences of terminals, and characters that change the direction of
writing.
"""

from __future__ import annotations

import re

LIMIT = 300
_USER = re.compile(r"^(\w+://)?[^/]*@")


def printable(text: str, limit: int = LIMIT) -> str:
    """Return ``text``, truncated, with escapes for all characters that are not printable.

    limit  largest number of characters. To a truncated text, "... (N characters)" is appended,
           where N is the length of ``text``
    """
    if len(text) <= limit and text.isprintable():
        return text
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text[:limit])
    if len(text) <= limit and len(shown) <= limit:
        return shown
    return f"{shown[:limit]}... ({len(text)} characters)"


def shown(value: object) -> str:
    """Return the repr of a value, truncated. Raises RecursionError if the value is nested too
    deeply."""
    if isinstance(value, str | bytes) and len(value) > LIMIT:
        unit = "characters" if isinstance(value, str) else "bytes"
        return f"{value[:LIMIT]!r}... ({len(value)} {unit})"
    return printable(repr(value), 2 * LIMIT)


def without_user(url: str) -> str:
    """Return the URL without user name and password, for a message."""
    return _USER.sub(r"\1***@", url)
