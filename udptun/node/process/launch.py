"""Start a forwarder as a separate process, which keeps running after its starter has ended.

Owns: the file with the forwarder's options, the check whether a running forwarder has these
options, and the start of the forwarder as a detached process. Does not depend on leases or routes.
The caller decides when a forwarder is needed. The module is synchronous and uses only the standard
library, because commands that must start quickly use it too. Any thread.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ...errors import FieldError, NoForwarder, UdptunError
from ...files import DISK_ERRORS, make_directory, open_log, read_own_file, replace_file
from ...instance import Instance
from ...model import ACCELERATES, ADMITS, DEFAULT_DSCP
from ...takeover.kept import variable
from ...text import cut

if TYPE_CHECKING:
    import subprocess

    from ...control.client import ControlClient

FORWARD_FILE = "forward.json"  # in the directory of the control socket, by default
STATE_FILE = "routes"  # the forwarder's table, in the state directory
FORWARD_FILE_MODE = 0o640  # the group may read it, for a forwarder of another user
LOG_FILE = "forwarder.log"  # in the state directory
READY_SECONDS = 15.0
POLL_SECONDS = 0.02
LOG_TAIL = 400  # characters at the end of a forwarder's log that the error quotes
READ_TAIL = 16384  # bytes of the log that are looked at for that

# A service manager sets these variables for the process that it starts. They must not reach the
# forwarder.
_NOT_INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID",
                  "LISTEN_FDNAMES", "RUNTIME_DIRECTORY", "STATE_DIRECTORY")


@dataclass(frozen=True, slots=True)
class ForwarderSpec:
    """The options that a forwarder must have. Each string has the form that it has in the
    forwarder's status.

    mtu    the MTU of the TUN; None: the forwarder derives the MTU from the underlay
    state  the file in which the forwarder saves its routes
    mark   the mark of its datagrams; None: no mark
    accelerate  "auto": packets may pass in the kernel
    admit    the inner destinations that it accepts: "any", or "own": those of ``subnets``
    subnets  this node's own prefixes of the overlay
    """

    control: str
    listen: tuple[str, ...]
    addresses: tuple[str, ...]
    networks: tuple[str, ...]
    tun: str
    state: str
    mtu: int | None = None
    mark: str | None = None
    dscp: str = DEFAULT_DSCP
    accelerate: str = ACCELERATES[0]
    admit: str = ADMITS[0]
    subnets: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the options of ``udptun forward``. The keys are the long option names."""
        options: dict[str, Any] = {
            "tun": self.tun, "address": list(self.addresses), "network": list(self.networks),
            "listen": list(self.listen), "control": self.control, "state": self.state,
        }
        if self.mtu is not None:
            options["mtu"] = self.mtu
        if self.mark is not None:
            options["mark"] = self.mark
        if self.dscp != DEFAULT_DSCP:
            options["dscp"] = self.dscp
        if self.accelerate != ACCELERATES[0]:
            options["accelerate"] = self.accelerate
        if self.admit != ADMITS[0]:
            options["admit"] = self.admit
        if self.subnets:
            options["subnet"] = list(self.subnets)
        return options

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that ``write`` wrote. Raises FileNotFoundError, FieldError."""
        try:
            options = json.loads(path.read_bytes())
            return cls(
                control=options["control"], listen=tuple(options["listen"]),
                addresses=tuple(options["address"]), networks=tuple(options["network"]),
                tun=options["tun"], state=options["state"], mtu=options.get("mtu"),
                mark=options.get("mark"), dscp=options.get("dscp", DEFAULT_DSCP),
                accelerate=options.get("accelerate", ACCELERATES[0]),
                admit=options.get("admit", ADMITS[0]),
                subnets=tuple(options.get("subnet", ())),
            )
        except (ValueError, KeyError, TypeError) as exc:
            expected = "the options of a forwarder, as JSON"
            raise FieldError(str(path), f"{exc}", expected) from None

    def write(self, path: Path) -> None:
        """Replace the file atomically. Create its directory if there is none."""
        make_directory(path.parent)
        text = json.dumps(self.to_json(), indent=2).encode()
        replace_file(path, [text, b"\n"], FORWARD_FILE_MODE)

    def changes(self, status: Mapping[str, Any]) -> dict[str, Any]:
        """Return what has to change in a running forwarder, as arguments of ``change_device``.

        Return nothing if the forwarder has the wanted options, or if an option that cannot change
        at run time differs too.
        """
        device, found = status["device"], dict[str, Any]()
        if self.mtu is not None and self.mtu != device["mtu"]:
            found["mtu"] = self.mtu
        if self.listen != tuple(device["listen"]):
            found["listen"] = self.listen
        as_changed = {**status, "device": {**device, **found}}
        return {} if self.mismatch(as_changed) else found

    def mismatch(self, status: Mapping[str, Any]) -> str:
        """Compare a running forwarder's status with these options.

        Return a text that describes the first difference, or "" if there is none.
        """
        device = status["device"]
        # For other values of admit, a forwarder needs them only to report wrong routes.
        needs_subnets = self.admit == "own"
        for label, wanted, actual in (
            ("its device", self.tun, device["name"]),
            ("its addresses", self.addresses, tuple(device["addresses"])),
            ("its networks", self.networks, tuple(device["networks"])),
            ("it listens on", self.listen, tuple(device["listen"])),
            ("its mark", self.mark, status.get("mark")),  # older forwarders have no mark
            ("its option dscp", self.dscp, status.get("dscp", DEFAULT_DSCP)),
            ("its option accelerate", self.accelerate,
             status.get("accelerate", {}).get("mode", ACCELERATES[0])),
            ("its option admit", self.admit, status.get("admit", ADMITS[0])),
            ("its subnets", self.subnets if needs_subnets else (),
             tuple(device.get("subnets", ())) if needs_subnets else ()),
            ("its MTU", device["mtu"] if self.mtu is None else self.mtu, device["mtu"]),
        ):
            if wanted != actual:
                return f"{label}: {_text(actual)} instead of {_text(wanted)}"
        return ""


def _text(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


class NotStarted(UdptunError):
    """A forwarder that we or another program have just started does not answer as expected."""


def spawn(
    forward_file: Path, log: Path, instance: Instance, kept: Mapping[str, int] | None = None,
    take_over: bool = False, standby: int | None = None, log_format: str = "text",
    to_stderr: bool = True,
) -> subprocess.Popen[bytes]:
    """Start ``udptun forward`` with the options in the file, in its own session and process group.

    kept       descriptors of a forwarder that has died, by name, for the new one
    take_over  take over from the forwarder that runs
    standby    a descriptor; the process waits at it until it is needed (``standby``)
    log_format the format of the log: "text" or "json"
    to_stderr  while the disk of ``log`` is full or read-only, the log goes to our own stderr; if
               False, it is lost. Use False if our caller reads our output until all processes have
               closed the pipe, as flanneld does: it would wait until the forwarder ends

    The process inherits no terminal, and no other file descriptors than these. The forwarder keeps
    ``log`` below a limit.
    """
    import subprocess

    env = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    env |= variable(kept or {})
    argv = [sys.executable, "-m", "udptun", "forward", "--instance", instance.name]
    fds = [*(kept or {}).values()]
    if standby is not None:
        argv += ["--standby", str(standby)]  # before --wait-for: the file can still change
        fds.append(standby)
    argv += ["--wait-for", str(forward_file), "--log-format", log_format]
    if take_over:
        argv.append("--take-over")
    with os.fdopen(_open_output(log, to_stderr), "ab") as out:
        if log.parent.exists():
            argv += ["--log-file", str(log)]  # used as soon as the disk allows it
        return subprocess.Popen(
            argv, pass_fds=fds,
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd="/",
            env=env,
        )


def _open_output(log: Path, to_stderr: bool) -> int:
    try:
        make_directory(log.parent)
        return open_log(log)
    except OSError as exc:
        if exc.errno not in DISK_ERRORS:
            raise
        return os.dup(2) if to_stderr else os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def wait_ready(
    client: ControlClient, spec: ForwarderSpec, child: subprocess.Popen[bytes] | None,
    log: Path, seconds: float = READY_SECONDS,
) -> None:
    """Wait until a forwarder with the options of ``spec`` answers. Raises NotStarted.

    child  the process that we started; None: another program starts the forwarder
    """
    deadline = time.monotonic() + seconds
    while True:
        ended = child is not None and child.poll() is not None
        try:
            why = spec.mismatch(client.status(peers=False))
        except NoForwarder as exc:
            why = str(exc)
        if not why:
            return
        if ended:
            raise NotStarted(
                f"the forwarder ended as soon as it was started: {log_tail(log) or why}")
        if time.monotonic() > deadline:
            raise NotStarted(f"the forwarder is not ready after {seconds:g} s: {why}")
        time.sleep(POLL_SECONDS)


def how_ended(code: int, log: Path) -> str:
    """Say why a forwarder that we started has ended. ``code`` is the Popen's return code."""
    tail = log_tail(log)
    if code >= 0:
        return f"the forwarder ended: {tail or code}"
    # The log of a process that was killed does not have the reason, but a crash may write there.
    name = next((one.name for one in signal.Signals if one == -code), str(-code))
    return f"the forwarder was ended by the signal {name}; the end of its log: {tail or 'empty'}"


def log_tail(log: Path) -> str:
    """Return the end of a forwarder's log as one line: the last lines that are at most LOG_TAIL
    characters together. Return "" if the log cannot be read."""
    try:
        text = read_own_file(log)
    except OSError:
        return ""
    lines: list[str] = []
    for line in reversed(text[-READ_TAIL:].decode(errors="replace").splitlines()):
        message = _message_of(line)
        if lines and len(message) + sum(map(len, lines)) > LOG_TAIL:
            break
        lines.insert(0, message)
    return cut(" ".join(" ".join(lines).split()), LOG_TAIL)


def _message_of(line: str) -> str:
    """Return the message of a line in JSON, or the line itself."""
    try:
        entry = json.loads(line)
        return str(entry["message"])
    except (ValueError, KeyError, TypeError):
        return line
