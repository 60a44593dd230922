"""A cluster on a lab's hosts: a real etcd, and on each node a daemon, a forwarder and a pod.

Owns: the command lines of etcd and ``udptun node``, the paths of their files, and waiting until
they are ready. Does not depend on how etcd and the node daemon work inside. This module uses the
command line, ``/readyz``, ``subnet.env`` and etcd's JSON gateway, as an operator does. Main thread
only, like the whole lab.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import shutil
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..instance import DEFAULT_INSTANCE
from .hosts import DEADLINE_SECONDS, Host, Lab, LabError, Process, wait_for
from .tools import SEARCH_PATH
from .tunnels import control_request

PREFIX = "/coreos.com/network"
NETWORK_CONFIG: Mapping[str, Any] = {"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}
ETCD_PORT = 2379
HEALTH_PORT = 8080  # usually the same on all nodes, because each node has its own namespace


def etcd_obstacle() -> str | None:
    """Return the reason why etcd cannot be started on this machine; None if it can be started."""
    found = shutil.which("etcd") or shutil.which("etcd", path=SEARCH_PATH)
    return None if found else "etcd is not installed (apt-get install -y etcd-server)"


class _Connection(http.client.HTTPConnection):
    """An HTTP connection that is opened in the namespace of ``host``."""

    def __init__(self, host: Host, address: object, port: int) -> None:
        super().__init__(str(address), port, timeout=10)
        self._from = host

    def connect(self) -> None:
        with self._from.inside():
            super().connect()


class Etcd:
    """One etcd member on a host, with its data in the lab's folder."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.url = f"http://{host.v4}:{ETCD_PORT}"
        self.process = self._start()

    def _start(self) -> Process:
        peers = f"http://{self.host.v4}:2380"
        process = self.host.start([
            "etcd", "--name", "lab", "--data-dir", str(self.host.lab.folder / "etcd"),
            "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
            "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers,
            "--initial-cluster", f"lab={peers}", "--unsafe-no-fsync",
        ])
        wait_for(self._answers, f"etcd on {self.url}")
        return process

    def _answers(self) -> bool:
        try:
            self._ask("/v3/maintenance/status", {})
        except (OSError, http.client.HTTPException, LabError):
            return False
        return True

    def stop(self) -> None:
        """Kill etcd with SIGKILL, without an orderly shutdown."""
        self.process.kill()

    def start(self) -> None:
        """Start etcd again, with the same data."""
        self.process = self._start()

    def put(self, key: str, value: str) -> None:
        self._ask("/v3/kv/put", {"key": _encode(key), "value": _encode(value)})

    def put_together(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Put several keys in one transaction. etcd accepts at most 128 keys."""
        puts = [{"requestPut": {"key": _encode(key), "value": _encode(value)}}
                for key, value in pairs]
        self._ask("/v3/kv/txn", {"success": puts})

    def delete(self, key: str) -> None:
        self._ask("/v3/kv/deleterange", {"key": _encode(key)})

    def under(self, prefix: str) -> dict[str, str]:
        """Return the keys and values below a prefix."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        answer = self._ask(
            "/v3/kv/range", {"key": _encode(prefix), "range_end": _encode(end)}
        )
        return {_decode(kv["key"]): _decode(kv.get("value", "")) for kv in answer.get("kvs", [])}

    def compact(self) -> None:
        """Compact the store: delete the history before the current revision."""
        revision = self._ask("/v3/kv/range", {"key": _encode("/")})["header"]["revision"]
        self._ask("/v3/kv/compaction", {"revision": revision, "physical": True})

    def leases(self) -> dict[str, Any]:
        """Return the published leases, by subnet key."""
        head = f"{PREFIX}/subnets/"
        return {key.removeprefix(head): json.loads(value)
                for key, value in self.under(head).items()}

    def revoke(self, subnet: object) -> None:
        """Delete a node's lease. The effect is the same as when the lease expires."""
        self.delete(f"{PREFIX}/subnets/{str(subnet).replace('/', '-')}")

    def _ask(self, path: str, question: object) -> Any:
        connection = _Connection(self.host, self.host.v4, ETCD_PORT)
        try:
            connection.request("POST", path, json.dumps(question))
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise LabError(f"etcd {path}: {response.status} {answer}")
        return answer


