"""``udptun stop``."""

import click

from .options import client, connection


@click.command()
@connection
@click.pass_context
def stop(ctx: click.Context) -> None:
    """Stop the forwarder: it sends the queued packets, removes its device and sockets, and exits.

    Returns when the forwarder has ended.
    """
    client(ctx).stop()
