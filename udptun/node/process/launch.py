"""Bring up a forwarder as a process of its own, which outlives whoever asked for it.

Owns: the file that says what the forwarder shall be, whether a running one is that, and how one is
started detached. Refuses to know: leases, routes, and when a forwarder is wanted. Synchronous and
of the standard library only, since commands that must be quick use it too; any thread.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ...errors import FieldError, NoForwarder, UdptunError
from ...files import replace_file

if TYPE_CHECKING:
    import subprocess

    from ...control.client import ControlClient

FORWARD_FILE = "forward.json"  # beside the control socket, unless told otherwise
LOG_FILE = "forwarder.log"
READY_SECONDS = 15.0
POLL_SECONDS = 0.02
LOG_TAIL = 400  # bytes of the log of a forwarder that did not start

# What a service manager told the process that starts a forwarder is not meant for the forwarder.
_NOT_INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID",
                  "LISTEN_FDNAMES", "RUNTIME_DIRECTORY", "STATE_DIRECTORY")


@dataclass(frozen=True, slots=True)
class ForwarderSpec:
    """What a forwarder shall be. Texts are in the form that its status shows.

    mtu    of the TUN, or None for what the underlay gives
    state  where it keeps its routes
    """

    control: str
    listen: tuple[str, ...]
    addresses: tuple[str, ...]
    networks: tuple[str, ...]
    tun: str
    state: str
    mtu: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The long options of ``udptun forward``, by name."""
        options: dict[str, Any] = {
            "tun": self.tun, "address": list(self.addresses), "network": list(self.networks),
            "listen": list(self.listen), "control": self.control, "state": self.state,
        }
        return options if self.mtu is None else options | {"mtu": self.mtu}

    @classmethod
    def read(cls, path: Path) -> Self:
        """What was written there. FileNotFoundError; FieldError."""
        try:
            told = json.loads(path.read_bytes())
            return cls(
                control=told["control"], listen=tuple(told["listen"]),
                addresses=tuple(told["address"]), networks=tuple(told["network"]),
                tun=told["tun"], state=told["state"], mtu=told.get("mtu"),
            )
        except (ValueError, KeyError, TypeError) as exc:
            expected = "the options of a forwarder, as JSON"
            raise FieldError(str(path), f"{exc}", expected) from None

    def write(self, path: Path) -> None:
        """As a whole; the directory is made."""
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        replace_file(path, [json.dumps(self.to_json(), indent=2).encode(), b"\n"])

    def misfit(self, status: Mapping[str, Any]) -> str:
        """Why a running forwarder with this status is not the one; "" if it is."""
        device = status["device"]
        for what, wanted, has in (
            ("its device", self.tun, device["name"]),
            ("its addresses", self.addresses, tuple(device["addresses"])),
            ("its networks", self.networks, tuple(device["networks"])),
            ("it listens on", self.listen, tuple(device["listen"])),
            ("its MTU", device["mtu"] if self.mtu is None else self.mtu, device["mtu"]),
        ):
            if wanted != has:
                return f"{what}: {_words(has)} instead of {_words(wanted)}"
        return ""


def _words(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


class NotStarted(UdptunError):
    """A forwarder was started, or waited for, and is not there as it should be."""


def spawn(forward_file: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start ``udptun forward`` on what the file says, in a session and process group of its own.

    It holds nothing of ours: no terminal, no pipe that a parent reads to its end, no descriptor.
    What it says goes to ``log``.
    """
    import subprocess

    log.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    env = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "udptun", "forward", "--wait-for", str(forward_file)],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd="/",
            env=env,
        )


def wait_ready(
    client: ControlClient, spec: ForwarderSpec, child: subprocess.Popen[bytes] | None,
    log: Path, seconds: float = READY_SECONDS,
) -> None:
    """Return when a forwarder answers that is as ``spec`` wants it. Raises NotStarted.

    child  the one we started, or None: somebody else starts it
    """
    deadline = time.monotonic() + seconds
    while True:
        ended = child is not None and child.poll() is not None
        try:
            why = spec.misfit(client.status(peers=False))
        except NoForwarder as exc:
            why = str(exc)
        if not why:
            return
        if ended:
            said = log_tail(log) or why
            raise NotStarted(f"the forwarder ended as soon as it was started: {said}")
        if time.monotonic() > deadline:
            raise NotStarted(f"waited {seconds:g} s in vain for the forwarder: {why}")
        time.sleep(POLL_SECONDS)


def log_tail(log: Path) -> str:
    """The last words of a forwarder that ended, on one line; "" where there are none."""
    try:
        text = log.read_bytes()[-LOG_TAIL:]
    except OSError:
        return ""
    return " ".join(text.decode(errors="replace").split())
