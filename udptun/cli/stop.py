"""``udptun stop``."""

import click

from .options import client, connection


@click.command()
@connection
@click.pass_context
def stop(ctx: click.Context) -> None:
    """Stop the forwarder: it sends what it has, removes what it made and exits.

    Returns when the forwarder has closed its socket.
    """
    client(ctx).stop()
