"""``udptun forward``: check the options, run a forwarder, listen to signals.

Owns the words of the command line and what signals mean. Refuses to know how a packet moves.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..control.protocol import DEFAULT_SOCKET
from ..errors import FieldError, UdptunError
from . import logs
from .lazy import Failure, failure_of
from .options import LISTEN, Parsed
from .wait import take_options

if TYPE_CHECKING:
    from ..device.offload import OffloadRequest
    from ..forwarder import Forwarder, ForwarderConfig
    from ..model import IPAddress, IPNetwork

log = logging.getLogger("udptun")

MAX_TUN_NAME = 15  # linux/if.h IFNAMSIZ, less the closing zero


def tun_name(text: str) -> str:
    if not 0 < len(text.encode()) <= MAX_TUN_NAME or not text.isprintable() or (
        any(c in text for c in "/: ") or text in (".", "..")  # linux net/core/dev.c dev_valid_name
    ):
        raise FieldError("--tun", text, f"a device name of up to {MAX_TUN_NAME} characters")
    return text


def _address(text: str) -> IPAddress:
    from ..model import parse_address

    return parse_address("--address", text)


def _network(text: str) -> IPNetwork:
    from ..model import parse_prefix

    return parse_prefix("--network", text)


def _auto_or_number(text: str) -> int | None:
    """None for auto. Which numbers make sense is for ForwarderConfig to say."""
    from ..model import parse_number

    if text == "auto":
        return None
    try:
        return parse_number("", text, 0, 65535)
    except FieldError:
        raise FieldError("", text, "auto or a whole number") from None


def _offload(text: str) -> OffloadRequest:
    from ..device.offload import OffloadRequest

    return OffloadRequest.parse(text)


def default_control() -> str:
    """Where a service manager gave us a directory to run in, else the usual place."""
    directory = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return str(Path(directory) / "udptun.sock") if directory else DEFAULT_SOCKET


FILE = click.Path(path_type=Path)
FIELDS = {
    "address": "addresses", "network": "networks", "routes": "routes_file", "state": "state_file",
}


@click.command()
@click.option("--tun", type=Parsed("name", tun_name), default="udptun0", show_default=True,
              help="Name of the TUN device to make.")
@click.option("--address", type=Parsed("address", _address), multiple=True,
              help="Overlay address of this host, on the TUN as /32 or /128. Once per family.")
@click.option("--network", type=Parsed("prefix", _network), multiple=True,
              help="Overlay network, which gets a route through the TUN. May be repeated.")
@click.option("--listen", type=LISTEN, multiple=True,
              required=True,
              help="Underlay address and UDP port of this host. Once per family.")
@click.option("--control", type=FILE, default=default_control, metavar="PATH",
              help="Control socket to make.  [default: udptun.sock in $RUNTIME_DIRECTORY "
                   "or /run/udptun]")
@click.option("--routes", type=FILE, metavar="FILE",
              help="Route file to start with; read again on SIGHUP.")
@click.option("--mtu", type=Parsed("auto|n", _auto_or_number), default="auto", show_default=True,
              help="MTU of the TUN. auto: the underlay's, less 28 over IPv4 or 48 over IPv6.")
@click.option("--workers", type=Parsed("n|auto", _auto_or_number), default="1", show_default=True,
              help="Threads that forward, each with its own TUN queue and UDP socket.")
@click.option("--offload", type=Parsed("auto|off|list", _offload), default="auto",
              show_default=True,
              help="Which offloads to try: auto, off, or e.g. auto,-udp-merge,-udp-gso.")
@click.option("--source-check", type=click.Choice(["strict", "peer", "off"]), default="strict",
              show_default=True,
              help="Whom to take packets from. strict: a known peer, and only from inner "
                   "addresses routed to it; peer: any known peer; off: anybody.")
@click.option("--state", type=FILE, metavar="FILE",
              help="Keep the route table in FILE, and start with it.")
@click.option("--flannel-control", type=FILE, metavar="PATH",
              help="SOCK_SEQPACKET socket to make for flannel's own control messages.")
@click.option("--flannel-control-fd", type=click.IntRange(min=0), metavar="N",
              help="The same on an inherited descriptor.")
@click.option("--wait-for", type=FILE, metavar="FILE", is_eager=True,
              callback=take_options,
              help="Wait until FILE is there, and take the options from it that are not given "
                   "here: a JSON object, keyed as these options are.")
@click.option("-v", "--verbose", count=True, help="Log more; twice: tracebacks, too.")
def forward(verbose: int, wait_for: Path | None, **values: Any) -> None:
    """Run a forwarder: make the TUN device, and carry its packets to peers and back.

    SIGTERM or Ctrl-C sends what is queued, removes what was made and exits; a second one exits
    at once. SIGHUP reads the route file again, SIGUSR1 logs the state.
    """
    logs.start(verbose)
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they mean nothing yet, least of all death
    try:
        _run(_config(values, wait_for))
    except (UdptunError, OSError, ImportError) as exc:
        if verbose >= 2:
            log.error("stopped by an error", exc_info=exc)
        if isinstance(exc, ImportError):
            raise Failure(str(exc)) from exc
        raise failure_of(exc) from exc


def _config(values: dict[str, Any], told_by: Path | None) -> ForwarderConfig:
    from ..forwarder import ForwarderConfig

    # the options are named for people and for UDPTUN_FORWARD_*, the fields for code
    for option, field in FIELDS.items():
        values[field] = values.pop(option)
    try:
        return ForwarderConfig(**values)
    except FieldError as exc:
        # its fields are named as the options are
        where = f" (some options are from {told_by})" if told_by else ""
        raise click.UsageError(f"--{exc}{where}") from exc


def _run(config: ForwarderConfig) -> None:
    import asyncio

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config))


async def _serve(config: ForwarderConfig) -> None:
    import asyncio

    from ..forwarder import Forwarder

    forwarder = Forwarder(config)
    signals = _Signals(forwarder)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.stop, signal.Signals(number).name)
    loop.add_signal_handler(signal.SIGHUP, signals.reload)
    loop.add_signal_handler(signal.SIGUSR1, signals.log_state)
    async with forwarder:
        signals.started = True
        # What is loaded by now stays: a collection that walks it would hold up the control API.
        gc.collect()
        gc.freeze()
        await forwarder.wait_stopped()


class _Signals:
    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder
        self._stopping = False
        self._reloads: set[Any] = set()
        self.started = False

    def stop(self, name: str) -> None:
        if self._stopping:
            log.warning("%s again: exiting at once", name)
            logging.shutdown()
            os._exit(1)
        self._stopping = True
        log.info("%s: stopping", name)
        self._forwarder.request_stop()

    def reload(self) -> None:
        """Only once started: the start itself reads the route file."""
        import asyncio

        if self._forwarder.config.routes_file is None:
            log.info("SIGHUP: no route file was given, the routes stay as they are")
        elif self.started and not self._stopping:
            task = asyncio.get_running_loop().create_task(self._reload())
            self._reloads.add(task)
            task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        try:
            await self._forwarder.reload()
        except (UdptunError, OSError) as exc:
            log.error("the route file was not loaded, the routes stay as they are: %s", exc)

    def log_state(self) -> None:
        if self.started:
            self._forwarder.log_state()
