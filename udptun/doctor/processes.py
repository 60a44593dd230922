"""The processes of this host that concern the tunnel, as /proc shows them.

Owns how a process of udptun is recognised. Reads /proc; any thread. Without root, the links of
other users' processes cannot be read: such values are None.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..instance import DEFAULT_INSTANCE

PROC = Path("/proc")
ROLES = ("node", "forward")


@dataclass(frozen=True, slots=True)
class Process:
    """One process of udptun in this network namespace.

    role     "node" or "forward"
    state    the letter of /proc/PID/stat: T is stopped, D waits for a disk, Z has ended
    standby  a forwarder that may still wait until it is needed
    """

    pid: int
    role: str
    instance: str
    state: str
    standby: bool
    argv: tuple[str, ...]

    @property
    def is_stopped(self) -> bool:
        return self.state in "Tt"

    def option(self, name: str) -> str | None:
        """Return the value of a long option of the command line; None: it is not there."""
        return option_of(self.argv, name)


def processes(users: Container[int]) -> list[Process]:
    """Return the processes of udptun in this network namespace that run as one of these users.

    Every user can start a process that looks like one of udptun, with options of its choice.
    """
    here = _namespace(PROC / "thread-self")
    found = []
    for folder in _folders():
        try:
            argv = _argv(folder)
            role = _role(argv)
            if role is None or _namespace(folder) not in (here, None) or \
                    not all(user in users for user in _users(folder)):
                continue
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended
            continue
        found.append(Process(
            int(folder.name), role, option_of(argv, "instance") or DEFAULT_INSTANCE, state,
            "--standby" in argv, argv))
    return found


def named(*names: str) -> list[tuple[int, str]]:
    """Return the PID and the name of each process of this network namespace with one of these
    names."""
    found, here = [], _namespace(PROC / "thread-self")
    for folder in _folders():
        try:
            name = (folder / "comm").read_text(errors="replace").rstrip("\n")
        except OSError:
            continue
        if name in names and _namespace(folder) in (here, None):
            found.append((int(folder.name), name))
    return found


def command_line(pid: int) -> tuple[str, ...]:
    """Return the arguments of a process; none if it has ended."""
    try:
        return _argv(PROC / str(pid))
    except OSError:
        return ()


def owners_of_socket(inode: int) -> dict[int, str]:
    """Return {PID: name} of the processes that have this socket open. Those of other users are not
    visible without root."""
    wanted, found = f"socket:[{inode}]", {}
    for folder in _folders():
        try:
            if any(str(one.readlink()) == wanted for one in (folder / "fd").iterdir()):
                name = (folder / "comm").read_text(errors="replace").rstrip("\n")
                found[int(folder.name)] = name
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


def sockets_of(pid: int) -> set[int]:
    """Return the inodes of the sockets of a process."""
    found = set()
    try:
        for one in (PROC / str(pid) / "fd").iterdir():
            kind, _, inode = str(one.readlink()).partition(":[")
            if kind == "socket":
                found.add(int(inode.rstrip("]")))
    except OSError:
        pass
    return found


def capabilities(pid: int) -> int | None:
    """Return the effective capabilities of a process as a bit mask."""
    try:
        for line in (PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    except (OSError, ValueError):
        pass
    return None


def open_files(pid: int) -> tuple[int, int] | None:
    """Return the number of open files of a process, and its limit."""
    try:
        count = sum(1 for _ in (PROC / str(pid) / "fd").iterdir())
        for line in (PROC / str(pid) / "limits").read_text().splitlines():
            if line.startswith("Max open files"):
                return count, int(line.split()[3])
    except (OSError, ValueError):
        pass
    return None


def thread_seconds(pid: int) -> dict[tuple[str, str], float]:
    """Return the CPU time of each thread of a process, by the thread's number and name."""
    found = {}
    tick = os.sysconf("SC_CLK_TCK")
    try:
        for folder in (PROC / str(pid) / "task").iterdir():
            head, _, rest = (folder / "stat").read_text().rpartition(")")
            fields = rest.split()
            found[folder.name, head.partition("(")[2]] = (int(fields[11]) + int(fields[12])) / tick
    except (OSError, ValueError):
        pass
    return found


def _folders() -> Iterator[Path]:
    yield from (folder for folder in PROC.iterdir() if folder.name.isdigit())


def _argv(folder: Path) -> tuple[str, ...]:
    return tuple(map(os.fsdecode, (folder / "cmdline").read_bytes().split(b"\0")[:-1]))


def option_of(argv: tuple[str, ...], name: str) -> str | None:
    """Return the value of ``--name``. Go's flags may have one hyphen."""
    for at, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option in (f"--{name}", f"-{name}"):
            if equals:
                return value
            return argv[at + 1] if at + 1 < len(argv) else None
    return None


def _role(argv: tuple[str, ...]) -> str | None:
    """Return the command of udptun that the command line runs; None: it is another program."""
    for at, word in enumerate(argv[:-1]):
        if Path(word).name == "udptun":
            follows = argv[at + 1:]
            if follows[0] in ROLES:
                return follows[0]
            # Options of the group stand before the command, for example --instance blue.
            return next((one for one in follows if one in ROLES), None) \
                if follows[0].startswith("-") else None
    return None


def _users(folder: Path) -> list[int]:
    """Return the real, effective, saved and file system user of a process. Raises OSError.

    The owner of the folder is not enough: it is root if the process forbids core dumps.
    """
    for line in (folder / "status").read_text(errors="replace").splitlines():
        if line.startswith("Uid:"):
            return [int(word) for word in line.split()[1:]]
    raise ProcessLookupError(errno.ESRCH, "the process has no users")


def _namespace(folder: Path) -> int | None:
    """Return the inode of the network namespace of a process. None: the process is another user's,
    or has ended."""
    try:
        return (folder / "ns/net").stat().st_ino
    except OSError:
        return None
