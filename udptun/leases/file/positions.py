"""The line number of each value in a TOML or JSON text, for error messages only.

The parsers of the standard library do not report the line of a value. This scanner reads text that
these parsers have accepted, so it validates nothing. A path identifies a value, for example
``nodes[3].public``. No I/O; any thread.
"""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress

_TOKEN = re.compile(
    r'''"""(?:\\.|[^\\])*?"{3,5} | \'\'\'.*?\'{3,5}  # TOML's multi-line strings
      | "(?:\\.|[^"\\])*"        | '[^']*'
      | [\[\]{}=:,]              | [^\s\[\]{}=:,"'\#]+
      | \#[^\n]*                 | \n''',
    re.VERBOSE | re.DOTALL,
)


class Positions:
    """The line of each path in one text.

    repeated  the paths that occur more than once, in order. JSON parsers accept such a text and use
              the last value
    """

    def __init__(self, text: str) -> None:
        self._lines: dict[str, int] = {}
        self.repeated: list[str] = []
        self._tokens: list[tuple[str, int]] = []
        self._i = 0
        line = 1
        for token in _TOKEN.findall(text):
            if token[0] not in "\n#":
                self._tokens.append((token, line))
            line += token.count("\n")
        with suppress(IndexError, RecursionError):  # the lines found before the error are used
            self._document()

    def line(self, path: str) -> int | None:
        """Return the line of the value at ``path``.

        If this line is not known, return the line of the innermost value that contains the value.
        Return None if there is no such value.
        """
        while path not in self._lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
            if not path:
                return None
        return self._lines[path]

    def _document(self) -> None:
        if self._peek() == "{":  # JSON
            self._value("")
            return
        within, tables = "", Counter[str]()
        while self._peek():
            if self._peek() != "[":
                self._pair(within)
                continue
            line = self._tokens[self._i][1]
            within = self._key("]").lstrip("[")
            if self._peek() == "]":  # the header [[name]] of a table in an array
                self._next()
                tables[within] += 1
                within = f"{within}[{tables[within] - 1}]"
            self._mark(within, line)

    def _pair(self, within: str) -> None:
        line = self._tokens[self._i][1]
        path = f"{within}.{self._key('=:')}".lstrip(".")
        self._mark(path, line)
        self._value(path)

    def _value(self, path: str) -> None:
        token = self._next()
        if token == "{":
            while self._more("}"):
                self._pair(path)
        elif token == "[":
            i = 0
            while self._more("]"):
                self._mark(f"{path}[{i}]", self._tokens[self._i][1])
                self._value(f"{path}[{i}]")
                i += 1
        else:
            while self._peek() == ":":  # a TOML time, 12:30:00, is three tokens and two colons
                self._next()
                self._next()

    def _more(self, end: str) -> bool:
        """Return whether another item comes before ``end``.

        Skips a comma before the item. If there is no other item, skips ``end``.
        """
        if self._peek() == ",":
            self._next()
        if self._peek() != end:
            return True
        self._next()
        return False

    def _key(self, ends: str) -> str:
        parts = []
        while (token := self._next()) not in ends:
            parts.append(token.strip("\"'"))
        return "".join(parts)

    def _mark(self, path: str, line: int) -> None:
        if path in self._lines:
            self.repeated.append(path)
        self._lines[path] = line

    def _peek(self) -> str:
        return self._tokens[self._i][0] if self._i < len(self._tokens) else ""

    def _next(self) -> str:
        token = self._tokens[self._i][0]
        self._i += 1
        return token
