"""Where a request through a tunnel waits: the time between two devices, idle and under bulk.

    python -m bench timeline [--contender SPEC] [--profile P1] [--seconds 5]

bench/udpload sends 64-byte requests and receives the replies. A packet socket on each device that a
request or a reply passes gives the time at which the kernel handled the packet there. Under bulk,
an iperf3 TCP stream runs in the direction of the requests.

Owns: the packet sockets, their filter, and the stages. Works with every contender that has a
device. A packet is also found at the end of a super-packet, with at most one ACK after it. Other
requests are not followed: for example, two of them can be merged. Needs root. Main thread only,
like udptun.lab.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from udptun.lab import Host, Lab, LabError, Process

from . import stats
from .contenders import PathUnderTest, find
from .load import PORT, bulk, echo, json_result, udpload

# The places that a request and its reply pass, in order. True: of the request.
PLACES = (
    ("tunnel device of a", True), ("wire of a", True), ("wire of b", True),
    ("tunnel device of b", True), ("tunnel device of b", False), ("wire of b", False),
    ("wire of a", False), ("tunnel device of a", False),
)
STAGES = (
    "the program sends the request", "a: tunnel device to wire", "wire", "b: wire to tunnel device",
    "the echo server replies", "b: tunnel device to wire", "wire", "a: wire to tunnel device",
    "the program receives the reply",
)
_SIZE = 64
_INTERVAL_US = 5003  # long, so that two requests are rarely merged; no multiple of a timer
_POLL_SECONDS = 0.02
_ROOM = 1 << 28
_AFTER = (0, 52)  # bytes after the request or reply: none, or a TCP ACK with time stamps
_RECORD = struct.Struct("=qqq")
_MARK = struct.Struct("=IIq")
REQUEST, REPLY = 2, 0  # where the UDP header has the port of the echo server

# linux/filter.h, asm-generic/socket.h, linux/if_packet.h
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE, _SO_TIMESTAMPNS, _ETH_P_ALL = 26, 33, 35, 3
_LD_LEN, _SUB, _TAX, _LDH_IND, _JEQ, _JGE, _RET = 0x80, 0x14, 0x07, 0x48, 0x15, 0x35, 0x06


def tail_filter(port_at: int) -> bytes:
    """Return a socket filter for packets that end with a UDP header, 64 bytes of payload, and
    possibly an ACK.

    port_at  the offset of PORT in the UDP header
    """
    steps = []
    for after in _AFTER:
        steps += [
            (_LD_LEN, 0, 0, 0), (_JGE, 0, 7, _SIZE + 8 + after), (_SUB, 0, 0, _SIZE + 8 + after),
            (_TAX, 0, 0, 0), (_LDH_IND, 0, 0, port_at), (_JEQ, 0, 3, PORT),
            (_LDH_IND, 0, 0, 4), (_JEQ, 0, 1, _SIZE + 8), (_RET, 0, 0, 0x40000),
        ]
    return b"".join(struct.pack("=HBBI", *step) for step in [*steps, (_RET, 0, 0, 0)])


def attach_filter(sock: socket.socket, code: bytes) -> None:
    """Attach a classic BPF program (linux/filter.h, struct sock_fprog)."""
    steps = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(steps))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


class Tap:
    """A packet socket on one device of a host that receives requests or replies.

    times  the time in ns at which each packet passed, by sequence number
    """

    def __init__(self, host: Host, device: str, request: bool) -> None:
        self.times: dict[int, int] = {}
        # SOCK_DGRAM: without the link-layer header. Protocol 0: nothing arrives before ``bind``.
        self._socket = host.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        attach_filter(self._socket, tail_filter(REQUEST if request else REPLY))
        with host.inside():
            self._socket.bind((device, _ETH_P_ALL))

    def read(self, run: int) -> None:
        """Read what has arrived of this run of udpload."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, control, _, _ = self._socket.recvmsg(1 << 17, 64)
                seconds, ns = struct.unpack("=qq", control[0][2])
                for after in _AFTER:
                    at = len(data) - _SIZE - after
                    number, seq, _ = _MARK.unpack_from(data, at) if at >= 0 else (0, 0, 0)
                    if number == run:
                        self.times.setdefault(seq, seconds * 10**9 + ns)

    def close(self) -> None:
        self._socket.close()


@dataclass(frozen=True)
class Timeline:
    """The times in ns of each stage, of all requests that were seen everywhere.

    sent     the number of requests
    workers  two shares of the time, for the worker of a and for that of b: it ran, and it waited
             for a core; empty without workers
    """

    stages: Sequence[Sequence[int]]
    sent: int
    workers: Sequence[tuple[float, float]]

    def rows(self) -> Iterator[tuple[str, Sequence[int]]]:
        """Yield (stage, times), at last the whole round trip."""
        yield from zip(STAGES, self.stages, strict=True)
        yield "round trip", [sum(times) for times in zip(*self.stages, strict=True)]


