"""Netlink: configure the TUN, read the host's addresses, watch addresses and links.

Owns the netlink thread. All of pyroute2 runs in this thread, for two reasons:
- pyroute2 does not work on uvloop.
- The import of pyroute2 takes as long as the rest of a start. The thread imports pyroute2 while the
  caller continues. If the device already works, the forwarder starts this thread only when it
  forwards packets.

Does not depend on the forwarder's routes and peers. Threading: call public methods from any thread,
``async`` methods from any asyncio loop. pyroute2 objects never leave the netlink thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from ..device.fault import device_error
from ..errors import FieldError
from ..model import MIN_MTU6, IPAddress, IPNetwork
from . import local
from .batch import RECEIVE_LEN, RouteSocket
from .changes import ANYTHING, GROUPS, Change, Kind, parse_changes

log = logging.getLogger(__name__)
T = TypeVar("T")

RTM_NEWLINK = 16  # linux/rtnetlink.h
NLM_F_REQUEST, NLM_F_ACK = 0x1, 0x4  # linux/netlink.h
IFLA_AF_SPEC, IFLA_INET_CONF = 26, 1  # linux/if_link.h
# linux/ip.h: numbers of a device's IPv4 settings
IPV4_DEVCONF_RP_FILTER, IPV4_DEVCONF_ACCEPT_LOCAL = 8, 23
# The settings of our devices:
# - accept_local: accept packets with a local source address. The core's ICMP errors have such an
#   address.
# - rp_filter 2: with 1, the kernel drops these errors if our address is on two devices. It also
#   drops the packets of a peer that sends by another path than we do. A value of 0 would not help,
#   because the kernel uses the larger one of this value and that of "all".
DEVICE_SETTINGS = {IPV4_DEVCONF_ACCEPT_LOCAL: 1, IPV4_DEVCONF_RP_FILTER: 2}
IN6_ADDR_GEN_MODE_NONE = 1  # linux/if_link.h
IFF_UP = 0x1  # linux/if.h
IFA_F_NODAD, IFA_F_NOPREFIXROUTE = 0x02, 0x200  # linux/if_addr.h
RT_SCOPE_UNIVERSE = 0

TXQUEUELEN = 5000
SETTLE_SECONDS = 0.02  # changes come in bursts: report them once per burst
MAX_CHANGES = 1000  # the maximum of one burst; a larger burst is reported as ANYTHING
ADDRESS_KINDS = (Kind.LINK, Kind.ADDRESS, Kind.ANY)  # changes that can change the addresses
DUMP_TRIES = 5


def load() -> None:
    """Import pyroute2 now, in this thread."""
    import pyroute2  # noqa: F401


class Netlink:
    """One netlink thread, joined by ``close``. Can be used as a context manager.

    begin  True: start the thread now. False: the method ``begin`` starts it; calls wait until then
    """

    def __init__(self, begin: bool = True) -> None:
        self._loop: asyncio.AbstractEventLoop = asyncio.SelectorEventLoop()
        self._ipr: Any = None
        self._failure: Exception | None = None
        self._request_lock = asyncio.Lock()
        self._stop = asyncio.Event()
        self._gate = threading.Lock()
        self._closing = False
        self._watch: Any = None
        self._watchers: list[Callable[[frozenset[IPAddress]], None]] = []
        self._change_watchers: list[Callable[[frozenset[Change]], None]] = []
        self._changes: set[Change] = set()  # not delivered yet
        self._seen: frozenset[IPAddress] | None = None
        self._reread: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="netlink", daemon=True)
        if begin:
            self.begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- public -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the thread, if it is not started yet."""
        if self._thread.ident is None:
            self._thread.start()

    async def configure_tun(
        self,
        name: str,
        mtu: int,
        addresses: Iterable[IPAddress],
        networks: Iterable[IPNetwork],
        *,
        txqueuelen: int = TXQUEUELEN,
        gso_max_segs: int | None = None,
        gso_max_size: int | None = None,
    ) -> None:
        """Configure the device and bring it up. Change nothing outside the device.

        addresses  each is set as a host address (/32, /128)
        networks   each is routed through the device
        gso_max_*  limits of the super-packets that the host builds. If the kernel refuses a limit,
                   the refusal is only logged
        """
        await self._call(self._configure_tun(
            name, mtu, tuple(addresses), tuple(networks), txqueuelen=txqueuelen,
            gso={"gso_max_segs": gso_max_segs, "gso_max_size": gso_max_size},
        ))

    async def set_device(self, name: str, index: int) -> None:
        """Apply DEVICE_SETTINGS to a device of ours.

        They are set through netlink, because /proc/sys is read-only in an unprivileged container.
        """
        await self._call(self._set_device(name, index))

    async def rename(self, index: int, name: str) -> None:
        """Give the device the name. Raises DeviceError.

        Before Linux 6.2 the kernel renames only a device that is down, so the device is set down.
        """
        doing = f"renaming {_interface(index)} to {name}"
        try:
            await self._call(self._set_link(doing, index, ifname=name))
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            await self.set_down(index)
            await self._call(self._set_link(doing, index, ifname=name))

    async def set_down(self, index: int) -> None:
        doing = f"setting {_interface(index)} down"
        await self._call(self._set_link(doing, index, flags=0, change=IFF_UP))

    async def local_addresses(self) -> frozenset[IPAddress]:
        """Return all addresses of all interfaces of this network namespace."""
        return await self._call(self._local_addresses())

    def watch_addresses(self, callback: Callable[[frozenset[IPAddress]], None]) -> None:
        """Call ``callback`` in the netlink thread with all local addresses: once when the watch
        begins, and then after each change. No change is missed after the watch begins."""
        self._submit(self._add_watcher(callback))

    def watch_changes(self, callback: Callable[[frozenset[Change]], None]) -> None:
        """Call ``callback`` in the netlink thread with the changes on this host, burst by burst.

        The first call, when the watch begins, and each call after a loss of messages has the
        change ANYTHING. Changes of routes and neighbours that this process made are left out.
        ``callback`` should cause a read of the kernel's state, because the state may have changed
        again after a message was sent.
        """
        self._submit(self._add_change_watcher(callback))

    async def work(self, doing: str, job: Callable[[Any], Awaitable[T]]) -> T:
        """Run ``job`` with the route socket (pyroute2's AsyncIPRoute) in the netlink thread.

        Only other modules of ``net`` use this method. No pyroute2 object may leave ``job``. An
        error becomes a DeviceError that names ``doing``.
        """
        return await self._call(self._work(doing, job))

    def close(self) -> None:
        """Stop the thread and wait for it. Pending calls raise DeviceError."""
        with self._gate:
            if not self._closing:
                self._closing = True
                self._loop.call_soon_threadsafe(self._stop.set)
        self.begin()  # if no thread runs yet: the thread ends pending calls, and closes the loop
        self._thread.join()

    # -- the thread -------------------------------------------------------------------------------

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._gate:  # so that _shut sees all submitted work
            if self._closing:
                work.close()
                raise device_error(errno.EBADF, "calling netlink", "already closed")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` in the netlink thread and wait for it in the caller's loop.

        If the caller is cancelled, the work continues. Otherwise a dump might not be read to its
        end, and then the kernel answers EBUSY to the next request.
        """
        future = self._submit(work)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise device_error(errno.ECANCELED, "calling netlink", "closed") from None

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        finally:
            asyncio.set_event_loop(None)
            self._loop.close()

    async def _main(self) -> None:
        await self._open()
        await self._stop.wait()
        await self._shut()

    async def _open(self) -> None:
        try:
            # Importing a submodule is not cheaper: it runs the whole __init__ of pyroute2, too.
            from pyroute2 import AsyncIPRoute

            # The lock makes other calls wait. Otherwise they would set up a second transport.
            async with self._request_lock:
                self._ipr = AsyncIPRoute(ext_ack=True)
                await self._ipr.setup_endpoint()
        except Exception as error:
            self._failure = error  # raised by each call

    async def _shut(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._watch is not None:
            self._loop.remove_reader(self._watch.socket.fileno())
            self._watch.close()
        if self._ipr is not None:
            self._ipr.close()
            await asyncio.sleep(0)  # let the loop run once: the transport then closes its socket

    @contextlib.asynccontextmanager
    async def _doing(self, doing: str) -> AsyncIterator[Any]:
        """Yield the route socket. Turn an error into a DeviceError that names ``doing``.

        Only one user at a time has the socket, because the kernel answers EBUSY to a request during
        a dump on the same socket.
        """
        async with self._request_lock:
            if isinstance(self._failure, OSError):
                raise device_error(self._failure.errno or 0, "opening netlink")
            if self._failure is not None:
                raise self._failure
            from pyroute2 import NetlinkError

            try:
                yield self._ipr
            except NetlinkError as error:
                # The kernel's message, if there is one, is more precise than the errno.
                hint = str(error.args[1]) if len(error.args) > 1 else ""
                number = error.code if error.code > 0 else errno.EINTR  # an interrupted dump
                if hint == os.strerror(number):
                    hint = ""
                raise device_error(number, doing, hint) from None
            except OSError as error:
                raise device_error(error.errno or errno.EIO, doing) from None

    async def _dump(self, doing: str, kind: str) -> list[Any]:
        """Return all messages of a dump. Repeat the dump if the table changes during it."""
        from pyroute2 import NetlinkDumpInterrupted

        async with self._doing(doing) as ipr:
            for _ in range(DUMP_TRIES - 1):
                with contextlib.suppress(NetlinkDumpInterrupted):
                    return [message async for message in await getattr(ipr, kind)("dump")]
            return [message async for message in await getattr(ipr, kind)("dump")]

    async def _work(self, doing: str, job: Callable[[Any], Awaitable[T]]) -> T:
        async with self._doing(doing) as ipr:
            return await job(ipr)

    # -- reading ----------------------------------------------------------------------------------

    async def _local_addresses(self) -> frozenset[IPAddress]:
        async def read(_: Any) -> frozenset[IPAddress]:
            return local.local_addresses()

        return await self._work("reading all addresses", read)

    # -- watching ---------------------------------------------------------------------------------

    async def _add_watcher(self, callback: Callable[[frozenset[IPAddress]], None]) -> None:
        self._watchers.append(callback)
        try:
            await self._subscribe()
        except OSError as error:
            log.error("local addresses are not watched: %s", error)
        self._seen = None  # so that the next read calls the new watcher, even without a change
        self._schedule_read()

    async def _add_change_watcher(self, callback: Callable[[frozenset[Change]], None]) -> None:
        self._change_watchers.append(callback)
        try:
            await self._subscribe()
        except OSError as error:
            log.error("changes of this host are not watched: %s", error)
        _run_watcher(callback, frozenset({ANYTHING}))

    async def _subscribe(self) -> None:
        async with self._doing("subscribing to the kernel's notifications"):
            if self._watch is not None:
                return
            from pyroute2 import IPRSocket

            watch = IPRSocket()
            watch.bind(groups=GROUPS)
            watch.socket.setblocking(False)
            self._loop.add_reader(watch.socket.fileno(), self._on_message)
            self._watch = watch

    def _on_message(self) -> None:
        """Read the messages. A message only shows that something has changed; the state itself is
        read from the kernel again. Lost messages (ENOBUFS) therefore do no harm."""
        changes: set[Change] = set()
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    changes.update(parse_changes(
                        self._watch.socket.recv(RECEIVE_LEN), RouteSocket.own_ports))
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    log.info("netlink messages were lost: reading the addresses and links again")
                    changes.add(ANYTHING)
        if self._change_watchers and changes:
            if not self._changes:
                self._loop.call_later(SETTLE_SECONDS, self._deliver)
            self._changes |= changes if len(self._changes) < MAX_CHANGES else {ANYTHING}
        if any(change.kind in ADDRESS_KINDS for change in changes):
            self._schedule_read()

    def _deliver(self) -> None:
        changes, self._changes = frozenset(self._changes), set()
        for callback in tuple(self._change_watchers):
            _run_watcher(callback, changes)

    def _schedule_read(self) -> None:
        if self._reread is None:
            self._reread = self._loop.create_task(self._read_addresses())

    async def _read_addresses(self) -> None:
        try:
            if self._seen is not None:
                await asyncio.sleep(SETTLE_SECONDS)
        finally:
            self._reread = None  # a change after this point needs another read
        try:
            addresses = await self._local_addresses()
        except OSError as error:
            log.error("%s", error)
            return
        if addresses == self._seen:
            return
        self._seen = addresses
        for callback in tuple(self._watchers):
            _run_watcher(callback, addresses)

    # -- configuring ------------------------------------------------------------------------------

    async def _configure_tun(
        self, name: str, mtu: int, addresses: tuple[IPAddress, ...],
        networks: tuple[IPNetwork, ...], *, txqueuelen: int, gso: Mapping[str, int | None],
    ) -> None:
        doing = f"setting up {name}"
        try:
            index = socket.if_nametoindex(name)
        except OSError:  # if_nametoindex gives no errno
            raise device_error(errno.ENODEV, doing) from None
        wants_v6 = any(item.version == 6 for item in (*addresses, *networks))
        if wants_v6 and mtu < MIN_MTU6:  # the kernel would remove IPv6 from the device
            raise FieldError("mtu", mtu, f"at least {MIN_MTU6} for IPv6 inside the tunnel")
        async with self._doing(f"{doing}: MTU {mtu}, queue length {txqueuelen}") as ipr:
            await ipr.link("set", index=index, mtu=mtu, txqlen=txqueuelen)
        await self._disable_autoconfiguration(name, index, wants_v6)
        await self._set_device(name, index)
        for option, value in gso.items():
            if value is not None:
                try:
                    async with self._doing(f"{doing}: {option} {value}") as ipr:
                        await ipr.link("set", index=index, **{option: value})
                except OSError as error:
                    log.warning("%s", error)
        for address in addresses:
            await self._add_address(name, index, address)
        async with self._doing(f"bringing up {name}") as ipr:
            await ipr.link("set", index=index, flags=IFF_UP, change=IFF_UP)
        for network in networks:
            await self._add_route(name, index, network)

    async def _disable_autoconfiguration(self, name: str, index: int, wants_v6: bool) -> None:
        """Stop the kernel from sending packets of its own on the device. Without a link-local
        address the kernel sends no router solicitations."""
        conf = Path("/proc/sys/net/ipv6/conf", name)
        if not conf.exists():
            if wants_v6:
                raise device_error(
                    errno.EAFNOSUPPORT, f"setting up IPv6 on {name}", "this host has no IPv6"
                )
            return
        disabled = conf / "disable_ipv6"
        if wants_v6 and disabled.read_text().strip() == "1":
            try:
                disabled.write_text("0")
            except OSError as error:
                raise device_error(
                    error.errno or 0, f"turning IPv6 on for {name}",
                    f"net.ipv6.conf.{name}.disable_ipv6 is 1",
                ) from None
        async with self._doing(f"turning off IPv6 link-local addresses on {name}") as ipr:
            await ipr.link("set", index=index, IFLA_AF_SPEC={"attrs": [
                ("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", IN6_ADDR_GEN_MODE_NONE)]}),
            ]})

    async def _set_link(self, doing: str, index: int, **what: Any) -> None:
        async with self._doing(doing) as ipr:
            await ipr.link("set", index=index, **what)

    async def _set_device(self, name: str, index: int) -> None:
        async with self._doing(f"setting up {name}: accept_local and rp_filter") as ipr:
            answer = await ipr.nlm_request(
                _settings_message(index), RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK
            )
            async for _ in answer:
                pass

    async def _add_address(self, name: str, index: int, address: IPAddress) -> None:
        flags = IFA_F_NODAD | IFA_F_NOPREFIXROUTE if address.version == 6 else 0
        async with self._doing(f"adding the address {address} to {name}") as ipr:
            await ipr.addr("replace", index=index, address=str(address),
                           prefixlen=address.max_prefixlen, flags=flags)

    async def _add_route(self, name: str, index: int, network: IPNetwork) -> None:
        doing = f"routing {network} through {name}"
        family = socket.AF_INET6 if network.version == 6 else socket.AF_INET
        try:
            async with self._doing(doing) as ipr:
                await ipr.route("add", family=family, dst=str(network), oif=index,
                                scope=RT_SCOPE_UNIVERSE)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
            present = await self._route_interface(doing, network)
            if present != index:
                raise device_error(
                    errno.EEXIST, doing, f"the host routes it through {_interface(present)}"
                ) from None

    async def _route_interface(self, doing: str, network: IPNetwork) -> int | None:
        """Return the interface index of the host's route to exactly ``network``, or None."""
        for message in await self._dump(doing, "route"):
            if (
                message["dst_len"] == network.prefixlen
                and message.get_attr("RTA_DST") == str(network.network_address)
                and message.get_attr("RTA_TABLE") == 254
            ):
                oif: int | None = message.get_attr("RTA_OIF")
                return oif
        return None


def _run_watcher(callback: Callable[..., None], *args: object) -> None:
    try:
        callback(*args)
    except Exception:
        log.exception("a netlink watcher failed")


def _interface(index: int | None) -> str:
    try:
        return socket.if_indextoname(index or 0)
    except OSError:
        return "another next hop"


def _settings_message(index: int) -> Any:
    """Build a message that sets DEVICE_SETTINGS.

    pyroute2 treats the kernel's device settings as one structure and cannot set a single one. This
    function therefore defines the message, with pyroute2's classes.
    """
    from pyroute2.netlink import nla, nlmsg

    class LinkMessage(nlmsg):  # type: ignore[misc]
        fields = (("family", "B"), ("__align", "x"), ("ifi_type", "H"), ("index", "i"),
                  ("flags", "I"), ("change", "I"))
        nla_map = ((IFLA_AF_SPEC, "IFLA_AF_SPEC", "af_spec"),)

        class af_spec(nla):  # type: ignore[misc]
            nla_map = ((int(socket.AF_INET), "AF_INET", "inet"),)

            class inet(nla):  # type: ignore[misc]
                nla_map = ((IFLA_INET_CONF, "IFLA_INET_CONF", "conf"),)

                class conf(nla):  # type: ignore[misc]
                    nla_map = tuple(
                        (number, f"SETTING_{number}", "uint32") for number in DEVICE_SETTINGS)

    message = LinkMessage()
    message["index"] = index
    conf = {"attrs": [(f"SETTING_{n}", value) for n, value in DEVICE_SETTINGS.items()]}
    message["attrs"] = [
        ("IFLA_AF_SPEC", {"attrs": [("AF_INET", {"attrs": [("IFLA_INET_CONF", conf)]})]})
    ]
    return message
