"""Our own lease: got, renewed, published anew, taken back.

Owns: the one key that is ours, and what of the store we believe about it. Every write compares
first: a key is created if it is not there, and changed if it is as we last saw it; so neither a
lost race nor an answer that never came can take what is another's. Refuses to know: other leases,
beyond those in the way. Asyncio, one loop.
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
from ..backoff import Backoff
from ..base import Attributes, Lease, SourceHealth, StoreDown, StoreRefused, Subnets
from ..netconf import NetConfig
from ..wait import wait_at_most
from . import messages
from .allocate import Entry, choose, fits, is_mine, own_entries
from .client import Client
from .config import EtcdConfig
from .schema import config_key, read_value, subnets_prefix, write_key, write_value
from .watch import list_entries

TRIES = 10  # as flannel: each lost race makes another listing
CHECK_S = 30.0  # our key is read so often, even if the watch says nothing
PAUSE_MIN_S, PAUSE_MAX_S = 0.2, 5.0  # between attempts to get back what is lost

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Held:
    """Our key as we last saw it. ``ends`` is in time.monotonic(); None: a reservation."""

    lease: Lease
    mod_revision: int
    lease_id: int
    ends: float | None


class _Taken(Exception):
    """The key is another node's now."""


class LeaseKeeper:
    """``draw`` picks one of the free subnets' bases."""

    def __init__(
        self, client: Client, config: EtcdConfig, health: SourceHealth,
        draw: Callable[[Sequence[int]], int] = random.choice,
    ) -> None:
        self._client, self._config, self._health, self._draw = client, config, health, draw
        self._prefix = subnets_prefix(config.root)
        self._held: _Held | None = None
        self._granted: set[int] = set()  # lease ids we made; others' may carry others' keys
        self._spare: tuple[int, float] | None = None  # a lease granted, and when it ends
        self._said = ""
        self._writing = asyncio.Lock()  # acquire may come while hold renews
        self._touched = asyncio.Event()

    def touched(self, key: str | None) -> None:
        """The store has news of a key, or (None) of any."""
        if self._held is not None and key in (None, self._held.lease.key):
            self._touched.set()

    async def network(self) -> NetConfig:
        key = config_key(self._config.root)
        answer = await self._client.call(messages.RANGE, messages.RangeRequest(key=key))
        where = f"etcd key {key.decode()}"
        if not answer.kvs:
            raise StoreDown(f"{where} is not there: no network is configured yet")
        try:
            text = answer.kvs[0].value.decode()
        except UnicodeDecodeError as error:
            raise FieldError("config", answer.kvs[0].value, f"UTF-8 ({error})", where) from None
        network = NetConfig.parse(text, where=where)
        if network.network is None:
            raise FieldError("EnableIPv4", False, "true: flannel's keys in etcd need IPv4", where)
        return network

    async def acquire(self, attributes: Attributes, former: Subnets) -> Lease:
        async with self._writing:
            held = self._held
            if held is not None and self._health.lease == "held":  # with other attributes, perhaps
                try:
                    await self._write(held, replace(held.lease, attributes=attributes))
                    return self._lease
                except _Taken:
                    former = held.lease.subnets
            network = await self.network()
            for _ in range(TRIES):
                if await self._try_acquire(network, attributes, former):
                    return self._lease
            raise StoreDown(f"{TRIES} attempts to get a subnet were each lost to another node")

    async def hold(self, lease: Lease) -> None:
        pauses = Backoff(PAUSE_MIN_S, PAUSE_MAX_S)
        if self._held is None or self._held.lease.key != lease.key:
            # Known from before a restart; what the store says of it is still to be seen.
            self._lose(_Held(lease, 0, 0, None), "not seen in the store yet")
        while True:
            self._touched.clear()
            try:
                async with self._writing:
                    contested = await self._keep()
                self._said = ""
                pause = self._quiet_time()
            except (StoreDown, StoreRefused, _Taken) as error:
                contested = False
                self._say(error)
                pause = pauses.next()
            if contested:  # whoever it was may answer at once: do not fight at the watch's speed
                await asyncio.sleep(pauses.next())
            if not await wait_at_most(self._touched, pause) and not self._said:
                pauses.reset()

    @property
    def _lease(self) -> Lease:
        assert self._held is not None
        return self._held.lease

    # Getting a lease

    async def _try_acquire(
        self, network: NetConfig, attributes: Attributes, former: Subnets
    ) -> bool:
        """False: another node was faster."""
        entries = (await list_entries(self._client, self._config.root)).entries
        for entry in own_entries(entries, attributes, former):
            if fits(entry.subnets, network):
                log.info("reusing the lease of %s: it has our public address", entry.subnets)
                return await self._put(
                    Lease(entry.key, entry.subnets, attributes, reserved=entry.reserved), entry
                )
            if entry.reserved:
                log.warning("the reservation of %s for our public address does not fit the "
                            "network's configuration: another subnet is used", entry.subnets)
                continue
            log.info("giving up the lease of %s: it does not fit the network's configuration",
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

    # Keeping it

    async def _keep(self) -> bool:
        """Look at our key, and do what it takes; say whether somebody else had changed it.

        _Taken, StoreDown, StoreRefused.
        """
        held = self._held
        assert held is not None
        key = self._prefix + held.lease.key.encode()
        answer = await self._client.call(messages.RANGE, messages.RangeRequest(key=key))
        kv = answer.kvs[0] if answer.kvs else None
        if kv is None:
            self._lose(held, "its key is gone from the store")
            log.error("our lease of %s is lost: its key is gone; taking it back, forwarding on",
                      held.lease.subnets)
            if not await self._put(replace(held.lease, reserved=False), None):
                raise StoreDown("another node was faster")  # who, the next look tells
            log.warning("our lease of %s is ours again", held.lease.subnets)
            return True
        if kv.mod_revision != held.mod_revision or self._health.lease == "lost":
            if not await self._adopt(kv, held):
                await self._write(held, held.lease)
            return True
        if held.ends is not None and time.monotonic() >= held.ends - self._config.renew_margin:
            await self._write(held, held.lease)
            log.info("our lease of %s is renewed", held.lease.subnets)
        return False

    async def _adopt(self, kv: Any, held: _Held) -> bool:
        """Take our key as somebody wrote it, if it says what we would: no need to write again."""
        if kv.value != write_value(held.lease.attributes):
            return False
        ends = None
        if kv.lease:
            answer = await self._client.call(
                messages.LEASE_TIME_TO_LIVE, messages.LEASE_TIME_TO_LIVE.request(ID=kv.lease)
            )
            ttl_s = int(answer.TTL)
            if ttl_s <= self._config.renew_margin:
                return False
            ends = time.monotonic() + ttl_s
        self._own(replace(held.lease, reserved=not kv.lease), kv.mod_revision, kv.lease, ends)
        return True

    async def _write(self, held: _Held, lease: Lease) -> None:
        """Publish ``lease`` in our key, whoever wrote there last, if it is still ours. _Taken."""
        key = self._prefix + lease.key.encode()
        for _ in range(TRIES):
            answer = await self._client.call(messages.RANGE, messages.RangeRequest(key=key))
            if not answer.kvs:
                if await self._put(replace(lease, reserved=False), None):
                    return
                continue
            kv = answer.kvs[0]
            if kv.mod_revision != held.mod_revision:
                self._check_owner(kv, lease)
            seen = Entry(lease.key, lease.subnets, None, kv.mod_revision, kv.lease)
            if await self._put(replace(lease, reserved=seen.reserved), seen):
                return
        raise StoreDown(f"etcd key {lease.key} changes faster than it can be written")

    def _check_owner(self, kv: Any, lease: Lease) -> None:
        """Somebody wrote our key: _Taken if it is somebody else's now."""
        try:
            attributes = read_value(kv.value)
        except FieldError:
            return  # nobody's, while it cannot be used: say again whose it is
        if not is_mine(attributes, lease.attributes):
            held = self._held
            if held is not None and is_mine(attributes, held.lease.attributes):
                return  # ours, by the address we had until now
            owner = attributes.public_ip or attributes.public_ipv6
            raise _Taken(f"{lease.subnets} is the lease of {owner} now")

    async def _put(self, lease: Lease, seen: Entry | None) -> bool:
        """Write our key if it is still as ``seen``, or (None) not there.

        False: it is not. If that was an attempt of ours whose answer was lost, the next look finds
        our address in it.
        """
        key = self._prefix + lease.key.encode()
        grant_id, ends = (0, None) if lease.reserved else await self._grant()
        value = write_value(lease.attributes)
        answer = await self._client.call(messages.TXN, messages.TxnRequest(
            compare=[_absent(key) if seen is None else _unchanged(key, seen.mod_revision)],
            success=[messages.RequestOp(
                request_put=messages.PutRequest(key=key, value=value, lease=grant_id)
            )],
        ))
        if not answer.succeeded:
            return False
        former_id = self._held.lease_id if self._held else 0
        self._spare = None
        self._own(lease, int(answer.header.revision), grant_id, ends)
        if grant_id:
            self._granted.add(grant_id)
        if former_id in self._granted - {grant_id}:
            self._granted.discard(former_id)
            with contextlib.suppress(StoreDown, StoreRefused):  # it ends by itself
                await self._client.call(
                    messages.LEASE_REVOKE, messages.LEASE_REVOKE.request(ID=former_id)
                )
        return True

    async def _grant(self) -> tuple[int, float]:
        """A lease for our key, and when it ends.

        One that was granted and not used, as far as we know, is used for the next attempt, so that
        failed ones leave no heap of leases behind. It may carry our key, if an answer was lost.
        """
        ttl_s = self._config.ttl_seconds
        if self._spare is not None and self._spare[1] - time.monotonic() > 0.9 * ttl_s:
            request = messages.LEASE_TIME_TO_LIVE.request(ID=self._spare[0])
            if (await self._client.call(messages.LEASE_TIME_TO_LIVE, request)).TTL > 0:
                return self._spare
        asked_at = time.monotonic()
        answer = await self._client.call(
            messages.LEASE_GRANT, messages.LEASE_GRANT.request(TTL=ttl_s)
        )
        self._spare = (int(answer.ID), asked_at + answer.TTL)
        return self._spare

    # What is known

    def _own(self, lease: Lease, mod_revision: int, lease_id: int, ends: float | None) -> None:
        self._held = _Held(lease, mod_revision, lease_id, ends)
        health = self._health
        health.lease, health.lease_error = "held", ""
        health.lease_expires = None if ends is None else time.time() + ends - time.monotonic()

    def _lose(self, held: _Held, reason: str) -> None:
        self._held = held
        self._health.lease, self._health.lease_error = "lost", reason
        self._health.lease_expires = None

    def _quiet_time(self) -> float:
        """Seconds until our key is to be looked at again."""
        assert self._held is not None
        if self._held.ends is None:
            return CHECK_S
        due = self._held.ends - self._config.renew_margin - time.monotonic()
        return min(max(due, 0.0), CHECK_S)

    def _say(self, error: Exception) -> None:
        held, health = self._held, self._health
        assert held is not None
        if isinstance(error, _Taken):
            text = f"is lost: {error}; trying to get it back, forwarding on"
            self._lose(held, str(error))
        elif held.ends is not None and held.ends <= time.monotonic():
            text = f"ran out, as it could not be renewed: {error}; forwarding on"
            self._lose(held, f"it ran out, and could not be renewed: {error}")
        else:
            text = f"could not be looked after: {error}"
        if text != self._said:
            level = logging.ERROR if health.lease == "lost" else logging.WARNING
            log.log(level, "our lease of %s %s", held.lease.subnets, text)
            self._said = text


def _absent(key: bytes) -> Any:
    return messages.Compare(key=key, target=messages.COMPARE_VERSION, version=0)


def _unchanged(key: bytes, mod_revision: int) -> Any:
    return messages.Compare(key=key, target=messages.COMPARE_MOD, mod_revision=mod_revision)
