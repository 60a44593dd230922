"""The ``udptun`` command. Each subcommand's module is imported when the subcommand is called.

A client command imports little more than click and http.client. So it starts fast, and a script can
run one command per peer. A command makes its other imports inside its functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .._version import __version__
from .lazy import LazyGroup
from .options import INSTANCE

if TYPE_CHECKING:
    from ..instance import Instance

COMMANDS = {
    "forward": (".forward:forward", "Run a forwarder on this host."),
    "node": (".node:node", "Run the node daemon: join this host to an overlay network."),
    "route": (".route:route", "List and change the routes of a running forwarder."),
    "status": (".status:status", "Show the node, the device, the peers and the packet counts."),
    "peers": (".show:peers", "Show for each peer whether it answers probes, and how fast."),
    "top": (".top:top", "Show rates, drops and states of the peers, live."),
    "web": (".web:web", "Serve a page with peers, paths, rates, drops and events."),
    "drops": (".show:drops", "Show how many packets were dropped, and why."),
    "capture": (".capture:capture", "Record packets with the reason of each drop, as pcapng."),
    "events": (".events:events", "Show what has happened, or follow it with -w."),
    "ping": (".ping:ping", "Measure the path to a node or an address."),
    "trace": (".trace:trace", "Show what happens to a packet to ADDRESS, in the kernel and here."),
    "doctor": (".doctor:doctor", "Find out what is wrong with the tunnel, and what to do."),
    "report": (".report:report", "Write one file with the state of this host, for a bug report."),
    "stop": (".stop:stop", "Stop a running forwarder."),
    "cni": (".cni:cni", "Attach pods: the CNI plugin, started by a container runtime."),
    "ext": (".ext:ext", "Commands for flanneld's extension backend."),
    "demo": (".demo:demo", "Show a tunnel between two temporary hosts on this machine."),
    "version": (".version:version", "Show the version."),
}


@click.group(
    cls=LazyGroup,
    commands_at=COMMANDS,
    context_settings={
        "auto_envvar_prefix": "UDPTUN",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
)
@click.option(
    "--socket", metavar="PATH", show_envvar=True,
    help="Control socket of the forwarder; also after the command's name.",
)
@click.option(
    "--instance", type=INSTANCE, show_envvar=True,
    help="Instance of udptun on this host; also after the command's name.  [default: udptun]",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli(socket: str | None, instance: Instance | None) -> None:
    """Tunnel IP packets between hosts over UDP, in flannel's wire format.

    Run `udptun forward` on each host, add a route for each peer's subnet with `udptun route`, and
    inspect the tunnel with `udptun status`. `udptun node` does all of this from a shared store.
    """


def main() -> None:
    cli(prog_name="udptun")
