"""What flanneld's extension backend asks for: a forwarder, and one route per peer.

Owns: what the environment and the standard input of flanneld's commands mean. Refuses to know:
leases and stores, which are flanneld's here. flanneld runs one command at a time, tries none
again, and forgets what it printed, unless it is the one that advertises. Synchronous; one thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..control.client import ControlClient
from ..errors import FieldError, NoForwarder
from ..leases.advert import Advert, embed, read
from ..leases.base import Attributes
from ..model import DEFAULT_PORT, Endpoint, IPNetwork, Route, parse_next_hop, parse_prefix
from .process.launch import FORWARD_FILE, LOG_FILE, ForwarderSpec, NotStarted, spawn, wait_ready

STATE_FILE = "routes"
NO_SUBNET6 = ("", "::/0")  # what flanneld says where there is none

Environment = Mapping[str, str]


def advertisement(port: int, mtu: int | None) -> str:
    """One line for the lease, to be read by the peers' ``udptun ext add``."""
    return json.dumps(embed(None, Advert(port, mtu)), separators=(",", ":"))


def peer_route(env: Environment, advertised: str) -> Route:
    """The route to the peer that flanneld names. FieldError names the variable.

    advertised  what the peer's own command printed; a peer that says nothing of use listens where
                everybody does
    """
    advert = read(Attributes(backend_data=advertised)) or Advert(DEFAULT_PORT)
    via = parse_next_hop("PUBLIC_IP", _said(env, "PUBLIC_IP"))
    return Route(peer_subnet(env), via, advert.port, advert.mtu)


def peer_subnet(env: Environment) -> IPNetwork:
    return parse_prefix("SUBNET", _said(env, "SUBNET"))


def _said(env: Environment, name: str) -> str:
    if name not in env:
        raise FieldError(name, None, "a value: flanneld sets it for this command")
    return env[name]


@dataclass(frozen=True, slots=True)
class Extension:
    """The forwarder of a node whose leases a flanneld keeps.

    spawned  False: somebody else starts the forwarder, with ``--wait-for`` on our file
    say      takes a sentence for whoever reads flanneld's log
    """

    control: Path
    state_dir: Path
    spawned: bool
    say: Callable[[str], None]

    @property
    def forward_file(self) -> Path:
        return self.control.with_name(FORWARD_FILE)

    @property
    def log(self) -> Path:
        return self.state_dir / LOG_FILE

    def up(self, env: Environment, tun: str, listen: Endpoint | None, port: int,
           mtu: int | None) -> None:
        """See that a forwarder runs which has this node's lease; one that has it is left alone.

        listen  where PUBLIC_IP is not an address of this host
        Raises FieldError, NotStarted, ControlError, OSError.
        """
        subnet = peer_subnet(env)
        spec = ForwarderSpec(
            control=str(self.control),
            listen=(str(listen or _endpoint(env, port)),),
            addresses=(str(subnet.network_address),),
            networks=(str(parse_prefix("NETWORK", _said(env, "NETWORK"))),),
            tun=tun,
            state=str(self.state_dir / STATE_FILE),
            mtu=mtu,
        )
        if env.get("IPV6SUBNET", "") not in NO_SUBNET6:
            self.say("the extension backend tells nothing of the peers' IPv6 subnets: "
                     "only IPv4 is carried")
        spec.write(self.forward_file)  # first: who waits for it starts on it
        with ControlClient(str(self.control)) as client:
            self._make_it_run(client, spec)
            client.delete(subnet)  # a former holder's, from a state that was kept

    def _make_it_run(self, client: ControlClient, spec: ForwarderSpec) -> None:
        try:
            why = spec.misfit(client.status(peers=False))
        except NoForwarder:
            self._start(client, spec)
            return
        if why:
            self.say(f"the forwarder is started anew: {why}")
            client.stop()
            self._start(client, spec)

    def _start(self, client: ControlClient, spec: ForwarderSpec) -> None:
        child = None
        if self.spawned:
            if "INVOCATION_ID" in os.environ:
                self.say("started by a systemd unit, the forwarder ends with that unit unless it "
                         "has KillMode=process: better give it a unit of its own, "
                         "see --forwarder external")
            child = spawn(self.forward_file, self.log)
        wait_ready(client, spec, child, self.log)

    def add(self, route: Route) -> None:
        """Route a peer's subnet, instead of where it was routed to before."""
        self._when_it_runs(lambda client: client.put(route))

    def remove(self, subnet: IPNetwork) -> None:
        self._when_it_runs(lambda client: client.delete(subnet))

    def _when_it_runs(self, change: Callable[[ControlClient], object]) -> None:
        """flanneld does not try again, so a forwarder that is gone is brought back first."""
        with ControlClient(str(self.control)) as client:
            try:
                change(client)
            except NoForwarder:
                try:
                    spec = ForwarderSpec.read(self.forward_file)
                except FileNotFoundError:
                    raise NotStarted(f"no forwarder answers on {self.control}, and there is no "
                                     f"{self.forward_file}: `udptun ext up` comes first") from None
                self._start(client, spec)
                change(client)


def _endpoint(env: Environment, port: int) -> Endpoint:
    return Endpoint(parse_next_hop("PUBLIC_IP", _said(env, "PUBLIC_IP")), port)
