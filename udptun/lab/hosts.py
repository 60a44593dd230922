"""Network namespaces as hosts, the links between them, and the processes in them.

Owns everything that a lab creates: the namespaces (named ``ut<pid>-<n>-<host>``), the devices in
them, the processes, and one temporary folder. The lab removes all of them at its end, which may
also be an exception, Ctrl-C, SIGTERM or SIGHUP. If the lab itself is killed with SIGKILL, the
kernel kills the lab's processes (parent death signal), and the next lab removes the namespaces and
the folder. Does not depend on what the processes do. Main thread only: the kernel kills a process
of the lab when the thread that started the process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self, TypeVar

from .tools import SEARCH_PATH

NETNS_DIR = Path("/run/netns")
_FOLDER = "udptun-lab-"
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_GRACE_SECONDS = 5.0
DEADLINE_SECONDS = 60.0

# These settings are made in every namespace, because the defaults for new namespaces differ between
# machines. The rate limit of ICMP errors is off, so that a test that waits for an ICMP error does
# not depend on earlier ICMP errors.
_SYSCTL = (
    "net.ipv4.conf.all.rp_filter=0",
    "net.ipv4.conf.default.rp_filter=0",
    "net.ipv4.conf.all.accept_local=0",
    "net.ipv4.conf.default.accept_local=0",
    "net.ipv4.icmp_ratelimit=0",
    "net.ipv6.icmp.ratelimit=0",
    "net.ipv6.conf.all.disable_ipv6=0",
    "net.ipv6.conf.default.disable_ipv6=0",
    "net.ipv6.conf.all.accept_dad=0",
    "net.ipv6.conf.default.accept_dad=0",
    "net.ipv6.conf.all.accept_ra=0",
    "net.ipv6.conf.default.accept_ra=0",
    "net.ipv6.conf.default.router_solicitations=0",
)
_FORWARDING = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")

# The offloads of a veth in each profile.
# P1  The settings of a new veth: the link passes super-packets unsegmented.
# P2  The sender's kernel segments super-packets in software. The receiver's kernel merges segments
#     (GRO).
# P3  The same as P2, but without GRO.
# P4  Like a NIC without tunnel segmentation: the link passes TCP and UDP super-packets unsegmented,
#     but the sender's kernel segments VXLAN super-packets in software. GRO is on.
_TUNNEL_SEGMENTATION = ("tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation")
_TUNNEL_ON = dict.fromkeys(_TUNNEL_SEGMENTATION, "on")
_TUNNEL_OFF = dict.fromkeys(_TUNNEL_SEGMENTATION, "off")
PROFILES = {
    "P1": {"tso": "on", "gso": "on", "tx-udp-segmentation": "on", "gro": "off"} | _TUNNEL_ON,
    "P2": {"tso": "off", "gso": "off", "tx-udp-segmentation": "off", "gro": "on"} | _TUNNEL_ON,
    "P3": {"tso": "off", "gso": "off", "tx-udp-segmentation": "off", "gro": "off"} | _TUNNEL_ON,
    "P4": {"tso": "on", "gso": "on", "tx-udp-segmentation": "on", "gro": "on"} | _TUNNEL_OFF,
}

_T = TypeVar("_T")


class LabError(Exception):
    """An operation of the lab failed.

    The message names the operation. If a tool failed, the message has the tool's output.
    """


class Unavailable(LabError):
    """This machine's kernel lacks the requested feature."""


def wait_for(
    predicate: Callable[[], _T], what: str, seconds: float = DEADLINE_SECONDS
) -> _T:
    """Call ``predicate`` every 10 ms until it returns a true value; return this value.

    Raises LabError after ``seconds``. The default is long enough for a busy machine.
    """
    deadline = time.monotonic() + seconds
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise LabError(f"timeout after {seconds:g} s: waited for {what}")
        time.sleep(0.01)
    return value


