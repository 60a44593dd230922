"""The commands of flanneld's extension backend: they manage one forwarder and one route per peer.

Owns: the meaning of the environment and of the standard input of these commands. flanneld reads and
writes the leases. flanneld runs one command at a time and does not repeat a command that failed.
flanneld uses only the output of the command that prints the advertisement. Synchronous; one thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..control.client import ControlClient
from ..errors import FieldError, NoForwarder
from ..instance import Instance
from ..leases.advert import ECN, PROBE, Advert, embed, read
from ..model import DEFAULT_PORT, Endpoint, IPNetwork, Route, parse_next_hop, parse_prefix
from ..net.udp import keeps_marks, kernel_release
from .process.launch import (
    FORWARD_FILE,
    LOG_FILE,
    STATE_FILE,
    ForwarderSpec,
    NotStarted,
    spawn,
    wait_ready,
)

NO_SUBNET6 = ("", "::/0")  # flanneld's values for "no IPv6 subnet"

Environment = Mapping[str, str]


def advertisement(port: int, mtu: int | None) -> str:
    """Return one line for the lease, which the peers' ``udptun ext add`` reads."""
    features = {PROBE, ECN} if keeps_marks(kernel_release()) else {PROBE}
    advert = Advert(port, mtu, frozenset(features))
    return json.dumps(embed(None, advert), separators=(",", ":"))


def peer_route(env: Environment, advertised: str) -> Route:
    """Return the route to the peer that flanneld names in the environment.

    advertised  the output of the command that the peer ran to print its advertisement. If it
                contains no valid advertisement, the route uses the default port.
    Raises FieldError, which names the variable.
    """
    advert = read(advertised) or Advert(DEFAULT_PORT)
    via = parse_next_hop("PUBLIC_IP", _value(env, "PUBLIC_IP"))
    return Route(peer_subnet(env), via, advert.port, advert.mtu, PROBE in advert.features,
                 advert.source_ports, ecn=ECN in advert.features)


def peer_subnet(env: Environment) -> IPNetwork:
    return parse_prefix("SUBNET", _value(env, "SUBNET"))


def _value(env: Environment, name: str) -> str:
    if name not in env:
        raise FieldError(name, None, "a value: flanneld sets it for this command")
    return env[name]


@dataclass(frozen=True, slots=True)
class Extension:
    """The forwarder of a node on which flanneld manages the lease.

    spawned   True: we start the forwarder; False: another program starts the forwarder, with
              ``--wait-for`` and the path of ``forward_file``
    warn      prints a sentence for flanneld's log
    instance  the instance to which the forwarder belongs
    """

    control: Path
    state_dir: Path
    spawned: bool
    warn: Callable[[str], None]
    instance: Instance = field(default_factory=Instance)

    @property
    def forward_file(self) -> Path:
        return self.control.with_name(FORWARD_FILE)

    @property
    def log(self) -> Path:
        return self.state_dir / LOG_FILE

    def up(self, env: Environment, tun: str, listen: Endpoint | None, port: int,
           mtu: int | None) -> None:
        """Start or restart the forwarder with the options for this node's lease.

        A forwarder that already runs with these options is not restarted.

        listen  the endpoint to listen on, needed if PUBLIC_IP is not an address of this host; None:
                PUBLIC_IP and ``port``
        Raises FieldError, NotStarted, ControlError, OSError.
        """
        subnet = peer_subnet(env)
        spec = ForwarderSpec(
            control=str(self.control),
            listen=(str(listen or _endpoint(env, port)),),
            addresses=(str(subnet.network_address),),
            networks=(str(parse_prefix("NETWORK", _value(env, "NETWORK"))),),
            tun=tun,
            state=str(self.state_dir / STATE_FILE),
            mtu=mtu,
        )
        if env.get("IPV6SUBNET", "") not in NO_SUBNET6:
            self.warn("the extension backend does not pass on the peers' IPv6 subnets: "
                      "only IPv4 is carried")
        spec.write(self.forward_file)  # first, because a forwarder with --wait-for reads it
        with ControlClient(str(self.control)) as client:
            self._ensure_running(client, spec)
            client.delete(subnet)  # the saved table may have a route to a peer that had our subnet

    def _ensure_running(self, client: ControlClient, spec: ForwarderSpec) -> None:
        try:
            why = spec.mismatch(client.status(peers=False))
        except NoForwarder:
            self._start(client, spec)
            return
        if why:
            self.warn(f"the forwarder is restarted: {why}")
            client.stop()
            self._start(client, spec)

    def _start(self, client: ControlClient, spec: ForwarderSpec) -> None:
        child = None
        if self.spawned:
            if "INVOCATION_ID" in os.environ:
                self.warn("flanneld runs in a systemd unit. The forwarder ends with this unit, "
                          "unless the unit has KillMode=process. Better run the forwarder in a "
                          "unit of its own, and set UDPTUN_EXT_FORWARDER=external for flanneld")
            child = spawn(self.forward_file, self.log, self.instance, to_stderr=False)
        wait_ready(client, spec, child, self.log)

    def add(self, route: Route) -> None:
        """Set the route to a peer's subnet. The route replaces a former route to the subnet."""
        self._while_running(lambda client: client.put(route))

    def remove(self, subnet: IPNetwork) -> None:
        self._while_running(lambda client: client.delete(subnet))

    def _while_running(self, change: Callable[[ControlClient], object]) -> None:
        """Apply a change. If the forwarder has ended, start it first.

        flanneld does not repeat a failed command, so the change must not be lost.
        """
        with ControlClient(str(self.control)) as client:
            try:
                change(client)
            except NoForwarder:
                try:
                    spec = ForwarderSpec.read(self.forward_file)
                except FileNotFoundError:
                    raise NotStarted(f"no forwarder answers on {self.control}, and there is no "
                                     f"{self.forward_file}: run `udptun ext up` first") from None
                self._start(client, spec)
                change(client)


def _endpoint(env: Environment, port: int) -> Endpoint:
    return Endpoint(parse_next_hop("PUBLIC_IP", _value(env, "PUBLIC_IP")), port)
