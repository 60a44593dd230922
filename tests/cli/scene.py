"""A node with many peers, for the tests of what people look at: ``top`` and ``web``.

The control server and the node's socket are the real ones. Behind them are a fake forwarder, whose
counters grow with each answer, and a report of a node daemon. ``python -m tests.cli.scene DIR N``
serves N peers at DIR/udptun.sock, to look at by hand.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from tests.control.fakes import VERSION, FakeForwarder, LoopThread, Served, status_of
from tests.node.node_reports import ready
from udptun.build import build_id
from udptun.model import IPNetwork
from udptun.node.status.report import NodeReport, PairReport
from udptun.node.status.socket import NodeSocket

STEP = 100_000  # bytes to the first peer for each answer

# What an attacker could call a node: markup, escape sequences, other directions, wide, too long.
HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(2)>", '"><svg onload=alert(3)>',
    "\x1b]0;owned\x07\x1b[2J", "a\nb\tc", "\u202eevil\u2066", "日本語のノード", "n" * 300, "&amp;",
    "{{7*7}}", "' onmouseover='alert(4)", "\x00", "\ud800", "javascript:alert(5)", "e\u0301\u0301",
)


class Traffic(FakeForwarder):
    """A forwarder with peers 192.0.2.1 and so on. Each answer has more packets than the last."""

    def __init__(self, peers_n: int) -> None:
        super().__init__()
        self.answers = 0
        self.pid = 1000
        self.peers = [_peer(i) for i in range(peers_n)]

    async def status_chunks(self, with_peers: bool = True) -> AsyncGenerator[bytes, None]:
        self.answers += 1
        for i, peer in enumerate(self.peers):
            for side, share in (("encap", 1), ("decap", 2)):
                peer[side]["bytes"] += STEP // (i + 1) // share * (i % 5 > 0 or i == 0)
                peer[side]["packets"] += STEP // (i + 1) // share // 1000
        status = status_of(self.generation, len(self.peers)) | {
            "version": VERSION, "build": build_id(), "pid": self.pid, "peers": self.peers}
        for side, more in (("encap", 3100), ("decap", 2000)):
            for name in ("read", "delivered"):
                status["packets"][side] = status["packets"][side] | {name: more * self.answers}
        worker = status["workers"][0]
        status["workers"] = [worker | {
            "index": i, "cpu_seconds": 0.25 * self.answers,
            "syscalls": worker["syscalls"] | {
                "send": 100 * self.answers, "receive": 100 * self.answers}} for i in range(2)]
        yield json.dumps(status).encode()

    def drops(self) -> list[dict[str, Any]]:
        return [drop | {"packets": 12 * self.answers if drop["reason"] == "no_route" else
                        3 if drop["reason"] == "unknown_peer" else 0} for drop in super().drops()]


def _peer(i: int) -> dict[str, Any]:
    return status_of(1, 0)["peers"][0] | {
        "endpoint": f"192.0.{2 + i // 250}.{1 + i % 250}:8285", "subnets": [str(_subnet(i))],
        "encap": {"packets": 0, "bytes": 0}, "decap": {"packets": 0, "bytes": 0}}


def _subnet(i: int) -> IPv4Network:
    return IPv4Network(((10 << 24) + (244 << 16) + ((i + 2) << 8), 24))


def describe(report: NodeReport) -> Callable[[IPNetwork], dict[str, Any]]:
    """Return ``describe_paths`` of the report."""

    def paths(subnet: IPNetwork) -> dict[str, Any]:
        pair = report.pairs[subnet]
        i = (int(subnet.network_address) >> 8 & 0xFFFF) - (244 << 8) - 2
        path: dict[str, Any] = {
            "state": pair.state, "rtt_us": 300 + 137 * (i * 7 % 61),
            "loss": 0.0 if i % 9 else 0.0312, "last_answer": None, "largest_size": 1472,
            "full_size_passes": True, "reason": pair.trouble}
        if pair.state == "unreachable":
            path |= {"rtt_us": None, "loss": 1.0}
        udp = path | {"endpoint": _peer(i)["endpoint"]}
        return {"udp": udp, "vxlan": path} if i % 3 == 1 else {"udp": udp}

    return paths


def report_of(names: Sequence[str], bad: bool = True) -> NodeReport:
    """Return the report of a daemon with these peers. bad: every 13th one is unreachable, and every
    31st one is limited."""
    report = ready()
    report.describe_paths = describe(report)
    for i, name in enumerate(names):
        lost, small = bad and i % 13 == 3, bad and i % 31 == 5
        report.pairs[_subnet(i)] = PairReport(
            name, _subnet(i), "vxlan" if i % 3 == 1 else "udp", preferred="udp",
            since=time.time() - 300 * i, changed=time.time() - 60 * i,
            state="unreachable" if lost else "limited" if small else "reachable",
            trouble="no answer to 3 probes in a row" if lost else
            "packets over 1380 bytes do not pass" if small else "")
    return report


class Scene(Served):
    """Serves the forwarder and the node. ``forwarder`` and ``report`` can be changed."""

    forwarder: Traffic

    def __init__(self, thread: LoopThread, folder: Path, names: Sequence[str], bad: bool) -> None:
        super().__init__(thread, folder / "udptun.sock", lambda: Traffic(len(names)))
        self.report = report_of(names, bad)
        self._node = NodeSocket(self.report, self.path)

    def __enter__(self) -> Scene:
        super().__enter__()
        self.thread.run(self._node.start)
        return self

    def stop_node(self) -> None:
        self.thread.run(self._node.aclose)

    def __exit__(self, *exc: object) -> None:
        self.stop_node()
        super().__exit__(*exc)


@contextmanager
def scene(
    folder: Path, names: Sequence[str] | int = 12, bad: bool = True
) -> Iterator[Scene]:
    listed = [f"n{i + 2}" for i in range(names)] if isinstance(names, int) else names
    with LoopThread() as thread, Scene(thread, folder, listed, bad) as running:
        yield running


async def _forever() -> None:
    await asyncio.Event().wait()


if __name__ == "__main__":
    hostile = sys.argv[2] == "hostile"
    with scene(Path(sys.argv[1]), HOSTILE if hostile else int(sys.argv[2])):
        asyncio.run(_forever())
