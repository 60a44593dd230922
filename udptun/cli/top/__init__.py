"""``udptun top``: rates, drops and states, live in a terminal.

Owns the options and the loop. ``screen`` has the picture, ``terminal`` the terminal, ``samples``
the rates. Threading: a thread asks the node daemon and the forwarder, so that keys work while they
do not answer. The main thread does everything else.
"""

from __future__ import annotations

import os
import sys
import time
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING

import click

from ...errors import UdptunError
from ..options import client, connection, node_client, terminal_width
from ..samples import History, Sample, take
from .screen import DIRECTIONS, SORT, Screen
from .terminal import Ended, Terminal, has_utf8, obstacle

if TYPE_CHECKING:
    from ...control.client import ControlClient

SNAPSHOT_WIDTH = 120  # columns, if the output is not a terminal
REDRAW_SECONDS = 60.0  # the longest time between two pictures


@click.command()
@click.option("-d", "--interval", type=click.FloatRange(0.2, 60), default=1.0, show_default=True,
              help="Seconds between two samples.")
@click.option("-n", "--count", type=click.IntRange(1),
              help="Print this number of snapshots, and end. Needs no terminal.")
@click.option("--once", is_flag=True, help="The same as -n 1.")
@click.option("--sort", type=click.Choice(SORT), default="out", show_default=True,
              help="Order of the peers. state: the worst first. Numbers: the largest first.")
@click.option("--direction", type=click.Choice(DIRECTIONS), default="both", show_default=True,
              help="Direction of the rates that are shown.")
@click.option("--filter", "wanted", default="", metavar="TEXT",
              help="Show only the peers with this text in name, state, subnet or endpoint.")
@connection
@click.pass_context
def top(
    ctx: click.Context, interval: float, count: int | None, once: bool, sort: str, direction: str,
    wanted: str,
) -> None:
    """Show the rates of the peers, drops, and the load of the workers, live.

    The key ? shows the keys. The command asks the node daemon and the forwarder of this host. If
    the environment has NO_COLOR, it shows no colours.
    """
    count = 1 if once else count
    if count is None and (why := obstacle()):
        raise UdptunError(f"udptun top cannot draw here: {why}. `udptun top --once` prints a "
                          "snapshot")
    node, forwarder = node_client(ctx), client(ctx)
    history = History(interval)
    history.add(take(node, forwarder))
    screen = Screen(history, interval, sort, direction, wanted, styled=sys.stdout.isatty(),
                    colour=not os.environ.get("NO_COLOR"), utf8=has_utf8())
    screen.updated()
    try:
        if count is not None:
            _print(screen, history, node, forwarder, count)
        else:
            with Terminal(screen.utf8) as terminal:
                _run(terminal, screen, history, Asker(node, forwarder, interval))
    except Ended as exc:
        sys.exit(exc.code)
    except KeyboardInterrupt:
        sys.exit(130)


def _print(
    screen: Screen, history: History, node: ControlClient, forwarder: ControlClient, count: int
) -> None:
    """Print snapshots. Each has the rates since the sample before."""
    for number in range(count):
        time.sleep(screen.interval)
        history.add(take(node, forwarder))
        screen.updated()
        if number:
            click.echo()
        for line in screen.all_lines(terminal_width() or SNAPSHOT_WIDTH):
            click.echo(line)


class Asker:
    """Takes a sample every ``interval`` seconds, in a thread of its own.

    readable  a descriptor that is readable when there is a sample
    """

    def __init__(self, node: ControlClient, forwarder: ControlClient, interval: float) -> None:
        self._node, self._forwarder, self._interval = node, forwarder, interval
        self._found: SimpleQueue[Sample | Exception] = SimpleQueue()
        self._end = Event()
        self.readable, self._written = os.pipe()
        # It may wait for an answer when the program ends.
        self._thread = Thread(target=self._run, name="udptun-top-asker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic() + self._interval
        while not self._end.wait(max(due - time.monotonic(), 0)):
            due = max(due + self._interval, time.monotonic())
            try:
                self._found.put(take(self._node, self._forwarder))
            except Exception as exc:
                self._found.put(exc)
            os.write(self._written, b"x")

    def close(self) -> None:
        self._end.set()

    def results(self) -> list[Sample | str]:
        """Return the new samples. A string: why there was none. Raises other errors."""
        found: list[Sample | str] = []
        while not self._found.empty():
            one = self._found.get()
            os.read(self.readable, 1)
            if isinstance(one, Sample):
                found.append(one)
            elif isinstance(one, UdptunError):
                found.append(str(one))
            else:
                raise one
        return found


def _run(terminal: Terminal, screen: Screen, history: History, asker: Asker) -> None:
    """Draw and react until a key or a signal ends the program."""
    try:
        while True:
            terminal.draw(screen.lines(*terminal.size))
            for key in terminal.wait(REDRAW_SECONDS, asker.readable):
                if not screen.press(key):
                    return
            for found in asker.results():
                if isinstance(found, str):
                    history.add(None)
                    screen.updated(found)
                else:
                    history.add(found)
                    screen.updated()
    finally:
        asker.close()
