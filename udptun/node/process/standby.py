"""A process that has loaded the program of a forwarder, and waits until one is needed.

Most of the time of a start is needed to load the program. So after a crash, a standby process
forwards much sooner than a new process. Owns the process and the socket on which it waits. Does not
decide when a forwarder is needed. The module is synchronous. Any thread.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ...instance import Instance
from ...takeover.standby import begin, waiting_pair
from .launch import spawn

if TYPE_CHECKING:
    import subprocess


class Standby:
    """One process. It ends when ``close`` is called, or when this process ends."""

    def __init__(self, process: subprocess.Popen[bytes], ours: socket.socket) -> None:
        self._process = process
        self._socket = ours

    @classmethod
    def start(
        cls, forward_file: Path, log: Path, instance: Instance, log_format: str = "text"
    ) -> Self:
        """Raises OSError. The arguments are those of ``launch.spawn``."""
        ours, theirs = waiting_pair()
        try:
            with theirs:
                return cls(spawn(forward_file, log, instance, standby=theirs.fileno(),
                                 log_format=log_format), ours)
        except BaseException:
            ours.close()
            raise

    def go(self, kept: Mapping[str, int]) -> subprocess.Popen[bytes]:
        """Let the process forward, with descriptors of a forwarder that has died. Raises OSError if
        the process has ended."""
        with self._socket:
            begin(self._socket, kept)
        return self._process

    def close(self) -> None:
        self._socket.close()
        self._process.wait()  # it ends at once, because it only waits for the socket
