"""``udptun web``: a page that shows what this node has measured.

Owns the options and the life of the process. ``server`` answers HTTP, ``page`` and ``picture``
have the content, ``static/`` the style, the script and the icon. The process gives up all
capabilities. It has no request that changes something. Threading: one loop; a thread asks the node
daemon and the forwarder.
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...errors import DeviceError, UdptunError
from ..options import Parsed, connection, control_path

if TYPE_CHECKING:
    from ...model import Endpoint

DEFAULT_PORT = 8287  # not that of the health checks in deploy/
DEFAULT_LISTEN = f"127.0.0.1:{DEFAULT_PORT}"


def _listen(text: str) -> Endpoint:
    from ...model import Endpoint

    return Endpoint.parse(text, "--listen", DEFAULT_PORT)


@click.command()
@click.option("--listen", type=Parsed("address[:port]", _listen), default=DEFAULT_LISTEN,
              show_default=True,
              help="Address and port of the page. Only a loopback address is private to this host.")
@click.option("--host", "names", multiple=True, metavar="NAME",
              help="Accept requests to this host name; may be repeated. Addresses and localhost "
                   "are always accepted.")
@connection
@click.pass_context
def web(ctx: click.Context, listen: Endpoint, names: tuple[str, ...]) -> None:
    """Serve a page with the peers, paths, rates, drops and events, until Ctrl-C.

    The page shows what this node has measured. It cannot change anything. It has no password:
    everyone who can connect to the address can read the page.
    """
    asyncio.run(_serve(listen, names, Path(control_path(ctx))))


async def _serve(listen: Endpoint, names: tuple[str, ...], control: Path) -> None:
    from ...privileges import Needs, keep_only
    from .server import WebServer
    from .watch import Watch

    server = WebServer(Watch(control), names)
    try:
        await server.start(listen)
    except OSError as exc:
        raise DeviceError(exc.errno, f"--listen: {listen}: {exc.strerror}") from exc
    try:
        # The socket may belong to another user.
        keep_only(Needs(use=frozenset(), write=(control,)))
    except OSError as exc:
        raise UdptunError(f"giving up capabilities: {exc.strerror}") from exc
    end, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end.set)
    if listen.address.is_loopback:
        click.echo("the page has no password: every user of this host can read it", err=True)
    else:
        click.echo(f"warning: every host that reaches {listen.address} can read the page, and the "
                   "networks between can change it", err=True)
    click.echo(f"the page is at http://{listen}/; Ctrl-C ends it")
    try:
        await end.wait()
    finally:
        await server.close()
