"""``udptun ext``: the commands that an unmodified flanneld runs, its backend being ``extension``.

Owns their words and what they print. flanneld takes all that they print, errors too, and the first
of them becomes part of the lease: no command prints anything when all is well, and that one
nothing but the lease's line.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import FieldError, UdptunError
from .lazy import failure_of
from .options import LISTEN, socket

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..model import Endpoint
    from ..node.extension import Extension

DEFAULT_STATE_DIR = "/var/lib/udptun"


# The commands stand in the network's configuration, the same for all nodes; what is special to one
# node can stand in the environment of its flanneld.
_port = click.option(
    "--port", type=click.IntRange(1, 65535), default=8285, show_default=True,
    envvar="UDPTUN_EXT_PORT", show_envvar=True, help="UDP port of this node.",
)
_mtu = click.option(
    "--mtu", type=click.IntRange(576, 65535), envvar="UDPTUN_EXT_MTU", show_envvar=True,
    help="Largest packet to and from this node.  [default: the underlay's MTU, less 28]",
)
_state_dir = click.option(
    "--state-dir", type=click.Path(path_type=Path), default=DEFAULT_STATE_DIR, show_default=True,
    envvar="UDPTUN_EXT_STATE_DIR", show_envvar=True,
    help="Where the forwarder keeps its routes and its log.",
)
_forwarder = click.option(
    "--forwarder", type=click.Choice(["spawn", "external"]), default="spawn", show_default=True,
    envvar="UDPTUN_EXT_FORWARDER", show_envvar=True,
    help="Start the forwarder, or wait for one that somebody else starts with --wait-for on "
         "forward.json beside the control socket.",
)


@click.group()
def ext() -> None:
    """Commands for flanneld's extension backend.

    They stand in flannel's network configuration, and flanneld runs them. See docs/flannel.md.
    """


@ext.command()
@_port
@_mtu
def advertise(port: int, mtu: int | None) -> None:
    """Print what the peers shall know of this node (PreStartupCommand)."""
    from ..node.extension import advertisement

    click.echo(advertisement(port, mtu))


@ext.command()
@click.option("--tun", default="udptun0", show_default=True, help="Name of the TUN device.")
@click.option("--listen", type=LISTEN, envvar="UDPTUN_EXT_LISTEN",
              show_envvar=True, help="Where to listen, if PUBLIC_IP is not of this host.")
@_port
@_mtu
@_state_dir
@_forwarder
@socket
@click.pass_context
def up(
    ctx: click.Context, tun: str, listen: Endpoint | None, port: int, mtu: int | None,
    state_dir: Path, forwarder: str,
) -> None:
    """See that a forwarder runs with this node's lease (PostStartupCommand).

    Reads NETWORK, SUBNET and PUBLIC_IP. A forwarder that has the lease already is left alone; it
    goes on when flanneld ends.
    """
    extension = _extension(ctx, state_dir, forwarder)
    _do(lambda: extension.up(os.environ, tun, listen, port, mtu))


@ext.command()
@_state_dir
@_forwarder
@socket
@click.pass_context
def add(ctx: click.Context, state_dir: Path, forwarder: str) -> None:
    """Route a peer's subnet to the peer (SubnetAddCommand).

    Reads SUBNET and PUBLIC_IP, and on standard input what the peer advertises. A route that the
    subnet had before is replaced.
    """
    from ..node.extension import peer_route

    extension = _extension(ctx, state_dir, forwarder)
    _do(lambda: extension.add(peer_route(os.environ, sys.stdin.read())))


@ext.command()
@_state_dir
@_forwarder
@socket
@click.pass_context
def remove(ctx: click.Context, state_dir: Path, forwarder: str) -> None:
    """Take the route of a peer's subnet away (SubnetRemoveCommand). Reads SUBNET."""
    from ..node.extension import peer_subnet

    extension = _extension(ctx, state_dir, forwarder)
    _do(lambda: extension.remove(peer_subnet(os.environ)))


def _extension(ctx: click.Context, state_dir: Path, forwarder: str) -> Extension:
    from ..node.extension import Extension

    return Extension(
        Path(ctx.find_root().params["socket"]).absolute(), state_dir.absolute(),
        spawned=forwarder == "spawn", say=lambda text: click.echo(f"udptun: {text}", err=True),
    )


def _do(work: Callable[[], None]) -> None:
    try:
        work()
    except FieldError as exc:
        raise click.UsageError(str(exc)) from exc
    except (UdptunError, OSError) as exc:
        raise failure_of(exc) from exc
