"""``udptun ext``: the commands that an unmodified flanneld with the extension backend runs.

Owns the options and the output of the commands. flanneld reads all output, including errors. It
puts the output of the first command into the lease. So ``advertise`` prints only the line for the
lease, and the other commands print nothing except errors.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import FieldError, UdptunError
from ..instance import Instance
from ..model import DEFAULT_PORT, MAX_MTU, MAX_PORT, MIN_TUN_MTU
from .lazy import failure_of
from .options import LISTEN, connection, instance_of, named_socket

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..model import Endpoint
    from ..node.extension import Extension

# The commands are part of the network's configuration, so they are the same for all nodes. To set
# an option for a single node, use the environment of the node's flanneld.
_port = click.option(
    "--port", type=click.IntRange(1, MAX_PORT), default=DEFAULT_PORT, show_default=True,
    envvar="UDPTUN_EXT_PORT", show_envvar=True, help="UDP port of this node.",
)
_mtu = click.option(
    "--mtu", type=click.IntRange(MIN_TUN_MTU, MAX_MTU), envvar="UDPTUN_EXT_MTU", show_envvar=True,
    help="Largest packet to and from this node.  [default: the underlay's MTU, less 28]",
)
_state_dir = click.option(
    "--state-dir", type=click.Path(path_type=Path), envvar="UDPTUN_EXT_STATE_DIR",
    show_envvar=True,
    help=f"Directory for the forwarder's routes and log.  [default: {Instance().state_dir}]",
)
_forwarder = click.option(
    "--forwarder", type=click.Choice(["spawn", "external"]), default="spawn", show_default=True,
    envvar="UDPTUN_EXT_FORWARDER", show_envvar=True,
    help="spawn: start the forwarder; external: wait for one that another program starts with "
         "--wait-for and forward.json in the directory of the control socket.",
)


@click.group()
def ext() -> None:
    """Commands for flanneld's extension backend.

    flannel's network configuration contains them, and flanneld runs them. See docs/flannel.md.
    """


@ext.command()
@_port
@_mtu
def advertise(port: int, mtu: int | None) -> None:
    """Print this node's advertisement for its peers (PreStartupCommand)."""
    from ..node.extension import advertisement

    click.echo(advertisement(port, mtu))


@ext.command()
@click.option("--tun", help=f"Name of the TUN device.  [default: {Instance().tun}]")
@click.option("--listen", type=LISTEN, envvar="UDPTUN_EXT_LISTEN", show_envvar=True,
              help="Address to listen on, if PUBLIC_IP is not an address of this host.")
@_port
@_mtu
@_state_dir
@_forwarder
@connection
@click.pass_context
def up(
    ctx: click.Context, tun: str | None, listen: Endpoint | None, port: int, mtu: int | None,
    state_dir: Path | None, forwarder: str,
) -> None:
    """Make a forwarder run with this node's lease (PostStartupCommand).

    Reads NETWORK, SUBNET and PUBLIC_IP. If a forwarder with this lease runs already, the command
    does not change it. The forwarder keeps running when flanneld ends.
    """
    extension = _extension(ctx, state_dir, forwarder)
    _do(lambda: extension.up(os.environ, tun or extension.instance.tun, listen, port, mtu))


@ext.command()
@_state_dir
@_forwarder
@connection
@click.pass_context
def add(ctx: click.Context, state_dir: Path | None, forwarder: str) -> None:
    """Route a peer's subnet to the peer (SubnetAddCommand).

    Reads SUBNET and PUBLIC_IP, and the peer's advertisement on standard input. An older route to
    the subnet is replaced.
    """
    from ..node.extension import peer_route

    extension = _extension(ctx, state_dir, forwarder)
    _do(lambda: extension.add(peer_route(os.environ, sys.stdin.read())))


@ext.command()
@_state_dir
@_forwarder
@connection
@click.pass_context
def remove(ctx: click.Context, state_dir: Path | None, forwarder: str) -> None:
    """Remove the route of a peer's subnet (SubnetRemoveCommand). Reads SUBNET."""
    from ..node.extension import peer_subnet

    extension = _extension(ctx, state_dir, forwarder)
    _do(lambda: extension.remove(peer_subnet(os.environ)))


def _extension(ctx: click.Context, state_dir: Path | None, forwarder: str) -> Extension:
    from ..node.extension import Extension

    instance = instance_of(ctx)
    return Extension(
        (named_socket(ctx) or instance.control_socket()).absolute(),
        (state_dir or instance.state_dir).absolute(), spawned=forwarder == "spawn",
        warn=lambda text: click.echo(f"udptun: {text}", err=True), instance=instance,
    )


def _do(work: Callable[[], None]) -> None:
    try:
        work()
    except FieldError as exc:
        raise click.UsageError(str(exc)) from exc
    except (UdptunError, OSError) as exc:
        raise failure_of(exc) from exc
