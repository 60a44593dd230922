"""The names of everything that one instance of udptun creates on a host. A leaf.

Several instances can run on one host: two overlays side by side. Each has a name, and every device,
nftables table, socket, lock, state directory and file that it creates is named after it here, so
that two instances share nothing by accident. The default instance keeps the names that udptun and
flannel have always used.

Owns the grammar of instance names, and the names derived from them. Creates nothing but the lock.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import FieldError, UdptunError

DEFAULT_INSTANCE = "udptun"
FLANNEL = "flannel"  # the default instance has some of flannel's names: no other may have them
MAX_DEVICE_NAME = 15  # IFNAMSIZ less the terminating zero: linux/if.h
_NAME = re.compile(r"[a-z][a-z0-9-]{0,7}")  # nft accepts no name that begins with a digit


class InstanceRunning(UdptunError):
    """Another process of the same role runs with this instance name in this network namespace."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance, by its name: 1 to 8 of a-z, 0-9 and ``-``, beginning with a letter."""

    name: str = DEFAULT_INSTANCE

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name == FLANNEL:
            raise FieldError(
                "instance", self.name,
                f"1 to 8 of a-z, 0-9 and -, beginning with a letter, and not {FLANNEL}",
            )

    @property
    def is_default(self) -> bool:
        return self.name == DEFAULT_INSTANCE

    @property
    def tun(self) -> str:
        return f"{self.name}0"

    def nft_table(self, version: int) -> str:
        """The nftables table of IP version 4 or 6."""
        return f"{self.name}-ipv{version}"

    def vxlan_device(self, vni: int, version: int) -> str:
        """The VXLAN device whose underlay is IP version 4 or 6; FieldError: the name is too
        long for the kernel."""
        prefix = FLANNEL if self.is_default else self.name
        device = f"{prefix}.{vni}" if version == 4 else f"{prefix}-v6.{vni}"
        if len(device) > MAX_DEVICE_NAME:
            raise FieldError(
                "VNI", vni, f"one whose device name {device} has at most {MAX_DEVICE_NAME} bytes"
            )
        return device

    @classmethod
    def of_vxlan_device(cls, device: str, vni: int) -> Instance | None:
        """The instance that creates a device of this name; None: none does."""
        prefix = device.removesuffix(f".{vni}")
        prefix = prefix.removesuffix("-v6") if device != prefix else ""
        if prefix == FLANNEL:
            return cls()
        return cls(prefix) if _NAME.fullmatch(prefix) else None

    @property
    def run_dir(self) -> Path:
        return Path("/run") / self.name

    @property
    def state_dir(self) -> Path:
        return Path("/var/lib") / self.name

    @property
    def subnet_file(self) -> Path:
        """The file that CNI plugins read; for the default instance it is flannel's."""
        return Path("/run/flannel/subnet.env") if self.is_default else self.run_dir / "subnet.env"

    def control_socket(self, run_dir: Path | None = None) -> Path:
        """The forwarder's control socket. ``run_dir``: $RUNTIME_DIRECTORY, if that is set."""
        return (run_dir or self.run_dir) / f"{self.name}.sock"

    @contextmanager
    def locked(self, role: str, run_dir: Path | None = None) -> Iterator[None]:
        """Hold this instance's name in this network namespace while a process has ``role``
        ("forward", "node"). The kernel releases the lock when the process ends, however it ends.

        The file has mode 0600, so other users cannot take the lock. Its name contains the inode of
        the network namespace, because several namespaces can share one /run.
        Raises InstanceRunning, OSError.
        """
        directory = run_dir or self.run_dir
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        namespace = Path("/proc/thread-self/ns/net").stat().st_ino
        path = directory / f"{self.name}.{role}.{namespace}.lock"
        fd = _lock_file(path)
        if fd is None:
            raise InstanceRunning(
                f"udptun {role} of the instance {self.name} is already running in this network"
                f" namespace ({path}); give this one another --instance"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before the lock is released: see _lock_file
            os.close(fd)


def _lock_file(path: Path) -> int | None:
    """Create the file if necessary, and lock it. Return its descriptor, or None if another process
    holds the lock.

    A process that ends removes the file. Between our open and our flock the file may therefore have
    lost its name: a lock on it would exclude nobody, so open the path again.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)
