"""The changes of all leases: lists the leases once, then watches from the revision of the listing.

Owns: the current revision, the skipped entries, and when to list again. ``keeper`` keeps our own
lease; the watcher reports the changes of keys to ``keeper``. Asyncio, one loop.

- An invalid entry is skipped and reported. The previous lease of its key stays active.
- If etcd has compacted the watch's revision, all leases are listed again, and the differences are
  yielded as changes.
- If the store has lost data (it was recreated, or restored from an older backup), no lease is
  removed at once. A missing lease stays active for the TTL of a lease, or until its key or its node
  is back. So the loss of all leases in the store causes no outage.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Any

from ...errors import FieldError
from ...text import counted, printable
from ..backoff import Backoff
from ..base import (
    MAX_NAME,
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

# Delays between attempts. They are short, so that the watch continues within a second after the
# store is up again. After a refusal they are longer, because the store may have to hash a password
# at each attempt.
RETRY_MIN_S, RETRY_MAX_S = 0.1, 0.8
REFUSED_MAX_S = 10.0

log = logging.getLogger(__name__)


class Listing:
    """The lease keys and their values at one revision of the store."""

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
            self.entries.append(Entry(
                key, subnets, attributes, kv.mod_revision, kv.lease, kv.create_revision))


async def list_entries(client: Client, root: str) -> Listing:
    prefix = subnets_prefix(root)
    request = messages.RangeRequest(key=prefix, range_end=_end(prefix))
    return Listing(await client.call(messages.RANGE, request), prefix)


class LeaseWatcher:
    """Yields the leases of one store and their changes.

    lost_ttl     if the store loses a lease, the lease stays active for this many seconds
    key_changed  called with each key that changes, and with None after a listing
    set_state    called with "" when the watch runs, and with the reason when it does not run
    """

    def __init__(
        self, client: Client, root: str, health: SourceHealth, lost_ttl: float,
        key_changed: Callable[[str | None], None], set_state: Callable[[str], None],
    ) -> None:
        self._client = client
        self._root, self._prefix = root, subnets_prefix(root)
        self._health = health
        self._lost_ttl = lost_ttl
        self._key_changed, self._set_state = key_changed, set_state
        self._book = LeaseBook()
        # The revision of the last event or listing; None: a listing is needed
        self._revision: int | None = None
        self._cluster_id = 0
        # The last revision seen. A later listing with a lower revision shows that data was lost.
        self._highest = 0
        # {key of a lost lease: the time in time.monotonic() at which to remove the lease}
        self._lost: dict[str, float] = {}

    async def updates(self) -> AsyncGenerator[Snapshot | Changes, None]:
        retries = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        refusals = Backoff(RETRY_MIN_S, REFUSED_MAX_S)
        snapshot_sent = False
        while True:
            refused = False
            try:
                if self._revision is None:
                    changes = self._take(await list_entries(self._client, self._root))
                    if not snapshot_sent:
                        snapshot_sent = True
                        yield Snapshot(tuple(self._book.leases.values()))
                    elif changes:
                        yield Changes(changes)
                async with aclosing(self._watch(retries, refusals)) as watch:
                    async for changes in watch:
                        yield Changes(changes)
            except (StoreDown, StoreRefused) as error:
                self._set_state(str(error))
                refused = isinstance(error, StoreRefused)
            await asyncio.sleep((refusals if refused else retries).next())

    async def _watch(self, *backoffs: Backoff) -> AsyncGenerator[tuple[Change, ...], None]:
        """Yield changes until the watch cannot continue.

        Before it returns, the method sets ``_revision`` to None, which means: list again. Raises
        the exceptions of Client.watch. ``backoffs`` are reset when the watch runs.
        """
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
                    log.info("etcd has compacted the revision of our watch: listing again")
                    self._list_again()
                    return
                if response.created:
                    if response.header.revision < self._revision:
                        # The store was recreated, or this member lags behind.
                        self._list_again()
                        return
                    for backoff in backoffs:
                        backoff.reset()
                    self._set_state("")
                if changes := self._apply(response.events):
                    yield changes
                if self._lost and min(self._lost.values()) <= time.monotonic():
                    self._list_again()
                    return

    def _list_again(self) -> None:
        self._revision = None
        self._health.relists_n += 1

    def _take(self, listing: Listing) -> tuple[Change, ...]:
        """Replace the known leases with the leases of a listing; return the changes."""
        book, known = self._book, self._book.leases
        listed = {}
        for entry in listing.entries:
            lease = _lease(entry) or known.get(entry.key)  # if invalid, keep the previous lease
            if lease is not None:
                listed[entry.key] = lease
        for key, reason in listing.skipped.items():
            self._skip(key, reason)
        self._health.skipped.log(log)
        for key in self._health.skipped.keys() - listing.skipped.keys():
            del self._health.skipped[key]
        self._add_lost(listing, listed)
        changes = book.replace(listed.values())
        self._revision = listing.revision
        self._key_changed(None)
        return changes

    def _add_lost(self, listing: Listing, listed: dict[str, Lease]) -> None:
        """Add to ``listed`` each lease that the store has lost, if the lease stays active."""
        now = time.monotonic()
        known = self._book.leases
        if known and (
            listing.cluster_id != self._cluster_id or listing.revision < self._highest
        ) and (missing := known.keys() - listed.keys()):
            log.warning("etcd has lost %s, for example %s: these leases stay active for %g s, or "
                        "until their nodes are back", counted(len(missing), "lease"), min(missing),
                        self._lost_ttl)
            for key in missing:
                self._lost.setdefault(key, now + self._lost_ttl)
        self._cluster_id, self._highest = listing.cluster_id, listing.revision
        nodes = {_node(lease) for lease in listed.values()}
        self._lost = {
            key: until for key, until in self._lost.items()
            if until > now and key not in listed and _node(known[key]) not in nodes
        }
        listed.update((key, known[key]) for key in self._lost)

    def _apply(self, events: Iterable[Any]) -> tuple[Change, ...]:
        changes: list[Change] = []
        for event in events:
            key = _name(event.kv.key, self._prefix)
            self._revision = self._highest = int(event.kv.mod_revision)
            self._key_changed(key)
            if event.type == messages.EVENT_DELETE:
                self._health.skipped.pop(key, None)
                self._lost.pop(key, None)
                event_changes = [self._book.remove(key)]
            else:
                event_changes = self._put(key, event.kv)
            changes += filter(None, event_changes)
        self._health.skipped.log(log)
        return tuple(changes)

    def _put(self, key: str, kv: Any) -> list[Change | None]:
        try:
            subnets, attributes = read_key(key), read_value(kv.value)
        except FieldError as error:
            self._skip(key, str(error))
            return []
        self._health.skipped.pop(key, None)
        self._lost.pop(key, None)
        lease = Lease(key, subnets, attributes, reserved=kv.lease == 0,
                      since=int(kv.create_revision))
        replaced = [other for other in self._lost
                    if _node(self._book.leases[other]) == _node(lease)]
        for other in replaced:  # the node has a new key, so its lost lease is not needed any more
            del self._lost[other]
        return [*map(self._book.remove, replaced), self._book.put(lease)]

    def _skip(self, key: str, reason: str) -> None:
        kept = "; its previous lease stays active" if key in self._book.leases else ""
        self._health.skipped.add(key, reason, f"etcd key {key} is invalid: {reason}{kept}")


def _lease(entry: Entry) -> Lease | None:
    if entry.attributes is None:
        return None
    return Lease(entry.key, entry.subnets, entry.attributes, reserved=entry.reserved,
                 since=entry.create_revision)


def _node(lease: Lease) -> object:
    """Return the public addresses in a lease. They identify the lease's node."""
    return lease.attributes.public_ip, lease.attributes.public_ipv6


def _name(key: bytes, prefix: bytes) -> str:
    return printable(key.removeprefix(prefix).decode(errors="replace"), MAX_NAME)


def _end(prefix: bytes) -> bytes:
    """Return the end of the range of all keys with ``prefix``; ``prefix`` ends with a slash."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
