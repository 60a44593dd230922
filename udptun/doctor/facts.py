"""What the checks look at: the answers of the daemon and the forwarder, and the host's state.

Owns where each fact comes from. If the node daemon does not answer, the files that it has left say
what it had set up. A fact is read once. Changes nothing on the host. Threading: ``gather`` first;
then one check at a time.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..control.client import ControlClient
from ..control.protocol import NODE_SOCKET
from ..errors import ControlError, FieldError, NoForwarder
from ..instance import Instance
from ..net.links import Link, links
from .processes import Process, processes, sockets_of, thread_seconds
from .sockets import UdpSocket, udp_sockets

if TYPE_CHECKING:
    from ..cni.node import Overlay
    from ..leases.cache import LastKnown
    from ..model import Endpoint, IPAddress, IPNetwork
    from ..node.process.launch import ForwarderSpec

ANSWER_SECONDS = 5.0  # a daemon or forwarder answers within milliseconds

Answer = dict[str, Any]
Row = dict[str, Any]  # of ``udptun status``: a peer by name


@dataclass
class Asked:
    """What a program answered on its socket.

    answer  None: it gave no answer that can be used
    error   why not
    denied  this user may not ask
    failed  it answered, but with an error or with invalid JSON
    """

    answer: Answer | None = None
    error: str = "not asked yet"
    denied: bool = False
    failed: bool = False


def _stolen() -> tuple[int, int]:
    """Return the time that the hypervisor has taken from this machine, and all CPU time."""
    try:
        with Path("/proc/stat").open() as file:
            values = [int(word) for word in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return 0, 0
    return values[7], sum(values)


@dataclass
class Sample:
    """Counters of one moment. A second sample shows which counters rise."""

    at: float = field(default_factory=time.monotonic)
    drops: list[Answer] | None = None
    sockets: list[UdpSocket] = field(default_factory=udp_sockets)
    cpu: tuple[int, int] = field(default_factory=_stolen)
    threads: dict[tuple[str, str], float] = field(default_factory=dict)


class Facts:
    """The facts of one instance on this host.

    control   the forwarder's control socket; the daemon's socket is next to it
    mesh      combines the two answers into one row for each peer
    state_dir, subnet_file  if the user names them
    """

    def __init__(
        self, instance: Instance, control: Path,
        mesh: Callable[[Answer | None, Sequence[Answer]], list[Row]],
        state_dir: Path | None = None, subnet_file: Path | None = None,
    ) -> None:
        self.instance, self.control = instance, control
        self.client = ControlClient(str(control), ANSWER_SECONDS)
        self.node_socket = control.with_name(NODE_SOCKET)
        self._mesh, self._state_dir, self._subnet_file = mesh, state_dir, subnet_file
        self.node, self.forwarder = Asked(), Asked()
        self.known_error = ""  # why ``known`` is None, after it was read
        self.first: Sample | None = None
        self.last: Sample | None = None

    def gather(self) -> None:
        """Ask the daemon and the forwarder, at the same time, and take the first sample."""
        node = ControlClient(str(self.node_socket), ANSWER_SECONDS)
        other = threading.Thread(target=_ask, args=(self.node, node.node), daemon=True)
        other.start()
        _ask(self.forwarder, self.client.status)
        other.join(2 * ANSWER_SECONDS)
        node.close()
        self.node.error = self.node.error.replace("forwarder", "node daemon")
        self.first = self.sample()

    def sample(self) -> Sample:
        found = Sample()
        if self.forwarder.answer is not None:
            try:
                found.drops = [*self.client.drops()]
            except (NoForwarder, ControlError):
                found.drops = None
            found.threads = thread_seconds(self.forwarder.answer["pid"])
        return found

    # -- programs and files ------------------------------------------------------------------------

    @cached_property
    def users(self) -> set[int]:
        """The users whose processes count: root, this user, and the owner of the socket. Another
        user could start a process whose options name any file, and a doctor that runs as root
        would read this file."""
        try:
            return {0, os.geteuid(), self.control.stat().st_uid}
        except OSError:
            return {0, os.geteuid()}

    @cached_property
    def processes(self) -> list[Process]:
        return [one for one in processes(self.users) if one.instance == self.instance.name]

    def running(self, role: str) -> list[Process]:
        """Return the processes of this role, without those that have ended."""
        return [one for one in self.processes if one.role == role and one.state != "Z"]

    @cached_property
    def spec(self) -> ForwarderSpec | None:
        """The options that the daemon has given to the forwarder; None: there are none."""
        from ..node.process.launch import FORWARD_FILE, ForwarderSpec

        path = Path(self._file("forward_file") or self.control.with_name(FORWARD_FILE))
        try:
            return ForwarderSpec.read(path)
        except (OSError, FieldError):
            return None

    @cached_property
    def state_dir(self) -> Path:
        named = self._file("state_dir") or self._option("state-dir")
        if self._state_dir is not None:
            return self._state_dir
        if named:
            return Path(named)
        return self.instance.state_dir if self.spec is None else Path(self.spec.state).parent

    @cached_property
    def subnet_file(self) -> Path:
        if self._subnet_file is not None:
            return self._subnet_file
        named = self._file("subnet_file") or self._option("subnet-file")
        return self.instance.subnet_file if named is None else Path(named)

    @cached_property
    def known(self) -> LastKnown | None:
        """The leases that the daemon has saved; None: see ``known_error``."""
        from ..leases.cache import CACHE_FILE, read_known

        path = self.state_dir / CACHE_FILE
        try:
            return read_known(path)
        except FileNotFoundError:
            self.known_error = f"{path} does not exist"
        except OSError as exc:
            self.known_error = f"{path} cannot be read: {exc.strerror}"
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            self.known_error = f"{path} is not valid: {exc!r}"
        return None

    @cached_property
    def forwarder_log(self) -> Path:
        """The log of a forwarder that a daemon has started."""
        from ..node.process.launch import LOG_FILE

        return self.state_dir / LOG_FILE

    @cached_property
    def subnet_env(self) -> Overlay:
        """The content of subnet.env. Raises OSError, FieldError."""
        from ..cni.node import parse

        return parse(self.subnet_file.read_bytes().decode(errors="replace"), str(self.subnet_file))

    def _file(self, name: str) -> str | None:
        answer = self.node.answer
        found = None if answer is None else answer.get("files", {}).get(name)
        return found if isinstance(found, str) else None

    def _option(self, name: str) -> str | None:
        return next((value for one in self.running("node")
                     if (value := one.option(name)) is not None), None)

    # -- what this host should have ----------------------------------------------------------------

    @property
    def expects_node(self) -> bool:
        """Whether a node daemon runs here, or has run here."""
        return self.node.answer is not None or self.known is not None or bool(
            self.running("node")) or self.node.denied or self.node.failed

    @property
    def expects_forwarder(self) -> bool:
        """Whether this host uses a forwarder."""
        if self.node.answer is not None and self.node.answer["backend"]:
            return bool(self.node.answer["backend"] != "vxlan")
        return self.forwarder.answer is not None or self.forwarder.denied or \
            self.forwarder.failed or self.spec is not None or bool(self.running("forward"))

    @property
    def backend(self) -> str:
        """The backend of the node: "udp", "vxlan" or "auto"; "": not known."""
        if self.node.answer is not None:
            return str(self.node.answer["backend"])
        if (option := self._option("backend")) is not None:
            return option
        return "" if self.known is None else self.known.network.backend_type

    @cached_property
    def networks(self) -> tuple[IPNetwork, ...]:
        """The networks of the overlay."""
        from ..model import parse_prefix

        if self.known is not None:
            return self.known.network.networks
        names = () if self.forwarder.answer is None else \
            self.forwarder.answer["device"]["networks"]
        return tuple(parse_prefix("network", name) for name in names)

    @cached_property
    def tun(self) -> str:
        if self.forwarder.answer is not None:
            return str(self.forwarder.answer["device"]["name"])
        return self.instance.tun if self.spec is None else self.spec.tun

    @cached_property
    def vxlan_devices(self) -> tuple[str, ...]:
        """The names that the VXLAN devices of this instance have, whether they exist or not."""
        if self.known is None or self.backend == "udp":
            return ()
        found = []
        for network in self.known.network.networks:
            try:
                found.append(self.instance.vxlan_device(self.known.network.vni, network.version))
            except FieldError:
                continue
        return tuple(found)

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the overlay's devices, whether they exist or not."""
        tun = (self.tun,) if self.expects_forwarder else ()
        return tun + self.vxlan_devices

    @cached_property
    def listen(self) -> tuple[Endpoint, ...]:
        """The addresses and ports at which the forwarder listens, or should listen."""
        from ..model import Endpoint

        if self.forwarder.answer is not None:
            texts = self.forwarder.answer["device"]["listen"]
        elif self.spec is not None:
            texts = self.spec.listen
        else:  # those of a forwarder that runs but does not answer
            inodes = {inode for one in self.running("forward") for inode in sockets_of(one.pid)}
            return tuple({Endpoint(one.address, one.port) for one in udp_sockets()
                          if one.inode in inodes})
        return tuple(Endpoint.parse(text, "listen") for text in texts)

    @cached_property
    def underlay_addresses(self) -> tuple[IPAddress, ...]:
        """The addresses of this host that the tunnel uses."""
        if self.listen:
            return tuple(one.address for one in self.listen)
        return () if self.known is None else self.known.addresses

    @cached_property
    def links(self) -> dict[str, Link]:
        return links()

    @property
    def underlay(self) -> Link | None:
        """The interface that carries the tunnel; None: not known, or it does not exist."""
        name = None if self.node.answer is None else self.node.answer["interface"]
        if name:
            return self.links.get(name)
        wanted = set(self.underlay_addresses)
        return next((link for link in self.links.values()
                     if wanted & {one.address for one in link.addresses}), None)

    @cached_property
    def rows(self) -> list[Row]:
        """The peers by name, as ``udptun status`` shows them."""
        peers = [] if self.forwarder.answer is None else self.forwarder.answer["peers"]
        return self._mesh(self.node.answer, peers)

    @property
    def is_root(self) -> bool:
        return os.geteuid() == 0


def _ask(asked: Asked, question: Callable[[], Answer]) -> None:
    try:
        asked.answer, asked.error = question(), ""
    except (NoForwarder, ControlError) as exc:
        asked.error = str(exc).partition(": start one with")[0]
        forbidden = isinstance(exc, ControlError) and exc.code == "forbidden"
        asked.denied = forbidden or isinstance(exc.__cause__, PermissionError)
        asked.failed = isinstance(exc, ControlError) and not forbidden
    except (json.JSONDecodeError, KeyError, TypeError) as exc:
        asked.error, asked.failed = f"its answer is not valid: {exc!r}", True
