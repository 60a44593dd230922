"""Configure the TUN device (MTU, addresses, routes), and restore it after it was set down.

Owns the desired configuration and the comparison with the kernel's state. Does not depend on what
changed the device: a netlink message is only a reason to read the state again. Lost addresses and
routes are therefore found even if the device was set down and up again between two reads.
Threading: control loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterable

from .. import _core
from ..errors import UdptunError
from ..model import IPAddress, IPNetwork
from ..net.netlink import Netlink
from ..net.tun_state import TunState, tun_state

log = logging.getLogger(__name__)


class TunSetup:
    """The desired state of one TUN device, applied by ``apply`` and kept by ``keep``.

    report  called with a sentence for each state in which packets are lost
    """

    def __init__(
        self, netlink: Netlink, name: str, mtu: int, addresses: Iterable[IPAddress],
        networks: Iterable[IPNetwork], report: Callable[[str], None],
    ) -> None:
        self._netlink = netlink
        self._name = name
        self._index = socket.if_nametoindex(name)
        self._mtu = mtu
        self._addresses = tuple(addresses)
        self._networks = tuple(networks)
        self._report = report
        self._changed = asyncio.Event()
        self._down = False
        # Addresses and routes that the last restore failed to set. A restore causes link messages,
        # which cause the next check. If the same entries are still missing then, do not try again.
        self._unrestored: list[str] = []

    async def apply(self) -> None:
        """Configure the device and bring it up. Raises FieldError, DeviceError."""
        await self._netlink.configure_tun(
            self._name, self._mtu, self._addresses, self._networks,
            gso_max_segs=_core.MAX_FRAME_SEGS,
        )

    async def keep(self) -> None:
        """Watch the device and restore its configuration, until cancelled."""
        loop = asyncio.get_running_loop()

        def on_change() -> None:  # in the netlink thread
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._changed.set)

        self._netlink.watch_link(self._index, on_change)
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._check()
            except (UdptunError, OSError) as error:
                self._report(str(error))

    async def _check(self) -> None:
        state = await tun_state(self._netlink, self._index)
        if state is None:
            return  # the device is deleted; the workers report this
        if not state.up:
            if not self._down:
                self._report(f"{self._name} was set down: nothing is forwarded until it is up")
            self._down, self._unrestored = True, []
            return
        missing = self._missing(state)
        if not missing:
            self._unrestored = []
        was_down, self._down = self._down, False
        if missing and missing != self._unrestored:
            if not was_down:
                self._report(f"{self._name} was set down and up again, or changed by another"
                             f" program: it has lost {', '.join(missing)}")
            self._unrestored = missing
            await self.apply()
        elif missing or not was_down:
            return
        self._unrestored = []
        log.warning("%s is up again, with its addresses and routes", self._name)

    def _missing(self, state: TunState) -> list[str]:
        missing: list[str] = [str(item) for item in self._addresses if item not in state.addresses]
        missing += [str(item) for item in self._networks if item not in state.networks]
        return missing
