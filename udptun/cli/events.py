"""``udptun events``: the events of the node daemon and of the forwarder, in one stream by time.

Owns the order, the names of the peers, and the text of a line. Both processes keep their recent
events and send new ones. Threading: with ``-w``, one thread per process reads its stream; the main
thread prints.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ..errors import ControlError, NoForwarder, UdptunError
from ..text import printable
from .answers import ask_node
from .mesh import mesh
from .options import client, connection, node_client, output

if TYPE_CHECKING:
    from ..control.client import ControlClient

Event = dict[str, Any]

SOURCES = ("node", "forwarder")
HELLO = "hello"
AGAIN_SECONDS = 2.0  # until a stream that has ended is opened again
TEXT_MAX = 2000  # characters of the text of an event
NAMES_SECONDS = 5.0  # the shortest time between two requests for the names of the peers


@click.command()
@click.option("-w", "--watch", is_flag=True, help="Show new events as they happen, until Ctrl-C.")
@output
@connection
@click.pass_context
def events(ctx: click.Context, watch: bool, output: str) -> None:
    """Show the recent events of the node daemon and of the forwarder, or with -w new ones.

    As JSON: one object per line. The first is a "hello" with the generation of the route table, if
    the forwarder answers. "source" says which of the two reports the event.
    """
    clients = {"node": node_client(ctx), "forwarder": client(ctx)}
    names = Names(clients["node"])
    found = _follow(clients) if watch else _recent(clients)
    try:
        for event in found:
            if output == "json":
                click.echo(json.dumps(names.add(event)))
            elif event["type"] != HELLO:
                click.echo(event_line(names.add(event)))
    except KeyboardInterrupt:
        sys.exit(130)  # Ctrl-C is the normal end; shells use this exit code for it


def _recent(clients: dict[str, ControlClient]) -> Iterator[Event]:
    """Yield one hello, then the recent events by time. Raises NoForwarder if neither answers."""
    found: dict[str, list[Event]] = {}
    for source in SOURCES:
        try:
            found[source] = list(clients[source].events(follow=False))
        except (NoForwarder, ControlError):
            if source == SOURCES[-1] and not found:
                raise
    for source in reversed(found):  # the forwarder's hello has the generation
        yield found[source][0]
        break
    yield from sorted(
        (event | {"source": source} for source, events in found.items() for event in events[1:]),
        key=lambda event: event["time"])


def _follow(clients: dict[str, ControlClient]) -> Iterator[Event]:
    """Yield one hello, then new events as they come. Raises NoForwarder if neither answers.

    End when both streams have ended. While one of them lasts, the other one is opened again.
    """
    arrived: queue.SimpleQueue[tuple[str, Event | UdptunError | None]] = queue.SimpleQueue()
    threads = {}
    for source in SOURCES:
        threads[source] = threading.Thread(
            target=_read, args=(source, clients[source].path, arrived), daemon=True)
        threads[source].start()
    waiting, alive = set(SOURCES), set(SOURCES)
    hello: dict[str, Event] = {}
    held: list[Event] = []  # until both have answered or failed
    error = None
    while True:
        source, event = arrived.get()
        if not isinstance(event, dict):
            alive.discard(source)
            error = event if source == SOURCES[-1] else error
        elif event["type"] == HELLO:
            alive.add(source)
            hello[source] = event
        else:
            held.append(event | {"source": source})
        if source in waiting:
            waiting.remove(source)
            if not waiting and hello:
                yield hello.get(SOURCES[-1]) or hello[SOURCES[0]]  # the forwarder's hello
        if not waiting:
            yield from held
            held.clear()
        if not alive:
            if error is not None and not hello:
                raise error
            return


def _read(
    source: str, path: str,
    arrived: queue.SimpleQueue[tuple[str, Event | UdptunError | None]],
) -> None:
    """Pass on the events of one process. Open the stream again whenever it ends, and pass on its
    error, or None. The client is made in this thread, so that no other thread closes it during a
    read."""
    from ..control.client import ControlClient

    client = ControlClient(path)
    while True:
        try:
            for event in client.events(follow=True):
                arrived.put((source, event))
            arrived.put((source, None))
        except (NoForwarder, ControlError) as exc:  # ControlError: an older version
            arrived.put((source, exc))
        time.sleep(AGAIN_SECONDS)


class Names:
    """The names of the peers, by endpoint or by subnet."""

    def __init__(self, node: ControlClient) -> None:
        self._node = node
        self._known: dict[str, str] = {}
        self._asked = float("-inf")

    def add(self, event: Event) -> Event:
        """Return the event with the name of its peer, if the node daemon knows it."""
        key = event.get("endpoint") or event.get("dst")
        if key is None or "peer" in event:
            return event
        if key not in self._known and time.monotonic() > self._asked + NAMES_SECONDS:
            self._ask()
        return event | {"peer": self._known[key]} if key in self._known else event

    def _ask(self) -> None:
        from ..control.client import ControlClient

        self._asked = time.monotonic()
        # A client of its own: the other one may be reading a stream.
        with ControlClient(self._node.path, NAMES_SECONDS) as node:
            rows = mesh(ask_node(node), [])
        for row in rows:
            self._known |= dict.fromkeys([*row["subnets"], *row["endpoints"]], row["name"])


def event_line(event: Event) -> str:
    words = f"{event['time']}  {event.get('source', ''):<9}  {event['type']:<16}  "
    return words + event_text(event)


def event_text(event: Event) -> str:
    """Return the text of an event, without its time, source and type: the peer first."""
    rest = {k: v for k, v in event.items() if k not in ("time", "type", "source")}
    words = [text for name in ("peer", "dst", "check", "message") if (text := rest.pop(name, ""))]
    words += [f"{k} {_word(v)}" for k, v in rest.items() if v not in (None, "")]
    return printable(" ".join(words), TEXT_MAX)


def _word(value: object) -> object:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
