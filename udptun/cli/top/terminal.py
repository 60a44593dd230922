"""The terminal of ``udptun top``: what is drawn, keys, signals.

Owns the state of the terminal: it is restored when the program ends in any way that Python can
notice, and while the program is stopped (Ctrl-Z). Does not depend on what is drawn. Uses only the
sequences that all terminals have in common with ECMA-48 and xterm's alternate screen. Threading:
main thread.
"""

from __future__ import annotations

import codecs
import os
import select
import signal
import socket
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

# Alternate screen, no cursor, no automatic line wrap; and the reverse.
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
HOME, CLEAR_LINE = "\x1b[H", "\x1b[K"
ESCAPE_SECONDS = 0.1  # between the characters of one key; a slow network can separate them
SMALLEST = (20, 4)  # columns and lines; 0: the terminal does not report its size
SEQUENCES = {
    "[A": "up", "[B": "down", "[C": "right", "[D": "left", "[H": "home", "[F": "end",
    "[1~": "home", "[7~": "home", "[4~": "end", "[8~": "end", "[5~": "page up", "[6~": "page down",
}
CHARACTERS = {"\r": "enter", "\n": "enter", "\x7f": "backspace", "\b": "backspace"}
ENDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Ended(Exception):
    """A signal ends the program. code: its exit code."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number
        super().__init__(signal.Signals(number).name)


class Terminal:
    """The terminal in the context. Each key is a character, or a name such as "page up"."""

    def __init__(self, utf8: bool) -> None:
        self._in, self._out = sys.stdin.fileno(), sys.stdout.fileno()
        self._encoding = "utf-8" if utf8 else "ascii"
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._saved: list[Any] | None = None
        self._handlers: dict[int, Any] = {}
        self._wakes, self._waker = socket.socketpair()
        self._signals: list[int] = []

    def __enter__(self) -> Terminal:
        for end in (self._wakes, self._waker):
            end.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in (*ENDED, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT):
            self._handlers[number] = signal.signal(number, self._on_signal)
        self._take_over()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._wakes.close()
        self._waker.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)  # the wake-up descriptor ends the wait

    def _take_over(self) -> None:
        if self._saved is None:
            self._saved = termios.tcgetattr(self._in)
        tty.setcbreak(self._in, termios.TCSADRAIN)
        self._write(ENTER)

    def _give_back(self) -> None:
        """Restore the terminal. It may be gone."""
        with suppress(Ended):
            self._write(LEAVE)
        if self._saved is not None:
            with suppress(termios.error):
                termios.tcsetattr(self._in, termios.TCSADRAIN, self._saved)
            self._saved = None

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines."""
        columns, lines = os.get_terminal_size(self._out)
        return (max(columns or 80, SMALLEST[0]), max(lines or 24, SMALLEST[1]))

    def draw(self, lines: Sequence[str]) -> None:
        """Draw all lines in one write, so that the terminal does not flicker. Each line is cleared
        before it is written: after a full line, the cursor is still on its last character."""
        self._write(HOME + "\r\n".join(CLEAR_LINE + line for line in lines))

    def _write(self, text: str) -> None:
        left = text.encode(self._encoding, "replace")
        try:
            while left:
                left = left[os.write(self._out, left) :]
        except OSError:
            raise Ended(signal.SIGHUP) from None  # the terminal is gone

    def wait(self, seconds: float, other: int) -> Iterator[str]:
        """Wait for a key, a new size, or until ``other`` is readable. Yield the keys.

        Raises Ended.
        """
        with suppress(InterruptedError):
            ready, _, _ = select.select([self._in, self._wakes, other], [], [], seconds)
            if self._wakes in ready:
                self._wakes.recv(4096)
                self._handle_signals()
            if self._in in ready:
                yield from self._keys()

    def _handle_signals(self) -> None:
        numbers, self._signals = self._signals, []
        for number in numbers:
            if number in ENDED:
                raise Ended(number)
            if number == signal.SIGTSTP:
                self._stop()
            elif number == signal.SIGCONT:
                self._take_over()  # the shell may have changed the terminal

    def _stop(self) -> None:
        """Stop as a program does that does not handle SIGTSTP. Return when it is continued."""
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._on_signal)
        self._take_over()

    def _keys(self) -> Iterator[str]:
        read = os.read(self._in, 1024)
        if not read:
            raise Ended(signal.SIGHUP)  # the terminal is gone
        text = self._decoder.decode(read)
        while _is_open(text) and select.select([self._in], [], [], ESCAPE_SECONDS)[0]:
            more = os.read(self._in, 1024)
            if not more:
                break
            text += self._decoder.decode(more)
        yield from keys(text)


def keys(text: str) -> Iterator[str]:
    """Yield the keys of a text that a terminal has sent. Unknown sequences are ignored."""
    at = 0
    while at < len(text):
        char, at = text[at], at + 1
        if char == "\x1b":
            sequence = _sequence(text[at:])
            at += len(sequence)
            if sequence:
                # A terminal sends O instead of [ in its application mode.
                name = SEQUENCES.get(sequence.replace("O", "[", 1))
                if name:
                    yield name
            else:
                yield "escape"
        elif char in CHARACTERS:
            yield CHARACTERS[char]
        elif char.isprintable():
            yield char


def _is_open(text: str) -> bool:
    """Return whether the text ends within a sequence."""
    start = text.rfind("\x1b")
    return start >= 0 and not _sequence(text[start + 1 :])


def _sequence(text: str) -> str:
    """Return the complete sequence at the beginning, without its escape; "": there is none."""
    if text[:1] == "O":
        return text[:2] if len(text) >= 2 else ""
    if text[:1] == "[":
        for at, char in enumerate(text[1:], 1):
            if "@" <= char <= "~":
                return text[: at + 1]
    return ""


def obstacle() -> str:
    """Return why a program cannot draw on its terminal; "": it can."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return "the input or the output is not a terminal"
    if os.environ.get("TERM", "") in ("", "dumb"):
        return f"this terminal cannot move the cursor (TERM is {os.environ.get('TERM') or 'empty'})"
    return ""


def has_utf8() -> bool:
    """Return whether the terminal shows Unicode. The fonts of the Linux console lack bars."""
    locale = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_CTYPE", "LANG"))), "")
    return "utf" in locale.lower() and os.environ.get("TERM") != "linux"