def _encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _decode(text: str) -> str:
    return base64.b64decode(text).decode()


@dataclass(eq=False)
class Member:
    """One node: ``udptun node`` on a host.

    store        the options that select the lease source
    options      further options of the daemon
    external     True: the lab starts the forwarder as a separate process, which waits for the
                 daemon's file, as in a systemd unit or a container. False: the daemon starts the
                 forwarder
    environment  environment variables of the daemon and of a separate forwarder, in addition to the
                 lab's own variables
    instance     the instance's name; several instances on one host need different health ports
    choose       True: give the daemon no --iface, so that it chooses the interface of the default
                 route
    """

    host: Host
    store: Sequence[str]
    options: tuple[str, ...] = ()
    external: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    choose: bool = False
    instance: str = DEFAULT_INSTANCE
    health_port: int = HEALTH_PORT
    daemon: Process = field(init=False, repr=False)
    forwarder: Process | None = None
    pod: Host = field(init=False, repr=False)

    @property
    def folder(self) -> Path:
        own = "" if self.instance == DEFAULT_INSTANCE else f"-{self.instance}"
        return self.host.lab.folder / f"node-{self.host.name}{own}"

    @property
    def control(self) -> Path:
        return self.folder / "run" / "udptun.sock"

    @property
    def subnet_file(self) -> Path:
        return self.folder / "subnet.env"

    def argv(self, *more: str) -> list[str]:
        iface = () if self.choose else (f"--iface={self.host.interfaces[0].name}",)
        return [
            sys.executable, "-m", "udptun", "node", *self.store, *iface,
            f"--subnet-file={self.subnet_file}",
            f"--control={self.control}", f"--state-dir={self.folder / 'state'}",
            f"--healthz-port={self.health_port}", "--healthz-ip=127.0.0.1",
            f"--forwarder={'external' if self.external else 'spawn'}",
            f"--instance={self.instance}", *self.options, *more,
        ]

    def start(self, *more: str) -> None:
        self.folder.mkdir(exist_ok=True)
        if self.external and (self.forwarder is None or not self.forwarder.alive):
            self.start_forwarder()
        self.daemon = self.host.start(self.argv(*more), name="node", env=self.environment)

    def start_forwarder(self, *more: str) -> None:
        """Start the separate forwarder. It waits for the file that the daemon writes.

        more  further options
        """
        waiting = ["--wait-for", str(self.control.with_name("forward.json"))]
        self.forwarder = self.host.start(
            [sys.executable, "-m", "udptun", "forward", f"--instance={self.instance}", *waiting,
             *more],
            name="forwarder", env=self.environment,
        )

    def ready(self) -> tuple[bool, str]:
        """Return whether the node is ready, and the text of ``/readyz?verbose`` or the error."""
        try:
            status, text = self._health("/readyz?verbose")
        except (OSError, http.client.HTTPException) as exc:
            return False, str(exc)
        return status == 200, text

    def metrics(self) -> str:
        return self._health("/metrics")[1]

    def _health(self, path: str) -> tuple[int, str]:
        connection = _Connection(self.host, "127.0.0.1", self.health_port)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def wait_ready(self, seconds: float = DEADLINE_SECONDS) -> None:
        report = ""

        def is_ready() -> bool:
            nonlocal report
            if not self.daemon.alive:
                raise LabError(f"the node daemon ended:\n{self.daemon.text()}")
            good, report = self.ready()
            return good

        try:
            wait_for(is_ready, f"{self.host.name} to be ready", seconds)
        except LabError as exc:
            raise LabError(f"{exc}: {report}\n{self.daemon.text()}") from None

    @property
    def env(self) -> dict[str, str]:
        """The variables of subnet.env."""
        lines = self.subnet_file.read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    @property
    def subnet(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Interface(self.env["FLANNEL_SUBNET"]).network

    @property
    def subnet6(self) -> ipaddress.IPv6Network | None:
        text = self.env.get("FLANNEL_IPV6_SUBNET")
        return None if text is None else ipaddress.IPv6Interface(text).network

    @property
    def pod_v4(self) -> ipaddress.IPv4Address:
        return self.subnet[2]

    @property
    def pod_v6(self) -> ipaddress.IPv6Address | None:
        return None if self.subnet6 is None else self.subnet6[2]

    def add_pod(self) -> Host:
        """Create a pod in the node's subnets, with the overlay MTU in subnet.env.

        The node must be ready.
        """
        name = f"pod{next(self.host.lab.numbers)}"
        subnet6 = None if self.subnet6 is None else str(self.subnet6)
        self.pod = self.host.pod(
            str(self.subnet), subnet6, mtu=int(self.env["FLANNEL_MTU"]), name=name)
        return self.pod

    def remove_pod(self) -> None:
        # This also deletes the other end of the link, which is on the node.
        self.pod.ip(f"link del {self.pod.interfaces[0].name}")

    def ask(self, path: str) -> Any:
        """Send GET ``path`` to the forwarder's control socket; return the decoded answer."""
        return self._ask(self.control, path)

    def ask_node(self) -> Any:
        """Return the decoded answer of the node daemon's socket."""
        return self._ask(self.control.with_name("node.sock"), "/v1/node")

    def _ask(self, socket: Path, path: str) -> Any:
        status, answer = control_request(socket, "GET", path)
        if status != 200:
            raise LabError(f"GET {path} on {self.host.name}: {status} {answer}")
        return answer

    def forwarder_pid(self) -> int:
        pid: int = self.ask("/v1/status")["pid"]
        return pid

    def routes(self) -> set[str]:
        """Return the forwarder's routes, each as ``DST via IP``."""
        return {f"{route['dst']} via {route['via']}" for route in self.ask("/v1/routes")["routes"]}

    def stop(self) -> int:
        """Stop the daemon with SIGTERM; return its exit code. The forwarder keeps running."""
        self.daemon.signal(signal.SIGTERM)
        return self.daemon.wait()

    def clean_up(self) -> None:
        """Stop the daemon and the forwarder, and remove everything that they created."""
        self.stop()
        if self.forwarder is not None:
            self.forwarder.stop()
        self.host.run(self.argv("--cleanup"))


def start_all(members: Sequence[Member]) -> None:
    """Start nodes at the same time. Return when each node is ready and has a pod."""
    for member in members:
        member.start()
    for member in members:
        member.wait_ready()
        member.add_pod()


class Cluster:
    """Nodes and an etcd on one Ethernet segment. Before ``start`` is called, only etcd runs."""

    def __init__(
        self, lab: Lab, count: int, *, config: Mapping[str, Any] = NETWORK_CONFIG,
        options: Sequence[str] = (), external: bool = False,
    ) -> None:
        self.lab = lab
        hosts = [lab.host(f"n{number}") for number in range(1, count + 1)]
        store = lab.host("etcd")
        lab.segment(*hosts, store)
        self.etcd = Etcd(store)
        self.etcd.put(f"{PREFIX}/config", json.dumps(config))
        flags = [f"--etcd-endpoints={self.etcd.url}"]
        self.members = [Member(host, flags, tuple(options), external) for host in hosts]

    def start(self, members: Iterable[Member] | None = None) -> None:
        """Start nodes at the same time. Return when each node is ready and has a pod.

        members  the nodes to start; None: all nodes
        """
        start_all(self.members if members is None else list(members))


def unreachable(members: Sequence[Member], wait: float = 1.0) -> list[str]:
    """Ping once from every pod to every other pod; return the pairs without a reply."""
    failed = []
    for member in members:
        peers = {str(peer.pod_v4): peer for peer in members if peer is not member}
        pings = "".join(
            f"ping -n -q -c1 -W{wait:g} {address} >/dev/null || echo {address} & "
            for address in peers
        )
        silent = member.pod.run(["sh", "-c", f"{pings} wait"]).stdout.split()
        failed += [f"{member.host.name} -> {peers[address].host.name}" for address in silent]
    return failed
