"""Give up the capabilities that a process does not need, for itself and for its children.

Owns: the system calls that change capabilities and the limit of locked memory, and the check
whether the files of a process can be used without the two capabilities that override file modes. A
leaf: the callers know what they need. Capabilities belong to a thread. So call ``keep_only`` before
the first other thread is started; later threads inherit them. Source: capabilities(7), prctl(2),
linux/capability.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

log = logging.getLogger(__name__)

PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT, AMBIENT_RAISE, AMBIENT_CLEAR_ALL = 47, 2, 4
CAPABILITY_VERSION_3 = 0x20080522
MAX_CAPABILITY = 63


class Capability(IntEnum):
    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    NET_BIND_SERVICE = 10
    NET_ADMIN = 12
    NET_RAW = 13
    BPF = 39

    def __str__(self) -> str:
        return f"CAP_{self.name}"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a process needs from now on.

    use       capabilities of the process itself
    children  capabilities that its children may get; empty: it has no children that need any
    read      files and directories that it will read; one that does not exist is not checked
    write     files that it will replace or create
    """

    use: frozenset[Capability]
    children: frozenset[Capability] = frozenset()
    read: tuple[Path, ...] = ()
    write: tuple[Path, ...] = ()


def lift_memory_limit() -> None:
    """Raise the limit of locked memory. Before Linux 5.11, eBPF programs and maps count to it.

    Without CAP_SYS_RESOURCE, only up to the hard limit; so call it before ``keep_only``. Children
    inherit the new limit.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    for limit in (resource.RLIM_INFINITY, hard):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
            return


def keep_only(needs: Needs) -> None:
    """Give up all capabilities except those in ``needs``, permanently.

    Afterwards no program that this process runs gets others, also not a setuid program. If a file
    in ``needs`` cannot be used otherwise, CAP_DAC_OVERRIDE or CAP_DAC_READ_SEARCH is kept too, and
    a warning names the file. This concerns root with a file in another user's directory.

    Raises OSError.
    """
    if len(list(Path("/proc/self/task").iterdir())) != 1:  # the other threads would keep everything
        raise RuntimeError("capabilities must be given up before another thread is started")
    permitted = _permitted()
    use = _mask(needs.use) & permitted
    overriding = _mask(_overriding(needs, use, permitted))
    use |= overriding
    children = _mask(needs.children) & permitted | (overriding if needs.children else 0)
    _limit_bounding_set(children)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_CAP_AMBIENT, AMBIENT_CLEAR_ALL)
    # Children of root get the bounding set. Children of another user get only the ambient set.
    ambient = 0 if os.geteuid() == 0 else children & use
    _set(use, use | children, ambient)
    for number in range(MAX_CAPABILITY + 1):
        if ambient >> number & 1:
            _prctl(PR_CAP_AMBIENT, AMBIENT_RAISE, number)


def program_files() -> tuple[Path, ...]:
    """Return the directories from which this process may still import modules."""
    paths = [Path(entry) for entry in sys.path if entry]
    return (Path(__file__).resolve().parent, *(path for path in paths if path.exists()))


def _overriding(needs: Needs, use: int, permitted: int) -> set[Capability]:
    """Return the capabilities without which the files cannot be used. Logs which files.

    A file that cannot be used with all our capabilities either, for example on a read-only file
    system, needs none.
    """
    _set(use, permitted, 0)
    missing = _unusable(needs)
    _set(permitted, permitted, 0)
    missing -= _unusable(needs)
    for capability, path in sorted(missing):
        log.warning("%s is kept, because user %d may not use %s without it",
                    capability, os.geteuid(), path)
    return {capability for capability, _ in missing}


def _unusable(needs: Needs) -> set[tuple[Capability, Path]]:
    write = ((Capability.DAC_OVERRIDE, path) for path in needs.write if not _may_write(path))
    read = ((Capability.DAC_READ_SEARCH, path) for path in needs.read if not _may_read(path))
    return {*write, *read}


def _may_write(path: Path) -> bool:
    """Return whether we may replace the file, append to it, or create it and its directories."""
    directory = _existing(path.parent)
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        return False
    try:
        path.stat()
    except FileNotFoundError:
        return True
    return os.access(path, os.R_OK | os.W_OK, effective_ids=True)


def _may_read(path: Path) -> bool:
    found = _existing(path)
    if found != path:  # it does not exist yet
        return os.access(found, os.X_OK, effective_ids=True)
    wanted = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
    return os.access(path, wanted, effective_ids=True)


def _existing(path: Path) -> Path:
    """Return ``path``, or its nearest parent that exists or that we may not look into."""
    for found in (path, *path.absolute().parents):
        try:
            found.stat()
        except FileNotFoundError:
            continue
        except OSError:
            return found.parent
        return found
    return Path("/")


def _mask(capabilities: Iterable[Capability]) -> int:
    return sum(1 << number for number in set(capabilities))


def _limit_bounding_set(mask: int) -> None:
    """Remove the others from the bounding set. Without CAP_SETPCAP it stays: then only
    ``PR_SET_NO_NEW_PRIVS`` keeps children from getting more than this process has."""
    for number in range(MAX_CAPABILITY + 1):
        if not mask >> number & 1 and _libc().prctl(PR_CAPBSET_READ, number, 0, 0, 0) == 1:
            try:
                _prctl(PR_CAPBSET_DROP, number)
            except PermissionError:
                return


def _permitted() -> int:
    header = ctypes.create_string_buffer(struct.pack("=Ii", CAPABILITY_VERSION_3, 0), 8)
    data = ctypes.create_string_buffer(24)
    _check(_libc().capget(header, data), "capget")
    words = struct.unpack("=6I", data.raw)  # effective, permitted, inheritable: low, then high
    return int(words[1] | words[4] << 32)


def _set(effective: int, permitted: int, inheritable: int) -> None:
    sets = (effective, permitted, inheritable)
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    data = struct.pack("=6I", *(part & 0xFFFFFFFF for part in sets), *(part >> 32 for part in sets))
    _check(_libc().capset(header, data), "capset")


def _prctl(option: int, first: int, second: int = 0) -> None:
    arguments = (ctypes.c_ulong(value) for value in (first, second, 0, 0))
    _check(_libc().prctl(option, *arguments), f"prctl({option})")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