class Process:
    """A program that runs on a host. It has its own session and process group.

    The program's output goes to the file ``log``.
    """

    def __init__(self, host: Host, argv: Sequence[str], popen: subprocess.Popen[bytes], log: Path):
        self.host, self.argv, self.log = host, list(argv), log
        self._popen = popen

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    @property
    def returncode(self) -> int | None:
        return self._popen.poll()

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self, seconds: float = DEADLINE_SECONDS) -> int:
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise LabError(f"still running after {seconds:g} s: {self}") from None

    def wait_for_output(self, text: str, seconds: float = DEADLINE_SECONDS) -> None:
        def seen() -> bool:
            if text in self.text():
                return True
            if not self.alive:
                raise LabError(f"ended ({self.returncode}) before printing {text!r}: {self}")
            return False

        try:
            wait_for(seen, repr(text), seconds)
        except LabError as e:
            raise LabError(f"{e}; its output:\n{self.text()}") from None

    def stop(self, seconds: float = _GRACE_SECONDS) -> int:
        """End the process group; return the exit code.

        Sends SIGTERM, waits up to ``seconds`` for the process to end, and then sends SIGKILL.
        """
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(seconds)
        return self.kill()

    def kill(self) -> int:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        return self._popen.wait()

    def __str__(self) -> str:
        return f"{' '.join(self.argv)} (on {self.host.name})"


@dataclass(frozen=True)
class Interface:
    """One end of a link: a device on a host, with its addresses."""

    host: Host
    name: str
    v4: ipaddress.IPv4Interface
    v6: ipaddress.IPv6Interface

    def set_mtu(self, mtu: int) -> None:
        self.host.ip(f"link set {self.name} mtu {mtu}")

    def offloads(self, switches: Mapping[str, str]) -> None:
        """Set offloads. ``switches`` maps each ethtool name to "on" or "off"."""
        words = [word for switch in switches.items() for word in switch]
        self.host.run(["ethtool", "-K", self.name, *words])


@dataclass(frozen=True)
class Link:
    """A link between two hosts: one veth pair, or two routers with a smaller MTU between them."""

    a: Interface
    b: Interface
    middle: tuple[Interface, ...] = ()  # the two ends of the link between the routers
    wires: tuple[Interface, ...] = ()  # all devices of the link, also those of the routers

    @property
    def routers(self) -> tuple[Host, ...]:
        return tuple(end.host for end in self.middle)

    def set_middle_mtu(self, mtu: int) -> None:
        for end in self.middle:
            end.set_mtu(mtu)

    def profile(self, name: str) -> None:
        """Set the offloads of ``PROFILES[name]`` on all devices of the link."""
        for end in self.wires:
            end.offloads(PROFILES[name])


