"""The last known state of the store, cached on disk for a start while the store is down.

Owns: one file, its format, and when the file is written. Each write replaces the whole file. The
first change after a quiet period is written at once. Further changes are collected and written at
intervals. The node daemon decides when the cached state is used.
Threads: asyncio, one loop. A helper thread writes the file.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from operator import is_
from pathlib import Path
from typing import Any, TypeVar

from ..files import UntrustedFile, make_directory, read_own_file, replace_file
from ..model import IPAddress
from ..text import os_reason
from ..wait import until_removed, wait_at_most
from .base import Attributes, Lease, Subnets
from .netconf import NetConfig

log = logging.getLogger(__name__)

VERSION = 1
CACHE_FILE = "leases.json"  # in the state directory
MAX_INTERVAL_SECONDS = 1.0
# The interval between two writes, as a multiple of the duration of the last write. So a small file
# is written more often than a large one.
INTERVAL_WRITES = 20
RETRY_SECONDS = 10.0

Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True)
class LastKnown:
    """The last known state of one store.

    store      SourceConfig.store_id: the state of one store is never used for another
    network    the network's configuration
    lease      our own lease; None if this node had no lease
    leases     all leases, including our own
    addresses  the addresses of this host to which the overlay was bound; empty if an older version
               has written the file
    overrides  the public addresses that the store sets for this node, and that take precedence
               over the options; empty also if an older version has written the file
    memory     LeaseSource.memory; empty also if an older version has written the file
    """

    store: str
    network: NetConfig
    lease: Lease | None
    leases: tuple[Lease, ...]
    addresses: tuple[IPAddress, ...] = ()
    overrides: tuple[IPAddress, ...] = ()
    memory: Mapping[str, str] = field(default_factory=dict)


class LeaseCache:
    """The cache file of one daemon. The file's directory is created at the first write.

    interval_s  seconds between two writes; None: INTERVAL_WRITES times the duration of the last
                write, at most MAX_INTERVAL_SECONDS
    failed      called with the reason why the leases are not saved, and with "" when they are
    """

    def __init__(
        self, path: Path, *, interval_s: float | None = None,
        failed: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.path = path
        self._failed = failed
        self._interval_s = interval_s
        self._not_before = 0.0  # the earliest time of the next write, in the loop's clock
        self._next: LastKnown | None = None
        self._last: LastKnown | None = None  # the state in the file
        self._task: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def load(self, store: str) -> LastKnown | None:
        """Return the cached state of this store; None if there is no valid state of this store.

        An invalid file is renamed. Blocks during file access.
        """
        try:
            known = read_known(self.path)
        except FileNotFoundError:
            return None
        except UntrustedFile as exc:
            log.error("the cached leases cannot be read: %s", exc)
            return None
        except OSError as exc:
            log.error("%s cannot be read: %s", self.path, os_reason(exc))
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            aside = self.path.with_name(self.path.name + ".bad")
            with suppress(OSError):
                self.path.replace(aside)
            log.error("%s does not contain valid leases, renamed to %s: %r",
                      self.path, aside, exc)
            return None
        if known.store != store:
            log.info("%s belongs to %s, not to %s: not used", self.path, known.store, store)
            return None
        return known

    def keep(self, known: LastKnown) -> None:
        """Write ``known`` to the file soon.

        A later call replaces a state that is not written yet. A failed write is logged and
        repeated. If the file is removed later, it is written again.
        """
        if self._next is None and self._last is not None and _is_same(known, self._last):
            return
        self._next = known
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._write_all())
        if self._watch is None:
            self._watch = loop.create_task(self._restore_removed())

    async def aclose(self) -> None:
        """If a state is not written yet, write it now. A failed write is not repeated."""
        self._closing.set()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})
        if self._task is not None:
            await self._task

    async def _write_all(self) -> None:
        clock, logged = asyncio.get_running_loop().time, False
        while self._next is not None:
            await wait_at_most(self._closing, self._not_before - clock())
            known, began = self._next, clock()
            try:
                await asyncio.to_thread(self._write, known)
            except OSError as exc:
                why = f"the leases are not saved to {self.path}: {os_reason(exc)}"
                if not logged:
                    log.error("%s", why)
                self._failed(why)
                if self._closing.is_set():
                    return
                self._not_before, logged = clock() + RETRY_SECONDS, True
                continue
            self._failed("")
            self._last = known
            if self._next is known:
                self._next = None
            interval = self._interval_s
            if interval is None:
                interval = min(INTERVAL_WRITES * (clock() - began), MAX_INTERVAL_SECONDS)
            self._not_before, logged = clock() + interval, False

    async def _restore_removed(self) -> None:
        while True:
            await until_removed(self.path)
            if self._next is None and self._last is not None:
                log.warning("%s was removed: writing it again", self.path)
                known, self._last = self._last, None
                self.keep(known)
            await asyncio.sleep(RETRY_SECONDS)

    def _write(self, known: LastKnown) -> None:
        make_directory(self.path.parent)
        replace_file(self.path, [_encode(known)], mode=0o600)


def read_known(path: Path) -> LastKnown:
    """Read a file that a LeaseCache has written, of any store. Changes nothing.

    Raises OSError if the file cannot be read; ValueError, KeyError, TypeError or RecursionError if
    it is invalid.
    """
    return _decode(read_own_file(path))


def _is_same(one: LastKnown, other: LastKnown) -> bool:
    """Return whether both have the same objects. To compare the data of the leases would take long,
    and fails if they are nested too deeply."""
    return (one.store, one.network, one.addresses, one.overrides, one.memory) == \
        (other.store, other.network, other.addresses, other.overrides, other.memory) and \
        one.lease is other.lease and len(one.leases) == len(other.leases) and \
        all(map(is_, one.leases, other.leases))


def _encode(known: LastKnown) -> bytes:
    """Return the state as JSON, with one lease per line.

    Each lease is encoded by a separate call of the encoder. The encoder holds the GIL during a
    call, so one call for thousands of leases would block the loop. A lease is left out if its data
    is nested too deeply for the encoder.
    """
    head = json.dumps({
        "version": VERSION,
        "store": known.store,
        "network": known.network.text,
        "subnets_checked": known.network.subnets_checked,
        "lease": known.lease and _lease_to_json(known.lease),
        "addresses": [str(address) for address in known.addresses],
        "overrides": [str(address) for address in known.overrides],
        "memory": {**known.memory},
    })
    lines = []
    for lease in known.leases:
        with suppress(RecursionError):
            lines.append(json.dumps(_lease_to_json(lease), separators=(",", ":")))
    body = ",\n".join(lines)
    return f'{head[:-1]}, "leases": [\n{body}\n]}}\n'.encode()


def _decode(data: bytes) -> LastKnown:
    content = json.loads(data)
    if content["version"] != VERSION:
        raise ValueError(f"its version is {content['version']}, not {VERSION}")
    return LastKnown(
        content["store"],
        NetConfig.parse(content["network"], check_subnets=content["subnets_checked"]),
        content["lease"] and _lease_from_json(content["lease"]),
        tuple(map(_lease_from_json, content["leases"])),
        tuple(map(ipaddress.ip_address, content.get("addresses", ()))),
        tuple(map(ipaddress.ip_address, content.get("overrides", ()))),
        {str(name): str(value) for name, value in content.get("memory", {}).items()},
    )


def _lease_to_json(lease: Lease) -> dict[str, Any]:
    attributes = lease.attributes
    fields = {
        "key": lease.key,
        "name": lease.name,
        "reserved": lease.reserved,
        "since": lease.since,
        "v4": _text(lease.subnets.v4),
        "v6": _text(lease.subnets.v6),
        "public_ip": _text(attributes.public_ip),
        "public_ipv6": _text(attributes.public_ipv6),
        "backend_type": attributes.backend_type,
        "backend_data": attributes.backend_data,
        "backend_v6_data": attributes.backend_v6_data,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _lease_from_json(fields: Mapping[str, Any]) -> Lease:
    return Lease(
        fields["key"],
        Subnets(_of(ipaddress.IPv4Network, fields, "v4"), _of(ipaddress.IPv6Network, fields, "v6")),
        Attributes(
            _of(ipaddress.IPv4Address, fields, "public_ip"),
            _of(ipaddress.IPv6Address, fields, "public_ipv6"),
            fields["backend_type"],
            fields.get("backend_data"),
            fields.get("backend_v6_data"),
        ),
        fields["name"],
        fields["reserved"],
        fields.get("since", 0),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _of(kind: Callable[[str], Kind], fields: Mapping[str, Any], name: str) -> Kind | None:
    return kind(fields[name]) if name in fields else None
