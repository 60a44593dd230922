"""``udptun forward``: parse the options, run a forwarder, handle signals.

Owns the command line of the forwarder and the meaning of each signal. Does not depend on how a
packet is forwarded.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FieldError, UdptunError
from ..files import UntrustedFile
from ..model import ACCELERATES, ADMITS, SOURCE_CHECKS
from ..takeover.kept import KEPT
from ..text import os_reason
from . import logs
from .lazy import Failure, Misuse, failure_of
from .options import LISTEN, METRICS, Parsed, instance, instance_of
from .standby import wait_until_needed
from .wait import WaitFor, take_options

if TYPE_CHECKING:
    from ..device.offload import OffloadRequest
    from ..forwarder import Forwarder, ForwarderConfig
    from ..instance import Instance, InstanceLock
    from ..model import IPAddress, IPNetwork, Mark

log = logging.getLogger("udptun")


def tun_name(text: str) -> str:
    from ..device.tun import check_name

    check_name(text)
    return text


def _address(text: str) -> IPAddress:
    from ..model import parse_address

    return parse_address("--address", text)


def _network(text: str) -> IPNetwork:
    from ..model import parse_prefix

    return parse_prefix("--network", text)


def _subnet(text: str) -> IPNetwork:
    from ..model import parse_prefix

    return parse_prefix("--subnet", text)


def _mark(text: str) -> Mark:
    from ..model import Mark

    return Mark.parse(text)


def _dscp(text: str) -> int | None:
    from ..model import parse_dscp

    return parse_dscp(text, "")


def _auto_or_number(text: str) -> int | None:
    """Return None for auto, else a number of at most MAX_MTU. ForwarderConfig checks the range."""
    from ..model import MAX_MTU, parse_number

    if text == "auto":
        return None
    try:
        return parse_number("", text, 0, MAX_MTU)
    except FieldError:
        raise FieldError("", text, "auto or a whole number") from None


def _offload(text: str) -> OffloadRequest:
    from ..device.offload import OffloadRequest

    return OffloadRequest.parse(text)


def runtime_directory() -> Path | None:
    """Return the directory that the service manager created for sockets (RuntimeDirectory= of
    systemd). If there are several, return the first one."""
    directory = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(directory) if directory else None


TAKE_OVER, STANDBY = "--take-over", "--standby"
LINGER_SECONDS = 2.0  # between two checks whether the forwarder that has taken over has ended
GENTLY = 15  # added to the nice value
# Variables that are valid for one process only.
NOT_PASSED_ON = {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID", KEPT}

FILE = click.Path(path_type=Path)
FIELDS = {
    "address": "addresses", "network": "networks", "routes": "routes_file", "state": "state_file",
    "subnet": "subnets",
}


@click.command()
@instance
@click.option("--tun", type=Parsed("name", tun_name),
              help="Name of the TUN device.  [default: udptun0, or NAME0 with --instance NAME]")
@click.option("--address", type=Parsed("address", _address), multiple=True,
              help="Overlay address of this host, set on the TUN as /32 or /128. Once per family.")
@click.option("--network", type=Parsed("prefix", _network), multiple=True,
              help="Overlay network to route through the TUN. Repeatable.")
@click.option("--listen", type=LISTEN, multiple=True,
              required=True,
              help="Underlay address and UDP port of this host. Once per family.")
@click.option("--control", type=FILE, metavar="PATH",
              help="Control socket to listen on.  [default: udptun.sock, or NAME.sock with "
                   "--instance NAME, in $RUNTIME_DIRECTORY or /run/NAME]")
@click.option(TAKE_OVER, is_flag=True,
              help="Take over from the running forwarder of this instance, without losing a "
                   "packet. --tun, --listen, --address, --network, --workers and --offload must be "
                   "the same as its own. If none runs, start as usual.")
@click.option("--linger", is_flag=True,
              help="After another forwarder has taken over, stay as an idle process until that one "
                   "has ended, or until SIGTERM. Use it in a container: if the old process ended, "
                   "the runtime would start the container again.")
@click.option("--routes", type=FILE, metavar="FILE",
              help="Route file to load at start and on SIGHUP.")
@click.option("--mtu", type=Parsed("auto|n", _auto_or_number), default="auto", show_default=True,
              help="MTU of the TUN. auto: the underlay's MTU minus 28 bytes over IPv4, 48 over "
                   "IPv6.")
@click.option("--workers", type=Parsed("n|auto", _auto_or_number), default="1", show_default=True,
              help="Number of forwarding threads, each with its own TUN queue and UDP sockets.")
@click.option("--offload", type=Parsed("auto|off|list", _offload), default="auto",
              show_default=True,
              help="Offloads to use: auto, off, or a list such as auto,-udp-merge,-udp-gso.")
@click.option("--source-check", type=click.Choice(SOURCE_CHECKS), default=SOURCE_CHECKS[0],
              show_default=True,
              help="Which received packets to accept. strict: from the address and port of a "
                   "peer, with an inner source address routed to that peer; peer: from the "
                   "address of any peer; off: from any address.")
@click.option("--admit", type=click.Choice(ADMITS), default=ADMITS[0], show_default=True,
              help="Which inner destinations to accept. any: all that this host accepts or "
                   "forwards; own: only --address and --subnet.")
@click.option("--subnet", type=Parsed("prefix", _subnet), multiple=True,
              help="Own subnet of this host in the overlay, for --admit own, and to report routes "
                   "to it. Repeatable.")
@click.option("--mark", type=Parsed("value/mask", _mark),
              help="Set this mark (SO_MARK) on all datagrams, so that firewall rules can tell them "
                   "from those of other programs.  [default: no mark]")
@click.option("--dscp", type=Parsed("inherit|n", _dscp), default="0", show_default=True,
              help="DSCP of the datagrams: a number from 0 to 63, or inherit: that of the packet.")
@click.option("--accelerate", type=click.Choice(ACCELERATES), default=ACCELERATES[0],
              show_default=True,
              help="auto: let the kernel carry packets to and from the peers whose routes have "
                   "`express`, if it can; off: carry all packets in this process.")
@click.option("--state", type=FILE, metavar="FILE",
              help="Keep a copy of the route table in FILE, and load it at start.")
@click.option("--metrics", type=METRICS, metavar="[ADDRESS:]PORT",
              help="Serve the metrics over HTTP at this address and TCP port, for Prometheus. "
                   "Without ADDRESS: only for this host.  [default: off]")
@click.option("--metrics-peers", type=int, default=0, show_default=True, metavar="N",
              help="Give up to N peers metrics of their own, and sum up the others.")
@click.option("--flannel-control", type=FILE, metavar="PATH",
              help="SOCK_SEQPACKET socket to listen on for flannel's control messages.")
@click.option("--flannel-control-fd", type=click.IntRange(min=0), metavar="N",
              help="Inherited descriptor to read flannel's control messages from.")
@click.option("--wait-for", cls=WaitFor, type=FILE, metavar="FILE", is_eager=True,
              callback=take_options,
              help="Wait until FILE exists and read from it the options that are not given here: "
                   "a JSON object with the names of these options as keys.")
@click.option(STANDBY, type=click.IntRange(min=0), metavar="N", is_eager=True,
              callback=wait_until_needed, expose_value=False,
              help="Load the program, and wait for a message at the inherited descriptor N. Give "
                   "it before --wait-for. `udptun node` starts such a process.")
@click.option("--log-file", type=FILE, metavar="FILE",
              help="Log to FILE instead of stderr. At 4 MiB, FILE is renamed to FILE.1.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text",
              show_default=True, help="Format of the log: text, or one JSON object per line.")
@click.option("-v", "--verbose", count=True,
              help="Log debug messages; given twice, tracebacks too.")
@click.pass_context
def forward(
    ctx: click.Context, /, verbose: int, log_file: Path | None, log_format: str,
    wait_for: Path | None, linger: bool, **values: Any
) -> None:
    """Run a forwarder: create the TUN device, and carry its packets to and from the peers.

    SIGTERM or Ctrl-C sends the queued packets, removes the device and the sockets, and exits; a
    second one exits at once. SIGHUP loads the route file again and checks the TUN device, SIGUSR1
    logs the counters. SIGUSR2 starts the installed version, which takes over.
    """
    try:
        logs.start(verbose, log_format, log_file)
    except OSError as exc:
        what = f"--log-file: {exc}" if isinstance(exc, UntrustedFile) else \
            f"--log-file {log_file}: {os_reason(exc)}"
        raise Failure(what) from exc
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # ignored until the forwarder runs
    chosen = instance_of(ctx)
    try:
        if values["take_over"]:
            _load_gently()
        config = _config(chosen, values, wait_for)
        _run(config, log_file, chosen.lock("forward", runtime_directory()), linger)
    except (UdptunError, OSError, ImportError) as exc:
        if verbose >= 2:
            log.error("stopped by an error", exc_info=exc)
        if isinstance(exc, ImportError):
            raise Failure(str(exc)) from exc
        raise failure_of(exc) from exc


def _load_gently() -> None:
    """Import what a take-over needs, at a low priority, so that the running forwarder has the CPU.

    Without the capability to raise the priority again, the priority stays as it is.
    """
    former = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        os.nice(-1)
    except PermissionError:
        _load()
        return
    os.setpriority(os.PRIO_PROCESS, 0, former + GENTLY)
    try:
        _load()
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, former)  # the value above may have been cut to 19


def _load() -> None:
    from .. import notify, privileges  # noqa: F401
    from ..forwarder import needs, preload  # noqa: F401

    preload.load()


def _config(
    chosen: Instance, values: dict[str, Any], options_file: Path | None
) -> ForwarderConfig:
    from ..forwarder import ForwarderConfig

    # Some options and their variables UDPTUN_FORWARD_* have other names than the fields.
    for option, field in FIELDS.items():
        values[field] = values.pop(option)
    values["tun"] = values["tun"] or chosen.tun
    values["control"] = values["control"] or chosen.control_socket(runtime_directory())
    values["takeover"] = chosen.takeover_socket(values["control"])
    try:
        return ForwarderConfig(**values)
    except FieldError as exc:
        # The error shall have the name of the option, not of the field.
        where = f" (some options are from {options_file})" if options_file else ""
        raise Misuse(f"--{exc}{where}") from exc


def _run(
    config: ForwarderConfig, log_file: Path | None, lock: InstanceLock, linger: bool
) -> None:
    import asyncio

    import uvloop

    from ..forwarder.needs import needs_of
    from ..privileges import keep_only, lift_memory_limit

    lift_memory_limit()  # while this process has all its capabilities
    keep_only(needs_of(config, log_file))  # before another thread exists
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if runner.run(_serve(config, lock)) and linger:
            runner.run(_stay(lock))


async def _serve(config: ForwarderConfig, lock: InstanceLock) -> bool:
    """Return whether another forwarder has taken over."""
    import asyncio

    from ..forwarder import Forwarder
    from ..notify import Notifier
    from ..takeover.kept import inherited

    environment = dict(os.environ)
    notifier = Notifier.from_environment()
    forwarder = Forwarder(config, lock, inherited(), notifier.forget)
    signals = _Signals(forwarder, environment)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.stop, signal.Signals(number).name)
    loop.add_signal_handler(signal.SIGHUP, signals.reload)
    loop.add_signal_handler(signal.SIGUSR1, signals.log_state)
    loop.add_signal_handler(signal.SIGUSR2, signals.upgrade)
    async with forwarder:
        signals.started = True
        notifier.ready()
        forwarder.on_device(notifier.keep)
        watchdog = loop.create_task(notifier.feed(forwarder.answers))
        # A garbage collection pauses the control API. It need not look at the objects that exist
        # now, because they all stay until the end.
        gc.collect()
        gc.freeze()
        try:
            await forwarder.wait_stopped()
        finally:
            watchdog.cancel()
        if forwarder.successor is None:
            notifier.stopping()
        else:
            notifier.main_process(forwarder.successor)
    return forwarder.successor is not None


async def _stay(lock: InstanceLock) -> None:
    """Stay until the forwarder that has taken over has ended, or until SIGTERM or SIGINT."""
    import asyncio

    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    while not (ended.is_set() or lock.is_free()):
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await ended.wait()


class _Signals:
    """What each signal does.

    environment  that of the start; a forwarder that takes over gets it too
    """

    def __init__(self, forwarder: Forwarder, environment: Mapping[str, str]) -> None:
        self._forwarder = forwarder
        self._environment = environment
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
        """Check the TUN device, and load the route file.

        Do nothing during the start, because the start does both.
        """
        import asyncio

        if self.started and not self._stopping:
            self._forwarder.check_host()
        if self._forwarder.config.routes_file is None:
            log.info("SIGHUP: no route file is configured, the routes stay as they are")
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

    def upgrade(self) -> None:
        """Start the installed program with the same options. It takes over from this process.

        It runs in the same control group and namespaces, with the same capabilities.
        """
        if not self.started or self._stopping:
            return
        argv = _installed_program()
        if TAKE_OVER not in argv:
            argv.append(TAKE_OVER)
        env = {name: self._environment[name] for name in self._environment.keys() - NOT_PASSED_ON}
        log.info("SIGUSR2: starting the forwarder that takes over")
        try:
            child = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL)
        except OSError as exc:
            log.error("the forwarder that takes over was not started: %s", exc)
            return
        # Not a thread of a pool: this process ends without waiting for it.
        threading.Thread(target=_reap, args=(child,), daemon=True).start()


def _installed_program() -> list[str]:
    """Return the command that starts the version that is installed now, with our arguments.

    If the program is an executable script, the script is run directly: its installed version may
    name another interpreter than the one of this process. If this process was a standby process,
    the descriptor at which it waited is closed.
    """
    program, *arguments = _without_standby(sys.orig_argv[1:])
    if Path(program).is_file() and os.access(program, os.X_OK):
        return [program, *arguments]
    return [sys.executable, program, *arguments]


def _without_standby(arguments: Sequence[str]) -> list[str]:
    kept, left = [], iter(arguments)
    for argument in left:
        if argument == STANDBY:
            next(left, None)  # its value
        elif not argument.startswith(f"{STANDBY}="):
            kept.append(argument)
    return kept


def _reap(child: subprocess.Popen[bytes]) -> None:
    code = child.wait()
    log.error("the new forwarder has ended with %d; this one continues", code)