@dataclass(eq=False)
class Host:
    """One network namespace. ``v4`` and ``v6`` are the host's addresses on its first link."""

    lab: Lab
    name: str
    namespace: str
    interfaces: list[Interface] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)

    @property
    def v4(self) -> ipaddress.IPv4Address:
        return self.interfaces[0].v4.ip

    @property
    def v6(self) -> ipaddress.IPv6Address:
        return self.interfaces[0].v6.ip

    def _argv(self, argv: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *argv]

    def run(
        self, argv: Sequence[str], *, check: bool = True, seconds: float = 60.0,
        text: str | None = None, env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command and wait until it ends. ``text`` is its input. Return its output."""
        return _run(self._argv(argv), check=check, seconds=seconds, text=text, env=env)

    def start(
        self, argv: Sequence[str], *, name: str | None = None, env: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Process:
        """Start a command in the background. ``Lab.close`` ends the command."""
        name = name or Path(argv[0]).name
        log = self.lab.folder / f"{self.name}-{name}-{next(self.lab.numbers)}.log"
        with log.open("wb") as out:
            popen = subprocess.Popen(
                self._argv(argv), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True, env=_environment(env), pass_fds=pass_fds,
                preexec_fn=_prepare_child(os.getpid()),  # noqa: PLW1509 - main thread only
            )
        process = Process(self, argv, popen, log)
        self.processes.append(process)
        return process

    def ip(self, *lines: str) -> None:
        """Run commands of ip(8) in one process. Each line is one command."""
        text = "".join(line + "\n" for line in lines)
        _run(["ip", "-n", self.namespace, "-batch", "-"], text=text)

    def sysctl(self, *settings: str) -> None:
        self.run(["sysctl", "-qw", *settings])

    def nft(self, text: str) -> None:
        self.run(["nft", "-f", "-"], text=text)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Move this thread to the host's namespace while the context is open.

        A socket that is opened in the context stays in the host's namespace.
        """
        with _open_netns(Path("/proc/thread-self/ns/net")) as home:
            with _open_netns(NETNS_DIR / self.namespace) as there:
                _setns(there)
            try:
                yield
            finally:
                _setns(home)

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Open a socket of this program in the host's namespace. ``Lab.close`` closes it."""
        with self.inside():
            made = socket.socket(family, kind, protocol)
        self.lab.sockets.append(made)
        return made

    def forwarding(self) -> None:
        self.sysctl(*_FORWARDING)

    def pod(
        self, subnet: str, subnet6: str | None = None, mtu: int = 1472, name: str = "pod"
    ) -> Host:
        """Create a host (a pod) behind this host.

        This host gets the first address of each subnet, and the pod gets the second address.
        Call Lab.link() for this host before this method, because ``v4`` and ``v6`` are the
        addresses of the first link.
        """
        pod = self.lab.host(f"{self.name}-{name}")
        net4 = ipaddress.IPv4Network(subnet)
        v4 = [ipaddress.IPv4Interface((net4[i], net4.prefixlen)) for i in (1, 2)]
        net6 = ipaddress.IPv6Network(subnet6) if subnet6 else self.lab.next_subnets()[1]
        v6 = [ipaddress.IPv6Interface((net6[i], net6.prefixlen)) for i in (1, 2)]
        self.lab.wire(self, pod, mtu, (v4[0], v6[0]), (v4[1], v6[1]))
        pod.ip(f"route add default via {v4[0].ip}", f"route add default via {v6[0].ip}")
        self.forwarding()
        return pod


_Addresses = tuple[ipaddress.IPv4Interface, ipaddress.IPv6Interface]


class Lab:
    """A set of hosts that exist while the context is open."""

    _count = itertools.count()
    _open: set[str] = set()  # noqa: RUF012 - intended: shared by all labs of this process

    def __init__(self) -> None:
        self.hosts: list[Host] = []
        self.sockets: list[socket.socket] = []
        self.numbers = itertools.count()
        self._subnets = itertools.count(1)
        self._saved_handlers: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise LabError("making network namespaces needs root")
        self.prefix = f"ut{os.getpid()}-{next(self._count)}-"
        self._open.add(self.prefix)
        self._catch_signals()
        try:
            _remove_stale(self._open)
            self.folder = Path(tempfile.mkdtemp(prefix=_FOLDER + self.prefix))
        except BaseException:
            self._finish()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> str:
        """Remove everything that the lab has created; return a text that says what was removed.

        Signals do not interrupt the removal.
        """
        if self.prefix not in self._open:
            return "nothing was left to remove"
        with _signals_blocked():
            processes = [p for host in self.hosts for p in host.processes if p.alive]
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
            for host in self.hosts:
                for process in host.processes:
                    process.stop()
            for made in self.sockets:
                made.close()
            namespaces = [host.namespace for host in self.hosts]
            for namespace in namespaces:
                _remove_namespace(namespace)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.hosts.clear()
            self._finish()
        return f"{len(namespaces)} namespaces with their devices, {len(processes)} processes"

    def _finish(self) -> None:
        self._open.discard(self.prefix)
        for number, handler in self._saved_handlers.items():
            signal.signal(number, handler)
        self._saved_handlers.clear()

    def _catch_signals(self) -> None:
        """Make SIGTERM and SIGHUP raise an exception, as Ctrl-C does.

        A signal that already has a handler is not changed. Exception: a shell lets its background
        processes ignore SIGINT. The lab ends at SIGINT there too.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _STOP_SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                self._saved_handlers[number] = signal.signal(number, _exit_on_signal)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            self._saved_handlers[signal.SIGINT] = signal.signal(
                signal.SIGINT, signal.default_int_handler)

    def host(self, name: str) -> Host:
        host = Host(self, name, self.prefix + name)
        # Added before the namespace exists, so that an interrupted creation is removed too.
        self.hosts.append(host)
        _run(["ip", "netns", "add", host.namespace])
        host.sysctl(*_SYSCTL)
        host.ip("link set lo up")
        return host

    def next_subnets(self) -> tuple[ipaddress.IPv4Network, ipaddress.IPv6Network]:
        """Return two unused subnets: IPv4 for tests (RFC 2544), and local IPv6 (RFC 4193)."""
        n = next(self._subnets)
        v6 = ipaddress.IPv6Network(f"fd18:0:0:{n:x}::/64")
        return ipaddress.IPv4Network(f"198.18.{n}.0/24"), v6

    def wire(
        self, a: Host, b: Host, mtu: int = 1500,
        at_a: _Addresses | None = None, at_b: _Addresses | None = None,
    ) -> tuple[Interface, Interface]:
        """Join two hosts by a veth pair; return its two ends."""
        if at_a is None or at_b is None:
            net4, net6 = self.next_subnets()
            at_a, at_b = _nth(net4, net6, 1), _nth(net4, net6, 2)
        ends = (
            Interface(a, f"eth{len(a.interfaces)}", *at_a),
            Interface(b, f"eth{len(b.interfaces)}", *at_b),
        )
        _run([
            *("ip", "link", "add", ends[0].name, "mtu", str(mtu), "netns", a.namespace),
            *("type", "veth"),
            *("peer", "name", ends[1].name, "mtu", str(mtu), "netns", b.namespace),
        ])
        _bring_up(*ends)
        return ends

    def link(self, a: Host, b: Host, mtu: int = 1500, middle_mtu: int | None = None) -> Link:
        """Join two hosts.

        middle_mtu  None: join the hosts by one veth pair. Else put two routers between the hosts;
                    the link between the routers has this MTU
        """
        if middle_mtu is None:
            ends = self.wire(a, b, mtu)
            return Link(*ends, wires=ends)
        n = next(self.numbers)
        r, s = self.host(f"router{n}a"), self.host(f"router{n}b")
        a_end, r_end = self.wire(a, r, mtu)
        r_mid, s_mid = self.wire(r, s, middle_mtu)
        s_end, b_end = self.wire(s, b, mtu)
        for router in (r, s):
            router.forwarding()
        for host, target, gateway in (
            (a, b_end, r_end), (b, a_end, s_end), (r, b_end, s_mid), (s, a_end, r_mid),
        ):
            host.ip(
                f"route add {target.v4.network} via {gateway.v4.ip}",
                f"route add {target.v6.network} via {gateway.v6.ip}",
            )
        wires = (a_end, r_end, r_mid, s_mid, s_end, b_end)
        return Link(a_end, b_end, (r_mid, s_mid), wires)

    def segment(self, *hosts: Host, mtu: int = 1500) -> list[Interface]:
        """Connect hosts to one Ethernet segment, which is a bridge in a separate namespace."""
        bridge = self.host(f"bridge{next(self.numbers)}")
        bridge.ip("link add br0 type bridge", f"link set br0 mtu {mtu} up")
        net4, net6 = self.next_subnets()
        ends = []
        for n, host in enumerate(hosts, start=1):
            end = Interface(host, f"eth{len(host.interfaces)}", *_nth(net4, net6, n))
            port = f"port{n}"
            _run([
                *("ip", "link", "add", end.name, "mtu", str(mtu), "netns", host.namespace),
                *("type", "veth"),
                *("peer", "name", port, "mtu", str(mtu), "netns", bridge.namespace),
            ])
            bridge.ip(f"link set {port} master br0 up")
            _bring_up(end)
            ends.append(end)
        return ends


def _bring_up(*ends: Interface) -> None:
    # Set both ends up before adding addresses. If a neighbour solicitation is sent while the other
    # end is down, the first packet is delayed by a second.
    for end in ends:
        end.host.ip(f"link set {end.name} up")
    for end in ends:
        end.host.ip(
            f"address add {end.v4} dev {end.name}", f"address add {end.v6} dev {end.name} nodad"
        )
        end.host.interfaces.append(end)


def _nth(net4: ipaddress.IPv4Network, net6: ipaddress.IPv6Network, n: int) -> _Addresses:
    return (
        ipaddress.IPv4Interface((net4[n], net4.prefixlen)),
        ipaddress.IPv6Interface((net6[n], net6.prefixlen)),
    )


def _environment(extra: dict[str, str] | None) -> dict[str, str]:
    env = dict(os.environ)
    env["PATH"] = f"{env.get('PATH', '')}:{SEARCH_PATH}"
    env["LC_ALL"] = "C"  # the lab parses the output
    return env | (extra or {})


def _run(
    argv: Sequence[str], *, check: bool = True, seconds: float = 60.0, text: str | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    # The command has its own session, so that Ctrl-C on the terminal reaches only the lab.
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=seconds, start_new_session=True,
            env=_environment(env), check=False, input=text or "",
        )
    except FileNotFoundError as e:
        raise LabError(f"{e.filename} is not installed") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"still running after {seconds:g} s: {' '.join(argv)}") from None
    if check and done.returncode != 0:
        output = (done.stderr.strip() or done.stdout.strip()) + (f"\n{text}" if text else "")
        raise LabError(f"{' '.join(argv)} failed ({done.returncode}): {output}")
    return done


def _remove_namespace(namespace: str) -> None:
    """Kill all processes in a lab's namespace, and delete the namespace."""
    pids = _run(["ip", "netns", "pids", namespace], check=False).stdout.split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _run(["ip", "netns", "del", namespace], check=False)


def _remove_stale(in_use: set[str]) -> None:
    """Remove the namespaces and folders of killed labs.

    The name of a namespace or folder contains the process ID of its lab. The namespace or folder is
    stale in two cases:
    - No process has this ID.
    - This process has this ID, and no open lab of this process uses the name.
    """
    folders = Path(tempfile.gettempdir()).glob(_FOLDER + "ut*")
    for entry in [*NETNS_DIR.glob("ut*"), *folders]:
        match = re.match(r"(ut(\d+)-\d+-)", entry.name.removeprefix(_FOLDER))
        if match is None or match[1] in in_use:
            continue
        if int(match[2]) != os.getpid() and Path(f"/proc/{match[2]}").exists():
            continue
        if entry.parent == NETNS_DIR:
            _remove_namespace(entry.name)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block the signals that end a lab while the context is open.

    A signal that arrives in this time is handled at the end of the context.
    """
    numbers = {signal.SIGINT, *_STOP_SIGNALS}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_libc = ctypes.CDLL(None, use_errno=True)


def _prepare_child(parent: int) -> Callable[[], None]:
    """Return the function that a new child process calls between fork and exec.

    The function does two things:
    - It asks the kernel to kill the child when ``parent`` ends.
    - It sets some signals to their default action, because a shell or nohup may have set them to
      ignored. The child has its own session, so all signals to the child come from the lab.
    """

    def prepare() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before prctl
            os._exit(1)
        for number in (signal.SIGINT, signal.SIGQUIT, *_STOP_SIGNALS):
            signal.signal(number, signal.SIG_DFL)

    return prepare


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


@contextlib.contextmanager
def _open_netns(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
