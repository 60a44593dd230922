"""Descriptors that outlive a forwarder: the names under which they are kept, and how the next
forwarder inherits them.

A service manager or the node daemon keeps copies of the TUN queues and the UDP sockets. When the
forwarder has died, its successor inherits them: from systemd as sd_listen_fds(3) describes, from
the node daemon through the variable KEPT. Owns the names and both forms. Does not use the
descriptors. Threading: pure functions, except that ``inherited`` changes the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from contextlib import suppress

KEPT = "UDPTUN_KEPT_DESCRIPTORS"  # NAME=NUMBER, separated by spaces
FIRST_FD = 3  # SD_LISTEN_FDS_START
_SYSTEMD = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def tun_name(index: int) -> str:
    """Return the name of the descriptor of a TUN queue."""
    return f"tun-{index}"


def udp_name(index: int, version: int) -> str:
    """Return the name of the descriptor of a worker's UDP socket."""
    return f"udp-{index}-{version}"


def is_device(name: str) -> bool:
    return name.startswith(("tun-", "udp-"))


def inherited(environ: MutableMapping[str, str] = os.environ) -> dict[str, int]:
    """Return the kept descriptors that this process has inherited, by name.

    Remove the variables, and let no child inherit the descriptors. Descriptors with other names are
    left alone.
    """
    named = _of_daemon(environ.pop(KEPT, ""))
    pid, count, names = (environ.pop(name, "") for name in _SYSTEMD)
    if pid == str(os.getpid()) and count.isdigit():
        numbers = range(FIRST_FD, FIRST_FD + int(count))
        named |= {name: fd for name, fd in zip(names.split(":"), numbers, strict=False)
                  if is_device(name)}
    for name, fd in list(named.items()):
        try:
            os.set_inheritable(fd, False)
        except OSError:  # not open
            del named[name]
    return named


def variable(named: Mapping[str, int]) -> dict[str, str]:
    """Return the variable for a child that inherits these descriptors."""
    return {KEPT: " ".join(f"{name}={fd}" for name, fd in named.items())} if named else {}


def _of_daemon(text: str) -> dict[str, int]:
    named = {}
    for word in text.split():
        name, _, number = word.partition("=")
        with suppress(ValueError):
            if is_device(name):
                named[name] = int(number)
    return named
