"""The names of everything that one instance of udptun creates on a host. A leaf.

Several instances can run on one host, for example for two overlays. Each instance has a name. From
this name the module derives the names of all devices, nftables tables, sockets, locks, directories
and files of the instance. So two instances cannot use the same one by accident. The default
instance uses the names of earlier versions of udptun, and of flannel.

Owns the grammar of instance names, and the names derived from them. Creates only the lock.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import FieldError, UdptunError
from .files import DISK_ERRORS, FileLock, is_unlocked, make_directory, remove_free_locks

log = logging.getLogger(__name__)

DEFAULT_INSTANCE = "udptun"
FLANNEL = "flannel"  # reserved: the default instance uses names of flannel
MAX_DEVICE_NAME = 15  # IFNAMSIZ minus the terminating zero: linux/if.h
_NAME = re.compile(r"[a-z][a-z0-9-]{0,7}")  # nft accepts no name that begins with a digit


class InstanceRunning(UdptunError):
    """Another process of the same role runs with this instance name in this network namespace."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance. Its name has 1 to 8 of a-z, 0-9 and ``-``, and begins with a letter."""

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
        """Return the name of the nftables table for IP version 4 or 6."""
        return f"{self.name}-ipv{version}"

    @property
    def guard_table(self) -> str:
        """The name of the nftables table with the rules against forged packets, in both families.
        """
        return f"{self.name}-guard"

    def guard_chain(self, way: str) -> str:
        """Return the name of the iptables chain with these rules. ``way`` is "out" or "in"."""
        return f"{self.name.upper()}-GUARD-{way.upper()}"

    def iptables_chain(self, base: str) -> str:
        """Return the name of our iptables chain to which the chain ``base`` jumps.

        ``base`` is FORWARD or POSTROUTING. flannel's abbreviation of the latter is POSTRTG.
        """
        return f"{self.name.upper()}-{'POSTRTG' if base == 'POSTROUTING' else base}"

    def vxlan_device(self, vni: int, version: int) -> str:
        """Return the name of the VXLAN device whose underlay has IP version 4 or 6.

        Raises FieldError if the name is too long for the kernel.
        """
        prefix = FLANNEL if self.is_default else self.name
        device = f"{prefix}.{vni}" if version == 4 else f"{prefix}-v6.{vni}"
        if len(device) > MAX_DEVICE_NAME:
            raise FieldError(
                "VNI", vni, f"one whose device name {device} has at most {MAX_DEVICE_NAME} bytes"
            )
        return device

    @classmethod
    def of_vxlan_device(cls, device: str, vni: int) -> Instance | None:
        """Return the instance whose VXLAN device has this name, or None if there is none."""
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
        """The file that CNI plugins read. The default instance uses flannel's path."""
        return Path("/run/flannel/subnet.env") if self.is_default else self.run_dir / "subnet.env"

    def control_socket(self, run_dir: Path | None = None) -> Path:
        """Return the path of the forwarder's control socket.

        run_dir  $RUNTIME_DIRECTORY; None if it is not set
        """
        return (run_dir or self.run_dir) / f"{self.name}.sock"

    def takeover_socket(self, control: Path) -> Path:
        """Return the path of the socket at which a forwarder hands itself over. It is next to the
        forwarder's control socket. The default is /run/NAME/takeover.sock."""
        if control.name == f"{self.name}.sock":
            return control.with_name("takeover.sock")
        return control.with_name(f"{control.stem}.takeover.sock")

    @property
    def node_socket(self) -> Path:
        """The node daemon's socket."""
        return self.run_dir / "node.sock"

    def lock(self, role: str, run_dir: Path | None = None) -> InstanceLock:
        """Return the lock of this instance and ``role`` ("forward", "node"). It is not held yet."""
        return InstanceLock(self.name, role, run_dir or self.run_dir)

    @contextmanager
    def locked(self, role: str, run_dir: Path | None = None) -> Iterator[None]:
        """Hold the lock of this instance and ``role``. Raises InstanceRunning, OSError."""
        lock = self.lock(role, run_dir)
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def claimed(self, what: str, path: Path, option: str) -> Iterator[None]:
        """Hold the lock file ``path``, which contains our name. Only one instance can hold it.

        what    the object that the lock file protects, for the error message
        option  the option with which the user selects another such object for this instance
        Raises InstanceRunning, which names both instances. Raises OSError.
        """
        make_directory(path.parent)
        lock = FileLock.take(path)
        if lock is None:
            holder = ""
            with suppress(OSError):
                holder = path.read_text().strip()
            raise InstanceRunning(
                f"{what} is in use by the instance {holder or '(unknown)'}: give the instance "
                f"{self.name} another {option}"
            )
        try:
            with suppress(OSError):  # the disk is full or read-only; the text is only for messages
                lock.set_text(f"{self.name}\n")
            yield
        finally:
            lock.release()


class InstanceLock:
    """The lock of an instance and a role in the network namespace. One process can hold it.

    The kernel releases it when the process ends, also after a crash. The lock file has mode 0600,
    so other users cannot take the lock. Its name contains the inode of the network namespace,
    because several namespaces can share one /run. A killed process leaves its file: the next start
    of this role, in any namespace, removes it.
    """

    def __init__(self, name: str, role: str, directory: Path) -> None:
        self._name, self._role, self._directory = name, role, directory
        self.held: FileLock | None = None

    def acquire(self) -> None:
        """Raises InstanceRunning, OSError."""
        make_directory(self._directory)
        path = self.path()
        others = self._alone()
        try:
            self.held = FileLock.take(path)
            remove_free_locks(self._directory, f"{self._name}.{self._role}.*.lock")
        finally:
            others.release()
        if self.held is None:
            instead = "stop that one, or give this one another --instance"
            if self._role == "forward":
                instead = f"take over from it with --take-over, {instead}"
            raise InstanceRunning(
                f"udptun {self._role} of the instance {self._name} is already running in this"
                f" network namespace ({path}); {instead}"
            )

    def _alone(self) -> FileLock:
        """Wait until no other process looks at the lock, and let none look until the release."""
        # A lock on the directory could be taken by every user who can read it.
        return FileLock.wait(self._directory / f".{self._name}.{self._role}.lock")

    def acquire_if_possible(self) -> None:
        """Run without the lock if its directory is not writable, so that a user who owns a
        persistent TUN device does not need root. Raises InstanceRunning."""
        try:
            self.acquire()
        except OSError as error:
            log.info("cannot lock the instance %s, so a second forwarder with this name would not"
                     " be refused: %s", self._name, error)

    def is_free(self) -> bool:
        """Return whether no process holds the lock. The disk may be full or read-only. Raises
        OSError."""
        path = self.path()
        try:
            make_directory(self._directory)
            others = self._alone()  # else a process that starts now could find the lock held by us
        except OSError as exc:
            if exc.errno not in DISK_ERRORS:
                raise
            return is_unlocked(path)
        try:
            if not path.exists():
                return True
            lock = FileLock.take(path)
            if lock is not None:
                lock.release()
            return lock is not None
        finally:
            others.release()

    def release(self) -> None:
        held, self.held = self.held, None
        if held is not None:
            held.release()

    def path(self) -> Path:
        namespace = Path("/proc/thread-self/ns/net").stat().st_ino
        return self._directory / f"{self._name}.{self._role}.{namespace}.lock"
