"""The ``udptun`` command: one module per group of subcommands, imported when it is called.

A client command imports little more than click and http.client, so that it may run once per peer
in a script. What a command needs beyond that, it imports inside.
"""

import click

from .._version import __version__
from .lazy import LazyGroup
from .options import DEFAULT_SOCKET

COMMANDS = {
    "forward": (".forward:forward", "Run a forwarder on this host."),
    "node": (".node:node", "Make this machine a node of an overlay, and keep it one."),
    "route": (".route:route", "List and change the routes of a running forwarder."),
    "status": (".show:status", "Show the device, its peers and the packet counts."),
    "drops": (".show:drops", "Show how many packets were dropped, and why."),
    "events": (".show:events", "Show the latest events, or follow them with -w."),
    "trace": (".show:trace", "Show what happens to a packet to ADDRESS."),
    "stop": (".stop:stop", "Stop a running forwarder."),
    "ext": (".ext:ext", "Commands for flanneld's extension backend."),
    "demo": (".demo:demo", "Show a tunnel between two hosts made for the purpose."),
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
    "--socket", "socket", default=DEFAULT_SOCKET, show_default=True, show_envvar=True,
    metavar="PATH", help="Where the forwarder answers. Client commands take it, too.",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli(socket: str) -> None:
    """Carry IP packets between hosts over UDP, on flannel's wire format.

    Start a forwarder on each host with `udptun forward`, tell each of them with `udptun route`
    which subnets its peers have, and look at them with `udptun status`.
    """


def main() -> None:
    cli(prog_name="udptun")
