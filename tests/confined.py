"""Run a command with the restrictions of a systemd unit, without systemd as the first process.

    python tests/confined.py UNIT[:DROP-IN] WRITABLE COMMAND...

Applies of the unit and its drop-in: CapabilityBoundingSet, NoNewPrivileges, SystemCallFilter,
RestrictAddressFamilies, MemoryDenyWriteExecute, UMask, and ProtectSystem=strict: only WRITABLE,
/run and the file systems of the kernel stay writable. The groups of system calls are those of
systemd-analyze. The other settings of the units hide or protect parts of the host that udptun does
not use.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from udptun import privileges

ALLOW = 0x7FFF0000  # seccomp.h: SCMP_ACT_ALLOW
EQUAL = 4  # SCMP_CMP_EQ
PR_SET_MDWE, MDWE_REFUSE_EXEC_GAIN = 65, 1  # linux/prctl.h, Linux 6.3
CLONE_NEWNS = 0x20000
LIBSECCOMP = "libseccomp.so.2"
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_BPF": 39}


class Compare(ctypes.Structure):
    """struct scmp_arg_cmp of libseccomp: a condition on an argument of a system call."""

    _fields_ = (("argument", ctypes.c_uint), ("operator", ctypes.c_int),
                ("first", ctypes.c_uint64), ("second", ctypes.c_uint64))


def settings(*units: Path) -> dict[str, list[str]]:
    """Return the values of each setting, in the order of the files."""
    found: dict[str, list[str]] = {}
    for unit in units:
        for key, value in re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE):
            found.setdefault(key, []).append(value)
    return found


def expanded(names: list[str]) -> set[str]:
    """Replace the groups of system calls by their members."""
    groups: dict[str, list[str]] = {}
    listed = subprocess.run(["systemd-analyze", "syscall-filter", "--no-pager"], text=True,
                            capture_output=True, check=True).stdout
    for line in listed.splitlines():
        word = line.strip().partition("#")[0].strip()
        if line.startswith("@"):
            members = groups[word] = []
        elif line.startswith(" ") and word:
            members.append(word)
    found: set[str] = set()
    for name in names:
        found |= expanded_by(groups, name)
    return found


def expanded_by(groups: dict[str, list[str]], name: str) -> set[str]:
    if not name.startswith("@"):
        return {name}
    return set().union(*(expanded_by(groups, member) for member in groups[name]))


def allowed_calls(values: list[str]) -> set[str]:
    """Return the names that the lines SystemCallFilter= allow. The first line is an allow list."""
    allowed = expanded(["@default"])
    for value in values:
        if value.startswith("~"):
            allowed -= expanded(value[1:].split())
        else:
            allowed |= expanded(value.split())
    return allowed


def filter_calls(allowed: set[str], families: list[str]) -> None:
    library = ctypes.CDLL(LIBSECCOMP)
    library.seccomp_init.restype = ctypes.c_void_p
    refuse = 0x00050000 | errno.EPERM  # SCMP_ACT_ERRNO
    context = ctypes.c_void_p(library.seccomp_init(refuse))
    for name in sorted(allowed - {"socket"}):
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # it exists on this architecture
            check(library.seccomp_rule_add_array(context, ALLOW, number, 0, None), name)
    number = library.seccomp_syscall_resolve_name(b"socket")
    for family in families:
        condition = Compare(0, EQUAL, getattr(socket, family), 0)
        check(library.seccomp_rule_add_array(context, ALLOW, number, 1, ctypes.byref(condition)),
              family)
    check(library.seccomp_load(context), "seccomp_load")


def check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")


def protect_system(writable: str) -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) < 0:
        raise OSError(ctypes.get_errno(), "unshare")
    for words in (["--make-rprivate", "/"], ["--bind", writable, writable],
                  ["--bind", "/run", "/run"], ["-o", "remount,bind,ro", "/"]):
        subprocess.run(["mount", *words], check=True)


def main() -> None:
    units, writable, *command = sys.argv[1:]
    wanted = settings(*map(Path, units.split(":")))
    calls = allowed_calls(wanted["SystemCallFilter"])
    kept = {CAPABILITIES[name] for line in wanted["CapabilityBoundingSet"] for name in line.split()}
    protect_system(writable)
    os.umask(int(wanted["UMask"][0], 8))
    privileges._limit_bounding_set(sum(1 << number for number in kept))
    assert wanted["NoNewPrivileges"] == ["yes"]
    privileges._prctl(privileges.PR_SET_NO_NEW_PRIVS, 1)
    if "MemoryDenyWriteExecute" in wanted:
        ctypes.CDLL(None).prctl(PR_SET_MDWE, MDWE_REFUSE_EXEC_GAIN, 0, 0, 0)
    filter_calls(calls, wanted["RestrictAddressFamilies"][0].split())
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
