"""Acquires our own lease, renews it, publishes changes in it, and acquires it again if it is lost.

Owns: our one key, and the key's last known state in the store. Every write is a transaction. It
creates a key only if the key does not exist. It changes a key only if the key's revision is still
the revision that we last read. So a write never overwrites the lease of another node, even if the
other node was faster or a response was lost. Asyncio, one loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import FieldError
from ...model import IPAddress
from ...wait import wait_at_most
from ..backoff import Backoff
from ..base import Attributes, Lease, SourceHealth, StoreDown, StoreRefused, Subnets
from ..contest import Contest
from ..netconf import NetConfig
from . import messages
from .allocate import Entry, choose, fits, own_entries, same_node
from .client import Client
from .config import EtcdConfig
from .schema import config_key, read_value, subnets_prefix, write_key, write_value
from .watch import list_entries

TRIES = 10  # attempts to write a key while other nodes write too; as many as in flannel
CHECK_S = 30.0  # our key is read at this interval, even if the watch reports no change of the key
RETRY_MIN_S, RETRY_MAX_S = 0.2, 5.0  # delay between attempts to get a lost lease back

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Held:
    """The last known state of our key.

    create_revision  the revision at which the key was created; 0: not known. If the key has been
                     deleted and created again, it may belong to another node.
    expires  the time in time.monotonic() when the lease expires; None: it does not expire, because
             it is a reservation or its state in the store is not known yet
    """

    lease: Lease
    create_revision: int
    mod_revision: int
    lease_id: int
    expires: float | None


class _Taken(Exception):
    """Another node has taken our key."""


class _Contested(StoreDown):
    """Another machine writes our key repeatedly. Our data are written again later."""


class LeaseKeeper:
    """Keeps the lease of one node.

    draw  called with the base addresses of the free subnets; returns one of them
    """

    def __init__(
        self, client: Client, config: EtcdConfig, health: SourceHealth,
        draw: Callable[[Sequence[int]], int] = random.choice,
    ) -> None:
        self._client, self._config, self._health, self._draw = client, config, health, draw
        self._prefix = subnets_prefix(config.root)
        self._held: _Held | None = None
        # The IDs of the etcd leases that this process requested. Only these are revoked, because
        # another etcd lease may also hold the keys of other nodes.
        self._granted: set[int] = set()
        self._spare: tuple[int, float] | None = None  # (ID, expiry) of an unused etcd lease
        self._logged = ""
        self._writing = asyncio.Lock()  # acquire may be called while hold renews the lease
        self._check_now = asyncio.Event()
        self._contest = Contest(health)

    def key_changed(self, key: str | None) -> None:
        """Tell the keeper that ``key`` has changed in the store; None: any key may have changed."""
        if self._held is not None and key in (None, self._held.lease.key):
            self._check_now.set()

    async def network(self) -> NetConfig:
        key = config_key(self._config.root)
        answer = await self._client.call(messages.RANGE, messages.RangeRequest(key=key))
        where = f"etcd key {key.decode()}"
        if not answer.kvs:
            raise StoreDown(f"{where} does not exist: no network is configured yet")
        try:
            text = answer.kvs[0].value.decode()
        except UnicodeDecodeError as error:
            raise FieldError("config", answer.kvs[0].value, f"UTF-8 ({error})", where) from None
        network = NetConfig.parse(text, where=where)
        if network.network is None:
            raise FieldError("EnableIPv4", False, "true: leases in etcd need IPv4", where)
        return network

    async def acquire(self, attributes: Attributes, former: Subnets) -> Lease:
        async with self._writing:
            held = self._held
            if held is not None and self._health.lease == "held":
                try:
                    await self._write(held, replace(held.lease, attributes=attributes))
                    return self._lease
                except _Taken:
                    former = held.lease.subnets
            network = await self.network()
            for _ in range(TRIES):
                if await self._try_acquire(network, attributes, former):
                    return self._lease
            raise StoreDown(f"another node was faster in each of {TRIES} attempts to get a subnet")

    async def hold(self, lease: Lease) -> None:
        backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        if self._held is None or self._held.lease.key != lease.key:
            # ``lease`` was cached before a restart. Its state in the store is not known yet.
            self._lose(_Held(lease, 0, 0, 0, None), "not confirmed by the store yet")
        while True:
            self._check_now.clear()
            try:
                async with self._writing:
                    contested = await self._check()
                self._logged = ""
                delay = self._next_check()
            except (StoreDown, StoreRefused, _Taken) as error:
                contested = False
                self._fail(error)
                delay = backoff.next()
            # The other writer of our key may write again at once. Back off, so that the two do not
            # overwrite each other in a fast loop.
            if contested:
                await asyncio.sleep(backoff.next())
            if not await wait_at_most(self._check_now, delay) and not self._logged:
                backoff.reset()

    @property
    def _lease(self) -> Lease:
        assert self._held is not None
        return self._held.lease

    # Acquire

    async def _try_acquire(
        self, network: NetConfig, attributes: Attributes, former: Subnets
    ) -> bool:
        """Make one attempt to write a lease. Return False if another node was faster."""
        entries = (await list_entries(self._client, self._config.root)).entries
        for entry in own_entries(entries, attributes, former):
            if fits(entry.subnets, network):
                log.info("reusing the lease %s: it has our public address", entry.subnets)
                return await self._put(
                    Lease(entry.key, entry.subnets, attributes, reserved=entry.reserved), entry
                )
            if entry.reserved:
                log.warning("the reservation %s for our public address does not fit the network's "
                            "configuration: using another subnet", entry.subnets)
                continue
            log.info("deleting our lease %s: it does not fit the network's configuration",
                     entry.subnets)
            await self._delete(entry)
            entries.remove(entry)
        subnets = choose(network, entries, former, self._draw)
        return await self._put(Lease(write_key(subnets), subnets, attributes), None)

    async def _delete(self, entry: Entry) -> None:
        key = self._prefix + entry.key.encode()
        await self._client.call(messages.TXN, messages.TxnRequest(
            compare=[_unchanged(key, entry.mod_revision)],
            success=[messages.RequestOp(
                request_delete_range=messages.DeleteRangeRequest(key=key)
            )],
        ))

    # Hold

    async def _check(self) -> bool:
        """Read our key. Create the key again, write it or renew it, if one of these is needed.

        Return True if the key was deleted or changed by another writer, or if our lease was lost.
        Raises _Taken, StoreDown, StoreRefused.
        """
        held = self._held
        assert held is not None
        key = self._prefix + held.lease.key.encode()
        answer = await self._client.call(messages.RANGE, messages.RangeRequest(key=key))
        kv = answer.kvs[0] if answer.kvs else None
        if kv is None:
            self._lose(held, "its key was deleted from the store")
            log.error("our lease %s is lost: its key was deleted; creating it again, forwarding "
                      "continues", held.lease.subnets)
            if not await self._put(replace(held.lease, reserved=False), None):
                raise StoreDown("another node was faster")  # the next check reads its lease
            log.warning("our lease %s is held again", held.lease.subnets)
            return True
        if kv.mod_revision != held.mod_revision or self._health.lease == "lost":
            may_write = self._may_write(kv, held)
            if not await self._adopt(kv, held, may_write) and may_write:
                await self._write(held, held.lease)
            return True
        self._contest.end_if_quiet()
        margin = self._config.renew_margin
        if held.expires is not None and time.monotonic() >= held.expires - margin:
            await self._write(held, held.lease)
            log.info("renewed our lease %s", held.lease.subnets)
        return False

    def _may_write(self, kv: Any, held: _Held) -> bool:
        """Return whether our key may be written now.

        The answer is False for some time after another machine with our public address has written
        the key repeatedly.
        """
        if not held.mod_revision or kv.mod_revision == held.mod_revision \
                or not self._is_foreign(kv.lease):
            return True
        try:
            if not same_node(read_value(kv.value), held.lease.attributes):
                return True  # ``_check_owner`` handles another address
        except FieldError:
            return True
        own = _address(held.lease.attributes)
        return self._contest.may_write(
            kv.mod_revision, f"another machine publishes this lease with our public address {own}")

    def _is_foreign(self, lease_id: int) -> bool:
        """Return whether another process has requested the etcd lease of a key."""
        ours = self._granted | ({self._spare[0]} if self._spare else set())
        return bool(lease_id) and lease_id not in ours

    async def _adopt(self, kv: Any, held: _Held, may_write: bool) -> bool:
        """Take the key's present state as our lease, if the key has our attributes.

        Return False if the key must be written: it has other attributes, it expires too soon, or
        another machine has written it. In the last case, our write shows the conflict to the other
        machine.
        """
        if kv.value != write_value(held.lease.attributes):
            return False
        if may_write and held.lease_id and self._is_foreign(kv.lease):
            return False
        expires = None
        if kv.lease:
            answer = await self._client.call(
                messages.LEASE_TIME_TO_LIVE, messages.LEASE_TIME_TO_LIVE.request(ID=kv.lease)
            )
            ttl_s = int(answer.TTL)
            if ttl_s <= self._config.renew_margin:
                return False
            expires = time.monotonic() + ttl_s
        self._set_held(
            replace(held.lease, reserved=not kv.lease), kv.create_revision, kv.mod_revision,
            kv.lease, expires,
        )
        return True

    async def _write(self, held: _Held, lease: Lease) -> None:
        """Publish ``lease`` in our key. Raises _Taken if another node has taken the key."""
        key = self._prefix + lease.key.encode()
        for _ in range(TRIES):
            answer = await self._client.call(messages.RANGE, messages.RangeRequest(key=key))
            if not answer.kvs:
                if await self._put(replace(lease, reserved=False), None):
                    return
                continue
            kv = answer.kvs[0]
            reserved = not kv.lease
            if kv.mod_revision != held.mod_revision and self._check_owner(kv, lease):
                reserved = held.lease.reserved  # the other machine does not decide this
            found = Entry(
                lease.key, lease.subnets, None, kv.mod_revision, kv.lease, kv.create_revision)
            if await self._put(replace(lease, reserved=reserved), found):
                return
        raise StoreDown(f"etcd key {lease.key} changes faster than it can be written")

    def _check_owner(self, kv: Any, lease: Lease) -> bool:
        """Return whether another machine has written our key, and we may write it again now.

        Called if the key has changed. Raises _Taken if the key belongs to another node, and
        _Contested if it is too early to write it again.
        """
        try:
            attributes = read_value(kv.value)
        except FieldError:
            return False  # an invalid value belongs to no node, so our value may be written again
        if not same_node(attributes, lease.attributes):
            held = self._held
            if held is not None and same_node(attributes, held.lease.attributes):
                return False  # the key has our previous public address
            owner = _address(attributes)
            if held is not None and held.create_revision == kv.create_revision:
                # The key was not free, so the other machine had no right to it.
                own = _address(lease.attributes)
                text = f"another machine publishes our lease with the address {owner}," \
                    f" we with {own}"
                if not self._contest.may_write(kv.mod_revision, text):
                    raise _Contested(text)
                log.error("%s: writing our data again", text)
                return True
            raise _Taken(f"{lease.subnets} is now the lease of {owner}")
        return False

    async def _put(self, lease: Lease, found: Entry | None) -> bool:
        """Write our key, if the key has not changed.

        found  the last known state of the key; None: the key does not exist

        Return False if the key has changed. If the change was our own write, whose response was
        lost, then the next check finds our address in the key.
        """
        key = self._prefix + lease.key.encode()
        grant_id, expires = (0, None) if lease.reserved else await self._grant()
        value = write_value(lease.attributes)
        answer = await self._client.call(messages.TXN, messages.TxnRequest(
            compare=[_absent(key) if found is None else _unchanged(key, found.mod_revision)],
            success=[messages.RequestOp(
                request_put=messages.PutRequest(key=key, value=value, lease=grant_id)
            )],
        ))
        if not answer.succeeded:
            return False
        former_id = self._held.lease_id if self._held else 0
        self._spare = None
        revision = int(answer.header.revision)
        created = revision if found is None else found.create_revision
        self._set_held(lease, created, revision, grant_id, expires)
        if grant_id:
            self._granted.add(grant_id)
        if former_id in self._granted - {grant_id}:
            self._granted.discard(former_id)
            # An error is ignored, because the former etcd lease expires without a revocation too.
            with contextlib.suppress(StoreDown, StoreRefused):
                await self._client.call(
                    messages.LEASE_REVOKE, messages.LEASE_REVOKE.request(ID=former_id)
                )
        return True

    async def _grant(self) -> tuple[int, float]:
        """Return an etcd lease for our key: its ID, and its expiry time in time.monotonic().

        If an attempt to write the key fails, the next attempt uses the same etcd lease. So failures
        do not accumulate etcd leases. Our key may already belong to this etcd lease, if the write
        succeeded but its response was lost.
        """
        ttl_s = self._config.ttl_seconds
        if self._spare is not None and self._spare[1] - time.monotonic() > 0.9 * ttl_s:
            request = messages.LEASE_TIME_TO_LIVE.request(ID=self._spare[0])
            if (await self._client.call(messages.LEASE_TIME_TO_LIVE, request)).TTL > 0:
                return self._spare
        requested = time.monotonic()
        answer = await self._client.call(
            messages.LEASE_GRANT, messages.LEASE_GRANT.request(TTL=ttl_s)
        )
        self._spare = (int(answer.ID), requested + answer.TTL)
        return self._spare

    # Our last known state, and health

    def _set_held(
        self, lease: Lease, create_revision: int, mod_revision: int, lease_id: int,
        expires: float | None,
    ) -> None:
        self._held = _Held(lease, create_revision, mod_revision, lease_id, expires)
        health = self._health
        health.lease, health.lease_error, health.lease_renewed = "held", "", time.time()
        left = None if expires is None else expires - time.monotonic()
        health.lease_expires = None if left is None else time.time() + left

    def _lose(self, held: _Held, reason: str) -> None:
        self._held = held
        self._health.lease, self._health.lease_error = "lost", reason
        self._health.lease_expires = None

    def _next_check(self) -> float:
        """Return the seconds until our key must be read again."""
        assert self._held is not None
        soonest = min(CHECK_S, self._contest.delay or CHECK_S)
        if self._held.expires is None:
            return soonest
        until_renewal = self._held.expires - self._config.renew_margin - time.monotonic()
        return min(max(until_renewal, 0.0), soonest)

    def _fail(self, error: Exception) -> None:
        """Record and log why a check failed. The same reason is logged only once."""
        held, health = self._held, self._health
        assert held is not None
        if isinstance(error, _Taken):
            text = f"is lost: {error}; trying to get it back, forwarding continues"
            self._lose(held, str(error))
        elif held.expires is not None and held.expires <= time.monotonic():
            text = f"expired because it could not be renewed: {error}; forwarding continues"
            self._lose(held, f"it expired because it could not be renewed: {error}")
        elif isinstance(error, _Contested):
            text = f"is contested: {error}"
        else:
            text = f"could not be checked: {error}"
        if text != self._logged:
            level = logging.ERROR if health.lease == "lost" else logging.WARNING
            log.log(level, "our lease %s %s", held.lease.subnets, text)
            self._logged = text


def _address(attributes: Attributes) -> IPAddress | None:
    return attributes.public_ip or attributes.public_ipv6


def _absent(key: bytes) -> Any:
    return messages.Compare(key=key, target=messages.COMPARE_VERSION, version=0)


def _unchanged(key: bytes, mod_revision: int) -> Any:
    return messages.Compare(key=key, target=messages.COMPARE_MOD, mod_revision=mod_revision)
