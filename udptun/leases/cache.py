"""The last known truth on disk: what holds while the store cannot be asked, also after a restart.

Owns one file: its form, and that it is replaced as a whole, at once after a quiet time and with
pauses in a busy one. Refuses to know when what it keeps is to be used. Asyncio, one loop; a helper
thread writes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..files import replace_file
from .base import Attributes, Lease, Subnets
from .netconf import NetConfig
from .wait import wait_at_most

log = logging.getLogger(__name__)

VERSION = 1
PAUSE_MOST_SECONDS = 1.0
PAUSE_WRITES = 20  # a pause is as long as so many writes: a small file is never old
RETRY_SECONDS = 10.0

Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True)
class LastKnown:
    """What a store said last.

    store    of which store this is; what one store said says nothing of another
    network  the network's configuration
    lease    our own, or None if there was none
    leases   all there were, our own among them
    """

    store: str
    network: NetConfig
    lease: Lease | None
    leases: tuple[Lease, ...]


class LeaseCache:
    """One file, of one daemon. The directory is made when it is needed.

    pause_s  between two writes; None: in proportion to what a write takes
    """

    def __init__(self, path: Path, *, pause_s: float | None = None) -> None:
        self.path = path
        self._pause_s = pause_s
        self._not_before = 0.0  # of the loop's clock
        self._next: LastKnown | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def load(self, store: str) -> LastKnown | None:
        """What was kept of this store, or None. A file that is broken is set aside. Blocks."""
        try:
            known = _decode(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as exc:
            log.error("%s cannot be read: %s", self.path, exc.strerror)
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            aside = self.path.with_name(self.path.name + ".bad")
            with suppress(OSError):
                self.path.replace(aside)
            log.error("%s does not hold leases and is now %s: %r", self.path, aside, exc)
            return None
        if known.store != store:
            log.info("%s is of %s, not of %s: not used", self.path, known.store, store)
            return None
        return known

    def keep(self, known: LastKnown) -> None:
        """To be written soon; of several the last one counts. A disk that takes nothing is said
        in the log, and tried again."""
        self._next = known
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._write_all())

    async def aclose(self) -> None:
        """Write what waits, now and once."""
        self._closing.set()
        if self._task is not None:
            await self._task

    async def _write_all(self) -> None:
        clock, complained = asyncio.get_running_loop().time, False
        while self._next is not None:
            await wait_at_most(self._closing, self._not_before - clock())
            known, began = self._next, clock()
            try:
                await asyncio.to_thread(self._write, known)
            except OSError as exc:
                if not complained:
                    log.error("the leases are not saved to %s: %s", self.path, exc.strerror)
                if self._closing.is_set():
                    return
                self._not_before, complained = clock() + RETRY_SECONDS, True
                continue
            if self._next is known:
                self._next = None
            pause = self._pause_s
            if pause is None:
                pause = min(PAUSE_WRITES * (clock() - began), PAUSE_MOST_SECONDS)
            self._not_before, complained = clock() + pause, False

    def _write(self, known: LastKnown) -> None:
        self.path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        replace_file(self.path, [_encode(known)])


def _encode(known: LastKnown) -> bytes:
    """JSON, a lease on each line.

    Lease by lease, since the encoder keeps the GIL: for thousands at once the loop would stand
    still. And a peer's data may be nested deeper than can be written: that one is left out.
    """
    head = json.dumps({
        "version": VERSION,
        "store": known.store,
        "network": known.network.text,
        "subnets_checked": known.network.subnets_checked,
        "lease": known.lease and _lease_to_json(known.lease),
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
        raise ValueError(f"it is of version {content['version']}, not {VERSION}")
    return LastKnown(
        content["store"],
        NetConfig.parse(content["network"], check_subnets=content["subnets_checked"]),
        content["lease"] and _lease_from_json(content["lease"]),
        tuple(map(_lease_from_json, content["leases"])),
    )


def _lease_to_json(lease: Lease) -> dict[str, Any]:
    attributes = lease.attributes
    fields = {
        "key": lease.key,
        "name": lease.name,
        "reserved": lease.reserved,
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
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _of(kind: Callable[[str], Kind], fields: Mapping[str, Any], name: str) -> Kind | None:
    return kind(fields[name]) if name in fields else None
