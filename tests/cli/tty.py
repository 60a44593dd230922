"""A terminal for tests: a pty, and an emulator (pyte) that shows what a person would see.

Owns the process and both. ``until`` waits for what the program draws; a test never sleeps.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import pyte

DEADLINE_SECONDS = 60.0
UDPTUN = (sys.executable, "-m", "udptun")


class Tty:
    """A program on a terminal of a size, as the leader of its session."""

    def __init__(
        self, command: Sequence[str], columns: int = 80, lines: int = 24,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.master, self._slave = pty.openpty()
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._set_size(columns, lines)
        self.at_start = self.modes()
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=self._slave, stdout=self._slave,
            stderr=self._slave, env=os.environ | {
                "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **(env or {})})

    def __enter__(self) -> Tty:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)
        os.close(self._slave)

    def modes(self) -> list[Any]:
        """Return the modes of the terminal, such as echo."""
        return termios.tcgetattr(self._slave)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        """Change the size. The kernel sends SIGWINCH."""
        self.screen.resize(lines, columns)
        self._set_size(columns, lines)

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def read(self, seconds: float) -> bool:
        """Read what arrives within this time. Return whether there was something."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        data = os.read(self.master, 65536)
        self.raw += data
        self._stream.feed(data)
        return bool(data)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def until(self, condition: str | Callable[[], object]) -> str:
        """Read until the text is on the screen, or the condition is true. Return the text."""
        deadline = time.monotonic() + DEADLINE_SECONDS

        def reached() -> object:
            return condition in self.text if isinstance(condition, str) else condition()

        while not reached():
            assert time.monotonic() < deadline, f"waiting for {condition!r}:\n{self.text}"
            self.read(0.2)
        return self.text

    def ended(self) -> int:
        """Wait for the end of the program, and return its exit code."""
        self.until(lambda: self.process.poll() is not None)
        while self.read(0):
            pass
        return self.process.wait()
