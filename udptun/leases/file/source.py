"""Leases from a hosts file: the source that needs only this file.

Owns: reading the file again when it changes, and finding this machine's entry in it.
``schema`` has the grammar of the file.
Threads: asyncio, one loop. Helper threads access the file, because it may be large or on a network
file system.

The file is polled once a second. A poll costs one stat(). inotify would miss some changes:
- The path may contain symbolic links. For example, a ConfigMap is updated by replacing a link to a
  directory.
- The file may be on a shared file system, and another machine may write to it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import platform
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from ...errors import FieldError
from ...model import IPAddress
from ...text import os_reason
from ...wait import wait_at_most
from ..advert import read as read_advert
from ..base import (
    Attributes,
    Changes,
    Identity,
    Lease,
    LeaseBook,
    LeaseSource,
    LocalAddresses,
    Snapshot,
    SourceHealth,
    StoreDown,
    StoreRefused,
    Subnets,
)
from ..netconf import NetConfig
from .config import FileConfig
from .schema import HostsFile, parse

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
SETTLE_SECONDS = 0.1  # a file that was modified within this time may be incomplete
SETTLE_TRIES = 10  # after this number of waits, the file is read even if it still changes

Signature = tuple[int, ...]


def open_source(config: FileConfig, local_addresses: LocalAddresses) -> FileSource:
    return FileSource(config.path, node_name=config.node_name, addresses=local_addresses)


async def _no_addresses() -> Iterable[IPAddress]:
    return ()


class FileSource(LeaseSource):
    """A LeaseSource over one file. While the file is invalid, its last valid content applies.

    node_name  the name of our node; "": the node that has our hostname, else the node that has one
               of our addresses
    hostname   default: that of the kernel
    addresses  returns the addresses of this host; called if the names do not identify our node
    The file determines all leases, so ``acquire`` ignores the attributes it is given. Every
    lease, including our own, has the node's port and mtu as an Advert in its backend data.
    """

    def __init__(
        self, path: Path, *, node_name: str = "", hostname: str | None = None,
        addresses: LocalAddresses = _no_addresses, poll_s: float = POLL_SECONDS,
    ) -> None:
        self.health = SourceHealth()
        self._path = path
        self._node_name = node_name
        self._hostname = platform.node() if hostname is None else hostname
        self._addresses = addresses
        self._poll_s = poll_s
        self._signature: Signature | None = None
        self._hosts: HostsFile | None = None
        self._error: StoreDown | FieldError | None = None
        self._own_key = ""  # our node's name, set by ``acquire``
        self._reading = asyncio.Lock()
        self._poll_now = asyncio.Event()

    async def network(self) -> NetConfig:
        return (await self._current()).network

    async def identity(self) -> Identity:
        return self.cached_identity(await self._own_lease())

    def cached_identity(self, lease: Lease) -> Identity:
        """Return the addresses, families, port and MTU of our entry in the file.

        They are in ``lease``, because the lease has all fields of the entry.
        """
        declared = lease.attributes
        families = {address.version for address in (declared.public_ip, declared.public_ipv6)
                    if address is not None}
        return Identity(declared.public_ip, declared.public_ipv6, families=frozenset(families),
                        advert=read_advert(declared.backend_data))

    async def acquire(self, attributes: Attributes, former: Subnets) -> Lease:
        lease = await self._own_lease()
        self._own_key = lease.key
        assert self._hosts is not None
        self._check_own(self._hosts)
        return lease

    async def hold(self, lease: Lease) -> None:
        """Wait until cancelled, because a lease in a file is not renewed.

        ``updates`` checks that the file still has our lease.
        """
        await asyncio.Event().wait()

    async def updates(self) -> AsyncIterator[Snapshot | Changes]:
        book = LeaseBook()
        snapshot_sent = False
        while True:
            await self._poll()
            if self._hosts is not None:
                changes = book.replace(self._hosts.leases)
                if not snapshot_sent:
                    yield Snapshot(tuple(book.leases.values()))
                    snapshot_sent = True
                elif changes:
                    yield Changes(changes)
            await wait_at_most(self._poll_now, self._poll_s)
            self._poll_now.clear()

    def reload(self) -> None:
        """Read the file now, even if stat() shows no change."""
        self._signature = None
        self._poll_now.set()

    async def aclose(self) -> None:
        """Do nothing, because no file is open between reads."""

    # The content of the file

    async def _current(self) -> HostsFile:
        """Return the last valid content.

        Raises StoreDown or FieldError if the file has had no valid content since the start.
        """
        await self._poll()
        if self._hosts is None:
            assert self._error is not None
            raise self._error.with_traceback(None)
        return self._hosts

    async def _poll(self) -> None:
        """Read the file if it has changed. If the new content is valid, use the new content."""
        async with self._reading:
            try:
                signature = await asyncio.to_thread(_settled_signature, self._path)
                self.health.last_contact = time.monotonic()
                if signature != self._signature:
                    # Set before reading, so that an invalid file is read only once.
                    self._signature = signature
                    self._use(await asyncio.to_thread(_read, self._path))
            except FieldError as exc:
                self._fail(exc)
            except OSError as exc:
                self._signature = None
                what = "does not exist" if exc.errno == errno.ENOENT else \
                    f"cannot be read: {os_reason(exc)}"
                self._fail(StoreDown(
                    f"{self._path} {what}; the daemon tries again every {self._poll_s:g} s"))

    def _use(self, hosts: HostsFile) -> None:
        if self._hosts is not None and hosts.network != self._hosts.network:
            log.warning("%s: the network section of the file has changed; the change takes effect "
                        "when the daemon reloads (SIGHUP) or restarts", self._path)
        if self._error is not None and self._hosts is not None:
            log.info("%s is valid again, number of nodes: %d; the error was: %s", self._path,
                     len(hosts.leases), self._error)
        self._hosts, self._error = hosts, None
        self.health.connected, self.health.error = True, ""
        if self._own_key:
            self._check_own(hosts)

    def _fail(self, error: StoreDown | FieldError) -> None:
        if str(error) != self.health.error:
            if self._hosts is not None:  # else ``_current`` raises the error
                log.error("%s; the previous list of nodes stays in use", error)
            self.health.errors_n += 1
        self._error = error
        self.health.connected, self.health.error = False, str(error)

    # Our own node

    async def _own_lease(self) -> Lease:
        """Return our lease.

        Raises StoreDown. Raises StoreRefused if the file is invalid, or if our node is not found.
        """
        try:
            hosts = await self._current()
        except FieldError as exc:
            raise StoreRefused(str(exc)) from None
        return await self._find_own(hosts)

    async def _find_own(self, hosts: HostsFile) -> Lease:
        """Return the lease of this machine. Raises StoreRefused; its message lists the names and
        addresses that were searched for, and the nodes in the file."""
        by_name = {lease.name: lease for lease in hosts.leases}
        existing = f"nodes in the file: {_join(by_name)}"
        if self._node_name:
            if self._node_name in by_name:
                return by_name[self._node_name]
            raise StoreRefused(f"{self._path} has no node {self._node_name}; {existing}")
        for name in (self._hostname, self._hostname.partition(".")[0]):
            if name in by_name:
                return by_name[name]
        local = set(await self._addresses())
        found = [lease for lease in hosts.leases
                 if {lease.attributes.public_ip, lease.attributes.public_ipv6} & local]
        if len(found) == 1:
            return found[0]
        if found:
            names = _join(lease.name for lease in found)
            raise StoreRefused(
                f"{self._path}: this host has the public addresses of several nodes ({names}), and "
                f"none of them has its hostname {self._hostname}: set --node-name")
        raise StoreRefused(
            f"{self._path}: no node matches this host (hostname {self._hostname}, addresses "
            f"{_join(local)}); {existing}; set --node-name")

    def _check_own(self, hosts: HostsFile) -> None:
        health = self.health
        if any(lease.key == self._own_key for lease in hosts.leases):
            if health.lease == "lost":
                log.info("%s has the node %s again", self._path, self._own_key)
            health.lease, health.lease_error, health.lease_renewed = "held", "", time.time()
        elif health.lease != "lost":
            health.lease = "lost"
            health.lease_error = f"{self._path} has no node {self._own_key} any more"
            log.error("%s; this host keeps its subnets; add the node to the file again",
                      health.lease_error)


def _settled_signature(path: Path) -> Signature:
    """Wait until the file is no longer being written to; return values that identify this version.

    An editor that writes in place truncates the file first, and an incomplete list can be valid.
    The wait also ensures that a later write gets a different timestamp, even if the file system has
    coarse timestamps.
    """
    for _ in range(SETTLE_TRIES):
        stat = path.stat()
        if abs(time.time() - stat.st_mtime) >= SETTLE_SECONDS:
            break
        time.sleep(SETTLE_SECONDS)
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _read(path: Path) -> HostsFile:
    return parse(path.read_bytes(), str(path))


def _join(items: Iterable[object], limit: int = 8) -> str:
    words = sorted(map(str, items))
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more or "none"
