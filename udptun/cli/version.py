"""``udptun version``."""

import click

from .._version import __version__
from .options import echo_json, output


@click.command()
@output
def version(output: str) -> None:
    """Show the version of this program. `udptun status` shows a running forwarder's."""
    if output == "json":
        echo_json({"version": __version__})
    else:
        click.echo(f"udptun {__version__}")
