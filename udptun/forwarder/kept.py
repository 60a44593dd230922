"""Start with the descriptors that outlived an earlier forwarder, which has died.

Owns the inherited descriptors until a part of the forwarder uses them. If they do not fit the
configuration, they are closed, and the forwarder starts as usual. Threading: control loop only.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Mapping

from ..device.tun import Tun
from ..errors import DeviceError
from ..net.udp import UdpSocket
from ..takeover.channel import close_all
from ..takeover.kept import tun_name, udp_name
from .config import ForwarderConfig

log = logging.getLogger(__name__)


class Kept:
    """The inherited descriptors, by name.

    forget  called with the names of the descriptors that cannot be used: until their keeper has
            closed its copies, the device and the ports are in use
    """

    def __init__(
        self, named: Mapping[str, int], forget: Callable[[Iterable[str]], None] | None = None
    ) -> None:
        self._named = dict(named)
        self._forget = forget

    def __bool__(self) -> bool:
        """Whether there are descriptors that are not used yet."""
        return bool(self._named)

    def device(self, config: ForwarderConfig) -> tuple[Tun, list[UdpSocket]] | None:
        """Return the TUN and the sockets, ordered by worker; None if they cannot be used."""
        if not self._named:
            return None
        try:
            tun, sockets = self._adopt(config)
        except DeviceError as error:
            log.warning("the kept TUN and sockets are not used: %s", error)
            names = list(self._named)
            self.close()
            if self._forget is not None:
                self._forget(names)
            return None
        self._named = {}
        log.info("continuing with the TUN and the sockets of the forwarder that has died")
        return tun, sockets

    def _adopt(self, config: ForwarderConfig) -> tuple[Tun, list[UdpSocket]]:
        mark = f".{config.fingerprint}"
        named = {name.removesuffix(mark): fd for name, fd in self._named.items()
                 if name.endswith(mark)}
        workers = range(config.workers_n)
        listen = [(udp_name(i, each.address.version), each) for i in workers
                  for each in config.listen]
        wanted = {tun_name(i) for i in workers} | {name for name, _ in listen}
        if named.keys() != wanted or len(named) != len(self._named):
            raise DeviceError(errno.EINVAL, "they are those of a forwarder with other options")
        tun = Tun.reuse(tuple(named[tun_name(i)] for i in workers), config.offload)
        if tun.name != config.tun:
            raise DeviceError(errno.EINVAL, f"the device is {tun.name}, not {config.tun}")
        sockets: list[UdpSocket] = []
        try:
            for name, endpoint in listen:
                sockets.append(UdpSocket.reuse(named[name], endpoint, config.offload))
        except DeviceError:
            for opened in sockets:
                opened.socket.detach()
            raise
        return tun, sockets

    def close(self) -> None:
        close_all(self._named)
        self._named = {}
