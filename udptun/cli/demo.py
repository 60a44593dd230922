"""``udptun demo``. Owns its options. The steps of the demo are in ``udptun.lab.demo``."""

import sys

import click


@click.command()
@click.option(
    "--seconds", type=click.IntRange(1, 600), default=4, show_default=True,
    help="How long each TCP measurement runs.",
)
def demo(seconds: int) -> None:
    """Create a tunnel between two temporary hosts on this machine, and measure it.

    The hosts are network namespaces, each with a forwarder that reads a route file. The demo sends
    pings, measures the TCP throughput, and compares it with the kernel's VXLAN. It needs root, and
    removes everything at the end.
    """
    from ..lab.demo import run

    sys.exit(run(seconds))
