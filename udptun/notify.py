"""Notifications to systemd: the protocol of sd_notify(3), without systemd's library.

Owns: the socket that NOTIFY_SOCKET names, and the watchdog's interval. The caller decides when a
node is ready. Without systemd, the calls do nothing. No call raises an error. Any thread; sending a
notification takes microseconds.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence, Set
from typing import Self

from .model import parse_number

log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 1.0  # systemd reads at once; the limit is for a systemd that hangs
_MAX_USEC = 999_999_999


class Notifier:
    """Sends notifications to the service manager.

    address     the service manager's socket; "": nothing is sent
    watchdog_s  the service manager ends a service that sends no watchdog notification for so many
                seconds; None: there is no watchdog
    """

    def __init__(self, address: str = "", watchdog_s: float | None = None) -> None:
        self.watchdog_s = watchdog_s if address else None
        self._address = address
        self._failed = False
        self._kept: Set[str] = frozenset()  # names of descriptors

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ) -> Self:
        """Read systemd's variables, and remove them from the environment.

        A child process that inherited the variables could send notifications in our name.
        """
        address = environ.pop("NOTIFY_SOCKET", "")
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        watchdog_s = None
        if usec and pid in ("", str(os.getpid())):
            try:
                watchdog_s = parse_number("WATCHDOG_USEC", usec, 1, _MAX_USEC) / 1e6
            except ValueError as error:
                log.warning("%s: no watchdog notifications are sent", error)
        return cls(address, watchdog_s)

    def ready(self, status: str = "") -> None:
        """Report that the start or a reload is complete."""
        self._send("READY=1", *([_status(status)] if status else ()))

    def reloading(self) -> None:
        """Report that a reload begins. A call of ``ready`` reports its end.

        A unit with Type=notify-reload requires the time in this notification.
        """
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now_us}")

    def stopping(self, status: str = "") -> None:
        self._send("STOPPING=1", *([_status(status)] if status else ()))

    def main_process(self, pid: int) -> None:
        """Report that another process continues the service."""
        self._send(f"MAINPID={pid}")

    def keep(self, named: Mapping[str, int]) -> None:
        """Let the service manager keep copies of these descriptors, in place of those of an earlier
        call. A later start of the service inherits them (sd_listen_fds(3))."""
        for name in sorted(self._kept | named.keys()):
            self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")
        self._kept = frozenset(named)
        for name, fd in named.items():
            self._send("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=(fd,))

    def forget(self, names: Iterable[str]) -> None:
        """Let the service manager close its copies of these descriptors. Return when it has done
        so, or after SEND_TIMEOUT_S."""
        for name in names:
            self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")
        read, write = os.pipe2(os.O_CLOEXEC)
        try:
            self._send("BARRIER=1", fds=(write,))  # it closes this copy last (sd_notify_barrier(3))
        finally:
            os.close(write)
        try:
            select.select([read], [], [], SEND_TIMEOUT_S)
        finally:
            os.close(read)

    def status(self, text: str) -> None:
        """Set the status line of ``systemctl status``. "" clears the line."""
        self._send(_status(text))

    def watchdog(self) -> None:
        self._send("WATCHDOG=1")

    async def feed(self, alive: Callable[[], Awaitable[bool]]) -> None:
        """Twice per watchdog interval, notify the watchdog if ``alive`` returns True.

        Runs until cancelled. Returns at once if there is no watchdog.
        """
        import asyncio  # not above: the command line imports this module for its --help too

        while self.watchdog_s is not None:
            if await alive():
                self.watchdog()
            await asyncio.sleep(self.watchdog_s / 2)

    def _send(self, *lines: str, fds: Sequence[int] = ()) -> None:
        if not self._address:
            return
        # An "@" at the start stands for the zero byte of an abstract socket address.
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(SEND_TIMEOUT_S)
                sock.connect(address)
                socket.send_fds(sock, ["\n".join(lines).encode()], fds)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("systemd does not accept notifications at %s: %s", self._address, error)
            self._failed = True


def _status(text: str) -> str:
    return f"STATUS={' '.join(text.split())}"
