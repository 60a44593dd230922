"""Leases from a hosts file: the store that needs nothing else.

Owns: watching the file, and which of its nodes this machine is. Refuses to know what stands in the
file, which is ``hosts``' part, and whether it is followed. Asyncio, one loop; the file is looked
at in helper threads, since it may lie on a network and be large.

The file is looked at once a second, not watched by inotify: it may be reached through symbolic
links (a ConfigMap is replaced by changing one in its directory), or change on another machine that
shares it, and of these inotify tells little or nothing. A look costs one stat().
"""

from __future__ import annotations

import asyncio
import logging
import platform
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from ...errors import FieldError
from ...model import IPAddress
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
from ..wait import wait_at_most
from .config import FileConfig
from .schema import Hosts, parse

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
QUIET_SECONDS = 0.1  # a file changed less than this ago may be half written
QUIET_TRIES = 10  # for one that is written to without end

Signature = tuple[int, ...]


async def _no_addresses() -> Iterable[IPAddress]:
    return ()


def open_source(config: FileConfig, local_addresses: LocalAddresses) -> FileSource:
    return FileSource(config.path, node_name=config.node_name, addresses=local_addresses)


class FileSource(LeaseSource):
    """A LeaseSource over one file. What it says cannot be used: what it said before holds.

    node_name  which node we are; "": the one named as the host is, else the one whose public
               address is ours
    hostname   default: the kernel's
    addresses  asked for the host's addresses when the names do not tell
    The leases stand in the file as they are: what ``acquire`` is given to publish goes nowhere.
    Its node's port and mtu are in its lease as an Advert, also for ourselves.
    """

    def __init__(
        self, path: Path, *, node_name: str = "", hostname: str | None = None,
        addresses: LocalAddresses = _no_addresses,
        poll_s: float = POLL_SECONDS,
    ) -> None:
        self.health = SourceHealth()
        self._path = path
        self._node_name = node_name
        self._hostname = platform.node() if hostname is None else hostname
        self._addresses = addresses
        self._poll_s = poll_s
        self._seen: Signature | None = None
        self._hosts: Hosts | None = None
        self._fault: StoreDown | FieldError | None = None
        self._own = ""  # our node's name, once acquired
        self._looking = asyncio.Lock()
        self._asked = asyncio.Event()

    async def network(self) -> NetConfig:
        return (await self._good()).network

    async def identity(self) -> Identity:
        return self.cached_identity(await self._own_lease())

    def cached_identity(self, lease: Lease) -> Identity:
        """Our entry in the file declares everything about us; the lease is that entry."""
        declared = lease.attributes
        families = {address.version for address in (declared.public_ip, declared.public_ipv6)
                    if address is not None}
        return Identity(declared.public_ip, declared.public_ipv6, families=frozenset(families),
                        advert=read_advert(declared))

    async def acquire(self, attributes: Attributes, former: Subnets) -> Lease:
        lease = await self._own_lease()
        self._own = lease.key
        assert self._hosts is not None
        self._see_to_own(self._hosts)
        return lease

    async def hold(self, lease: Lease) -> None:
        """Nothing to renew: it is ours while it stands there, which ``updates`` looks at."""
        await asyncio.Event().wait()

    async def updates(self) -> AsyncIterator[Snapshot | Changes]:
        book = LeaseBook()
        told = False
        while True:
            await self._look()
            if self._hosts is not None:
                changes = book.replace(self._hosts.leases)
                if not told:
                    yield Snapshot(tuple(book.leases.values()))
                    told = True
                elif changes:
                    yield Changes(changes)
            await self._pause()

    def reload(self) -> None:
        """Look at the file now, and read it even if it seems to be the same."""
        self._seen = None
        self._asked.set()

    async def aclose(self) -> None:
        """Nothing is held open."""

    async def _good(self) -> Hosts:
        await self._look()
        if self._hosts is None:
            assert self._fault is not None
            raise self._fault.with_traceback(None)
        return self._hosts

    async def _pause(self) -> None:
        await wait_at_most(self._asked, self._poll_s)
        self._asked.clear()

    async def _look(self) -> None:
        """See whether the file has changed; keep what it says if that can be used."""
        async with self._looking:
            try:
                signature = await asyncio.to_thread(_settled, self._path)
                self.health.last_contact = time.monotonic()
                if signature != self._seen:
                    self._seen = signature  # first: what is bad is not read again and again
                    self._take(await asyncio.to_thread(_read, self._path))
            except FieldError as exc:
                self._failed(exc)
            except OSError as exc:
                self._seen = None
                self._failed(StoreDown(f"{self._path} cannot be read: {exc.strerror}"))

    def _take(self, hosts: Hosts) -> None:
        if self._hosts is not None and hosts.network != self._hosts.network:
            log.warning("%s: the network is another one now: it is taken at the next start",
                        self._path)
        self._hosts, self._fault = hosts, None
        self.health.connected, self.health.error = True, ""
        if self._own:
            self._see_to_own(hosts)

    def _failed(self, fault: StoreDown | FieldError) -> None:
        if str(fault) != self.health.error:
            kept = "" if self._hosts is None else ": the nodes known before stay"
            log.error("%s%s", fault, kept)
            self.health.errors_n += 1
        self._fault = fault
        self.health.connected, self.health.error = False, str(fault)

    def _see_to_own(self, hosts: Hosts) -> None:
        health = self.health
        if any(lease.key == self._own for lease in hosts.leases):
            health.lease, health.lease_error = "held", ""
        elif health.lease != "lost":
            health.lease = "lost"
            health.lease_error = f"{self._path} has no node {self._own} any more"
            log.error("%s: its subnets are used until that changes", health.lease_error)

    async def _own_lease(self) -> Lease:
        """StoreDown; StoreRefused, also for a file that is invalid."""
        try:
            hosts = await self._good()
        except FieldError as exc:
            raise StoreRefused(str(exc)) from None
        return await self._which(hosts)

    async def _which(self, hosts: Hosts) -> Lease:
        """Our node. StoreRefused says what was looked for, and what there is."""
        by_name = {lease.name: lease for lease in hosts.leases}
        there = f"it has {_some(by_name)}"
        if self._node_name:
            if self._node_name in by_name:
                return by_name[self._node_name]
            raise StoreRefused(f"{self._path} has no node {self._node_name}: {there}")
        for name in (self._hostname, self._hostname.partition(".")[0]):
            if name in by_name:
                return by_name[name]
        ours = set(await self._addresses())
        found = [lease for lease in hosts.leases
                 if {lease.attributes.public_ip, lease.attributes.public_ipv6} & ours]
        if len(found) == 1:
            return found[0]
        if found:
            names = _some(lease.name for lease in found)
            raise StoreRefused(f"{self._path}: the public addresses of {names} are all ours, and "
                               f"none has our hostname {self._hostname}: say --node-name")
        raise StoreRefused(
            f"{self._path} has no node with our hostname {self._hostname}, and none with a public "
            f"address of ours ({_some(ours)}): {there}; --node-name says which one we are")


def _settled(path: Path) -> Signature:
    """What tells one state of the file from the next, when nobody seems to be writing to it.

    Whoever writes in place empties the file first, and half a list of nodes may be a valid one.
    Seen from a state that is old enough, any later one differs, however coarse the files' clock.
    """
    for _ in range(QUIET_TRIES):
        stat = path.stat()
        if abs(time.time() - stat.st_mtime) >= QUIET_SECONDS:
            break
        time.sleep(QUIET_SECONDS)
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _read(path: Path) -> Hosts:
    return parse(path.read_bytes(), str(path))


def _some(things: Iterable[object], most: int = 8) -> str:
    words = sorted(map(str, things))
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more or "none"
