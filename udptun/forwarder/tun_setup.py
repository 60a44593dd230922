"""Keep the TUN device in its desired state: existence, name, MTU, settings, addresses and routes.

Owns the desired state, the comparison with the kernel's state, and the repairs. Does not depend on
the cause of a change: after each notification the state is read again. The state is also read every
LOOK_SECONDS, because the kernel sends no notification of some changes.
Threading: control loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Iterable

from .. import _core
from ..errors import DeviceError, UdptunError
from ..model import MIN_MTU6, IPAddress, IPNetwork
from ..net.changes import Change, Kind
from ..net.netlink import Netlink
from ..net.tun_state import tun_state
from ..repairs import Repairs
from ..wait import wait_at_most

log = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
TRIES = 3  # number of repairs without effect until an error is reported
OF_THE_DEVICE = (Kind.LINK, Kind.ADDRESS, Kind.ROUTE, Kind.SETTING)


class TunSetup:
    """The desired state of one TUN device, applied by ``apply`` and kept by ``keep``.

    queues  number of queues that we have
    reopen  makes the device again after it was deleted. Raises DeviceError, OSError
    report  called with a sentence for each state that cannot be repaired
    repaired  called with a sentence for each repair
    fail    called with a sentence if this process has no right to make the device again
    """

    def __init__(
        self, netlink: Netlink, name: str, mtu: int, addresses: Iterable[IPAddress],
        networks: Iterable[IPNetwork], *, queues: int, reopen: Callable[[], None],
        report: Callable[[str], None], repaired: Callable[[str], None],
        fail: Callable[[str], None],
    ) -> None:
        self._netlink = netlink
        self._name = name
        self._index = socket.if_nametoindex(name)
        self._mtu = mtu
        self._queues = queues
        self._addresses = tuple(addresses)
        self._networks = tuple(networks)
        self._prefixes = {(net.network_address.packed, net.prefixlen) for net in self._networks}
        self._reopen, self._report, self._fail = reopen, report, fail
        self._changed = asyncio.Event()
        self._new_mtu = False  # the device does not have ``mtu`` yet
        self._repairs = Repairs(repaired)
        self._failed_n = 0  # repairs without effect since the state was last right
        self._error = ""  # the last reported error; an equal error is not reported again

    async def apply(self) -> None:
        """Configure the device and bring it up. Raises FieldError, DeviceError."""
        await self._refuse_foreign_queues()
        await self._netlink.configure_tun(
            self._name, self._mtu, self._addresses, self._networks,
            gso_max_segs=_core.MAX_FRAME_SEGS,
        )

    async def _refuse_foreign_queues(self) -> None:
        """Raise DeviceError if another process has a queue of the device.

        For some microseconds, between its creation and the setting of its owner, every user who can
        open /dev/net/tun can add a queue. This check makes sure that nobody did.
        """
        state = await tun_state(self._netlink, self._index)
        if state is not None and state.queues > self._queues:
            raise DeviceError(
                errno.EBUSY, f"{self._name} has {state.queues} queues instead of {self._queues}: "
                             "another process has added a queue, and could read and send packets")

    def set_mtu(self, mtu: int) -> None:
        """Want another MTU. ``keep`` sets it."""
        self._mtu = mtu
        self._new_mtu = True
        self.check()

    def check(self) -> None:
        """Compare the device with the desired state soon."""
        self._changed.set()

    async def keep(self) -> None:
        """Watch the device and repair it, until cancelled."""
        loop = asyncio.get_running_loop()

        def on_changes(changes: frozenset[Change]) -> None:  # in the netlink thread
            if any(map(self._concerns_us, changes)):
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(self._changed.set)

        self._netlink.watch_changes(on_changes)
        while True:
            await wait_at_most(self._changed, LOOK_SECONDS)
            await asyncio.sleep(self._repairs.pause())
            self._changed.clear()
            self._repairs.summarise()
            try:
                await self._check()
                self._error = ""
            except (UdptunError, OSError) as error:
                if str(error) != self._error:
                    self._report(str(error))
                self._error = str(error)

    def _concerns_us(self, change: Change) -> bool:
        if self._error or change.kind is Kind.ANY:  # any change may remove the cause of an error
            return True
        return change.kind in OF_THE_DEVICE and (
            change.device in (self._index, 0) or change.prefix in self._prefixes)

    async def _check(self) -> None:
        wrong = await self._differences()
        if self._new_mtu:  # not a repair
            self._new_mtu = False
            if wrong:
                await self._repair()
                wrong = await self._differences()
        if not wrong:
            self._failed_n = 0
            return
        what = f"{self._name} is repaired: {'; '.join(wrong)}"
        self._repairs.begin(what)
        await self._repair()
        still = [text for text in await self._differences() if text in wrong]
        if not still:
            self._failed_n = 0
            self._repairs.done(what)
            return
        # The kernel has accepted the repair. Another program may have undone it since.
        self._failed_n += 1
        if self._failed_n >= TRIES:
            raise DeviceError(errno.EBUSY, f"{self._name} cannot be repaired: {'; '.join(still)}")
        self._changed.set()

    async def _differences(self) -> list[str]:
        state = await tun_state(self._netlink, self._index, self._networks)
        if state is None:
            return ["it was deleted"]
        return state.differences(self._name, self._mtu, self._addresses, self._networks)

    async def _repair(self) -> None:
        state = await tun_state(self._netlink, self._index, self._networks)
        if state is None:
            self._make_again()
        elif state.name != self._name:
            await self._netlink.rename(self._index, self._name)
        elif state.mtu < MIN_MTU6:
            # With an MTU this small the device has lost IPv6. If IPv6 came back while the device is
            # up, the kernel would add a link-local address and send packets of its own.
            await self._netlink.set_down(self._index)
        await self.apply()

    def _make_again(self) -> None:
        try:
            self._reopen()
        except DeviceError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                self._fail(f"the TUN device {self._name} was deleted: {error}")
            raise
        self._index = socket.if_nametoindex(self._name)