def stages_of(
    taps: Sequence[Mapping[int, int]], replies: Mapping[int, tuple[int, int]]
) -> list[list[int]]:
    """Return the times of each stage, of the requests that all places have.

    taps     the times at each of PLACES, by sequence number
    replies  when each request was sent and its reply was received
    """
    seen = [seq for seq in replies if all(seq in times for times in taps)]
    found: list[list[int]] = [[] for _ in STAGES]
    for seq in seen:
        sent, received = replies[seq]
        moments = [sent, *(times[seq] for times in taps), received]
        for stage, begin, end in zip(found, moments, moments[1:], strict=False):
            stage.append(end - begin)
    return found


def measure(path: PathUnderTest, seconds: float) -> Timeline:
    """Send requests for some seconds, and follow them."""
    ends = {
        "tunnel device of a": (path.a, path.device), "tunnel device of b": (path.b, path.device),
        "wire of a": (path.a, path.a.interfaces[0].name),
        "wire of b": (path.b, path.b.interfaces[0].name),
    }
    with contextlib.ExitStack() as made, tempfile.TemporaryDirectory() as folder:
        taps = []
        for place, request in PLACES:
            taps.append(Tap(*ends[place], request))
            made.callback(taps[-1].close)
        record = Path(folder) / "replies"
        begun, before = time.monotonic_ns(), _scheduled(path)
        process = udpload(
            path.a, "ping", path.at_b, "--seconds", seconds, "--size", _SIZE, "--interval-us",
            _INTERVAL_US, "--record", record,
        )
        while process.alive:
            time.sleep(_POLL_SECONDS)
            _read(taps, process)
        spent, after = time.monotonic_ns() - begun, _scheduled(path)
        _read(taps, process)
        sent = json_result(process, 10)["sent"]
        offset = time.time_ns() - time.monotonic_ns()  # udpload has monotonic times
        replies = {
            seq: (begin + offset, end + offset)
            for seq, begin, end in _RECORD.iter_unpack(record.read_bytes())
        }
    workers = [_busiest(*times, spent) for times in zip(before, after, strict=True)]
    return Timeline(stages_of([tap.times for tap in taps], replies), sent, workers)


def _scheduled(path: PathUnderTest) -> list[dict[str, tuple[int, int]]]:
    """Return, for each forwarder, how many ns each thread has run and has waited for a core.

    Source: linux Documentation/scheduler/sched-stats.rst.
    """
    found: list[dict[str, tuple[int, int]]] = []
    for forwarder in path.forwarders:
        found.append({})
        for task in Path(f"/proc/{forwarder.process.pid}/task").iterdir():
            ran, waited, _ = (task / "schedstat").read_text().split()
            found[-1][task.name] = int(ran), int(waited)
    return found


def _busiest(
    before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]], spent: int
) -> tuple[float, float]:
    """Return the shares of the time that the busiest thread, the worker, ran and waited."""
    return max(
        ((ran - before[task][0]) / spent, (waited - before[task][1]) / spent)
        for task, (ran, waited) in after.items() if task in before
    )


def _read(taps: Sequence[Tap], process: Process) -> None:
    for tap in taps:
        tap.read(process.pid)


def table(idle: Timeline, loaded: Timeline) -> Iterator[str]:
    """Yield the lines of a table: the stages, and their p50 and p99 in us."""
    yield "| | idle p50 | p99 | beside bulk p50 | p99 |"
    yield "|---|---|---|---|---|"
    for (name, alone), (_, beside) in zip(idle.rows(), loaded.rows(), strict=True):
        cells = [
            f"{stats.quantile(sorted(times), q) / 1e3:,.0f}"
            for times in (alone, beside) for q in (0.5, 0.99)
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def run(contenders: Sequence[str], profile: str, seconds: float) -> Iterator[str]:
    """Measure. Yield each line for the terminal when it is known."""
    for name in contenders:
        contender = find(name)
        if profile not in contender.profiles:
            raise ValueError(f"contender {name!r} on profile {profile}: expected profile "
                             f"{' or '.join(contender.profiles)}")
        with Lab() as lab:
            path = contender.set_up(lab)
            if not path.device:
                raise LabError(f"{name} has no device")
            path.link.profile(profile)
            with echo(path):
                idle = measure(path, seconds)
                with bulk(path, seconds + 10):
                    loaded = measure(path, seconds)
        yield f"{name}, {profile}, us:"
        yield ""
        yield from table(idle, loaded)
        yield ""
        for state, found in (("idle", idle), ("beside bulk", loaded)):
            yield f"{state}: {len(found.stages[0]):,} of {found.sent:,} requests followed"
            for host, (ran, waits) in zip("ab", found.workers, strict=False):
                yield f"  worker of {host}: runs {ran:.0%}, waits for a core {waits:.0%}"
        yield ""
