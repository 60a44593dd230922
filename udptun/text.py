"""Make untrusted text safe for a log, a terminal or an HTTP answer. A leaf. Any thread.

This host shows text from the store, from servers and from peers. Such text can be long, and can
contain line ends, escape sequences of terminals, and characters that change the direction of
writing.
"""

from __future__ import annotations

import errno
import os
import re

LIMIT = 300
WORD_MAX = 40  # a text is truncated at the last blank within this number of characters
_USER = re.compile(r"^(\w+://)?[^/]*@")


def printable(text: str, limit: int = LIMIT) -> str:
    """Return ``text``, truncated, with escapes for all characters that are not printable.

    limit  largest number of characters. To a truncated text, "... (N characters)" is appended,
           where N is the length of ``text``. A word is not cut, unless it is very long
    """
    if len(text) <= limit and text.isprintable():
        return text
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text[:limit])
    if len(text) <= limit and len(shown) <= limit:
        return shown
    return f"{cut(shown, limit)}... ({len(text)} characters)"


def cut(text: str, limit: int) -> str:
    """Return the first ``limit`` characters, without a part of a word at the end, if the words are
    not very long."""
    if len(text) <= limit or text[limit] == " ":
        return text[:limit]
    blank = text.rfind(" ", max(limit - WORD_MAX, 0), limit)
    return text[:blank] if blank > 0 else text[:limit]


def counted(number: int, noun: str) -> str:
    """Return the number with its noun: ``1 peer``, ``2 peers``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def errno_reason(number: int) -> str:
    """Return the kernel's text and the name: ``Network is unreachable (ENETUNREACH)``."""
    name = errno.errorcode.get(number)
    return os.strerror(number) if name is None else f"{os.strerror(number)} ({name})"


def os_reason(exc: OSError) -> str:
    """Return the text of an error of the system, with the name of its errno."""
    text, name = exc.strerror or str(exc), errno.errorcode.get(exc.errno or 0)
    return text if name is None or name in text else f"{text} ({name})"


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
