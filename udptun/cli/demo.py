"""``udptun demo``. Owns its options; the steps are in ``udptun.lab.demo``."""

import sys

import click


@click.command()
@click.option(
    "--seconds", type=click.IntRange(1, 600), default=4, show_default=True,
    help="How long each TCP measurement runs.",
)
def demo(seconds: int) -> None:
    """Two hosts and a tunnel between them, made, measured and removed here and now.

    Makes hosts as network namespaces, starts a forwarder on each from a route file, pings, moves
    TCP, and compares with the kernel's VXLAN. Needs root. Leaves nothing behind.
    """
    from ..lab.demo import run

    sys.exit(run(seconds))
