"""All leases as they change: a listing, then a watch from there, and again where that ends.

Owns: the revision we are at, what is skipped, when to list again. Refuses to know: our own lease,
beyond saying that its key has changed. Asyncio, one loop.

- A key that cannot be used is skipped and reported; the lease it held before stays in force.
- A compacted watch lists again and tells the difference.
- A store that has forgotten (set up anew, an older backup) is no reason to drop a lease: what it
  misses stays in force for as long as the lease could have lived, or until its subnets or its node
  come back. Where the store only lost its data, nobody notices.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Any

from ...errors import FieldError
from ..backoff import Backoff
from ..base import (
    Attributes,
    Change,
    Changes,
    Lease,
    LeaseBook,
    Snapshot,
    SourceHealth,
    StoreDown,
    StoreRefused,
)
from . import messages
from .allocate import Entry
from .client import Client
from .schema import read_key, read_value, subnets_prefix

PAUSE_MIN_S, PAUSE_MAX_S = 0.1, 0.8  # a store that is back is noticed within a second
REFUSED_MAX_S = 10.0  # each attempt may cost the store a password's hash

log = logging.getLogger(__name__)


class Listing:
    """The keys of leases at one revision of the store."""

    def __init__(self, response: Any, prefix: bytes) -> None:
        self.revision = int(response.header.revision)
        self.cluster_id = int(response.header.cluster_id)
        self.entries: list[Entry] = []
        self.skipped: dict[str, str] = {}
        for kv in response.kvs:
            key = _name(kv.key, prefix)
            try:
                subnets = read_key(key)
            except FieldError as error:
                self.skipped[key] = str(error)
                continue
            attributes: Attributes | None = None
            try:
                attributes = read_value(kv.value)
            except FieldError as error:
                self.skipped[key] = str(error)
            self.entries.append(Entry(key, subnets, attributes, kv.mod_revision, kv.lease))


async def list_entries(client: Client, root: str) -> Listing:
    prefix = subnets_prefix(root)
    request = messages.RangeRequest(key=prefix, range_end=_end(prefix))
    return Listing(await client.call(messages.RANGE, request), prefix)


class LeaseWatcher:
    """``forgotten_ttl``: seconds for which a lease lives on that the store has forgotten.

    ``touched``  called with each key that the watch tells news of, with None after a listing
    ``report``   called with the watch's state: "" in order, else the reason why not
    """

    def __init__(
        self, client: Client, root: str, health: SourceHealth, forgotten_ttl: float,
        touched: Callable[[str | None], None], report: Callable[[str], None],
    ) -> None:
        self._client = client
        self._root, self._prefix = root, subnets_prefix(root)
        self._health = health
        self._forgotten_ttl = forgotten_ttl
        self._touched, self._report = touched, report
        self._book = LeaseBook()
        self._revision: int | None = None  # of the last event or listing; None: list again
        self._cluster_id = 0
        self._highest = 0  # the highest revision there was: a store that is below has forgotten
        self._forgotten: dict[str, float] = {}  # by key, when to give up, in monotonic time

    async def updates(self) -> AsyncGenerator[Snapshot | Changes, None]:
        pauses = Backoff(PAUSE_MIN_S, PAUSE_MAX_S)
        refusals = Backoff(PAUSE_MIN_S, REFUSED_MAX_S)
        listed = False
        while True:
            refused = False
            try:
                if self._revision is None:
                    changes = self._take(await list_entries(self._client, self._root))
                    if not listed:
                        listed = True
                        yield Snapshot(tuple(self._book.leases.values()))
                    elif changes:
                        yield Changes(changes)
                async with aclosing(self._watch(pauses, refusals)) as watch:
                    async for changes in watch:
                        yield Changes(changes)
            except (StoreDown, StoreRefused) as error:
                self._report(str(error))
                refused = isinstance(error, StoreRefused)
            await asyncio.sleep((refusals if refused else pauses).next())

    async def _watch(self, *pauses: Backoff) -> AsyncGenerator[tuple[Change, ...], None]:
        """Until the watch cannot go on: ``_revision`` is None then. Raises as Client.watch."""
        assert self._revision is not None
        create = messages.WatchCreateRequest(
            key=self._prefix, range_end=_end(self._prefix), start_revision=self._revision + 1
        )
        async with aclosing(self._client.watch(create)) as responses:
            async for response in responses:
                self._health.last_contact = time.monotonic()
                if response.canceled:
                    if not response.compact_revision:
                        raise StoreRefused(f"etcd ended the watch: {response.cancel_reason}")
                    log.info("etcd has compacted what we had not seen yet: listing again")
                    self._list_again()
                    return
                if response.created:
                    if response.header.revision < self._revision:
                        # A store that is set up anew, or a member that lags behind.
                        self._list_again()
                        return
                    for pause in pauses:
                        pause.reset()
                    self._report("")
                if changes := self._apply(response.events):
                    yield changes
                if self._forgotten and min(self._forgotten.values()) <= time.monotonic():
                    self._list_again()
                    return

    def _list_again(self) -> None:
        self._revision = None
        self._health.relists_n += 1

    def _take(self, listing: Listing) -> tuple[Change, ...]:
        """Make a listing the truth, and say what that changes."""
        book, known = self._book, self._book.leases
        fresh = {}
        for entry in listing.entries:
            lease = _lease(entry) or known.get(entry.key)  # unusable now: what it was before
            if lease is not None:
                fresh[entry.key] = lease
        for key, reason in listing.skipped.items():
            self._skip(key, reason)
        for key in self._health.skipped.keys() - listing.skipped.keys():
            del self._health.skipped[key]
        self._remember(listing, fresh)
        changes = book.replace(fresh.values())
        self._revision = listing.revision
        self._touched(None)
        return changes

    def _remember(self, listing: Listing, fresh: dict[str, Lease]) -> None:
        """Put into ``fresh`` what the store has forgotten and what is to live on."""
        now = time.monotonic()
        known = self._book.leases
        if known and (
            listing.cluster_id != self._cluster_id or listing.revision < self._highest
        ) and (gone := known.keys() - fresh.keys()):
            log.warning("etcd has forgotten %d leases: they stay in force for %g s or until their "
                        "nodes are back", len(gone), self._forgotten_ttl)
            for key in gone:
                self._forgotten.setdefault(key, now + self._forgotten_ttl)
        self._cluster_id, self._highest = listing.cluster_id, listing.revision
        nodes = {_node(lease) for lease in fresh.values()}
        self._forgotten = {
            key: until for key, until in self._forgotten.items()
            if until > now and key not in fresh and _node(known[key]) not in nodes
        }
        fresh.update((key, known[key]) for key in self._forgotten)

    def _apply(self, events: Iterable[Any]) -> tuple[Change, ...]:
        changes: list[Change] = []
        for event in events:
            key = _name(event.kv.key, self._prefix)
            self._revision = self._highest = int(event.kv.mod_revision)
            self._touched(key)
            if event.type == messages.EVENT_DELETE:
                self._health.skipped.pop(key, None)
                self._forgotten.pop(key, None)
                found = [self._book.remove(key)]
            else:
                found = self._put(key, event.kv)
            changes += filter(None, found)
        return tuple(changes)

    def _put(self, key: str, kv: Any) -> list[Change | None]:
        try:
            subnets, attributes = read_key(key), read_value(kv.value)
        except FieldError as error:
            self._skip(key, str(error))
            return []
        self._health.skipped.pop(key, None)
        self._forgotten.pop(key, None)
        lease = Lease(key, subnets, attributes, reserved=kv.lease == 0)
        back = [other for other in self._forgotten
                if _node(self._book.leases[other]) == _node(lease)]
        for other in back:  # under another key
            del self._forgotten[other]
        return [*map(self._book.remove, back), self._book.put(lease)]

    def _skip(self, key: str, reason: str) -> None:
        if self._health.skipped.get(key) != reason:
            kept = "; what it said before stays in force" if key in self._book.leases else ""
            log.warning("etcd key %s cannot be used: %s%s", key, reason, kept)
            self._health.skipped[key] = reason


def _lease(entry: Entry) -> Lease | None:
    if entry.attributes is None:
        return None
    return Lease(entry.key, entry.subnets, entry.attributes, reserved=entry.reserved)


def _node(lease: Lease) -> object:
    """What tells one node from another."""
    return lease.attributes.public_ip, lease.attributes.public_ipv6


def _name(key: bytes, prefix: bytes) -> str:
    return key.removeprefix(prefix).decode(errors="replace")


def _end(prefix: bytes) -> bytes:
    """The first key behind all keys with this prefix; its last byte is a slash."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
