"""Traffic that tests send through a tunnel, and the kernel's counters of it.

The sockets are in the hosts' namespaces, the program is this process. So a test waits for each
datagram, without assuming a rate, and compares every byte.
"""

import contextlib
import hashlib
import json
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from udptun.device import bpf
from udptun.lab import Forwarder, Host, wait_for
from udptun.lab.tunnels import ACCELERATE

UDP_SEGMENT = 103
# The lab gives the express path to every forwarder: one part of `make test-all`.
ACCELERATED = bool(os.environ.get(ACCELERATE))
SO_RCVBUFFORCE = 33
_ROOM = 1 << 25


def skip_without_programs() -> None:
    """Skip the test if this kernel or this process cannot load a program."""
    try:
        fd = bpf.load_program(
            bpf.SCHED_CLS, struct.pack("=BBhi", 0xB7, 0, 0, 0) + b"\x95" + bytes(7))
    except OSError as error:
        pytest.skip(f"no eBPF programs here: {error.strerror}")
    os.close(fd)


def wait_for_express(*forwarders: Forwarder) -> None:
    """If every forwarder has the express path, wait until these use it."""
    if not ACCELERATED:
        return
    skip_without_programs()
    for forwarder in forwarders:
        wait_for(
            lambda f=forwarder: (now := f.status()["accelerate"])["active"] and now["receives"],
            "the express path",
        )


def family(address: object) -> int:
    return socket.AF_INET6 if ":" in str(address) else socket.AF_INET


def transfer_tcp(
    client: Host, server: Host, address: object, *, size: int = 4 << 20, seconds: float = 60,
    sticky: Sequence[tuple[int, bytes]] = (),
) -> None:
    """Send ``size`` random bytes in both directions over one connection; compare the hashes.

    sticky  IPv6 socket options of the client: extension headers for all packets that it sends
    """
    listener = server.socket(family(address), socket.SOCK_STREAM)
    calling = client.socket(family(address), socket.SOCK_STREAM)
    with listener, calling:
        listener.bind((str(address), 0))
        listener.listen(1)
        for end in (listener, calling):
            end.settimeout(seconds)
        for option, value in sticky:
            calling.setsockopt(socket.IPPROTO_IPV6, option, value)
        calling.connect((str(address), listener.getsockname()[1]))
        accepted, _ = listener.accept()
        accepted.settimeout(seconds)
        with accepted:
            _both_ways(calling, accepted, size)


def _both_ways(left: socket.socket, right: socket.socket, size: int) -> None:
    results: dict[str, str | BaseException] = {}

    def send(name: str, end: socket.socket) -> None:
        data = random.Random(name).randbytes(size)
        try:
            end.sendall(data)
            end.shutdown(socket.SHUT_WR)
            results[f"{name} sent"] = hashlib.sha256(data).hexdigest()
        except OSError as e:
            results[f"{name} sent"] = e

    def receive(name: str, end: socket.socket) -> None:
        digest = hashlib.sha256()
        try:
            while data := end.recv(1 << 18):
                digest.update(data)
            results[f"{name} received"] = digest.hexdigest()
        except OSError as e:
            results[f"{name} received"] = e

    threads = [
        threading.Thread(target=work, args=(name, end), daemon=True)
        for work, name, end in (
            (send, "there", left), (receive, "there", right),
            (send, "back", right), (receive, "back", left),
        )
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("there", "back"):
        for what in ("sent", "received"):
            result = results[f"{name} {what}"]
            assert isinstance(result, str), f"{name}, {what}: {result!r}"
        assert results[f"{name} received"] == results[f"{name} sent"], f"bytes changed on {name}"


class UdpFlow:
    """A socket on each of two hosts. Waits for each burst: no datagram may be lost or changed."""

    def __init__(self, source: Host, target: Host, address: object) -> None:
        self.receiver = target.socket(family(address), socket.SOCK_DGRAM)
        self.receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _ROOM)
        self.receiver.bind((str(address), 0))
        self.receiver.settimeout(60)
        self.sender = source.socket(family(address), socket.SOCK_DGRAM)
        self.sender.connect(self.receiver.getsockname()[:2])

    def __enter__(self) -> "UdpFlow":
        return self

    def __exit__(self, *exc: object) -> None:
        self.receiver.close()
        self.sender.close()

    def expect(self, payloads: Sequence[bytes]) -> None:
        for n, payload in enumerate(payloads):
            try:
                got = self.receiver.recv(1 << 16)
            except TimeoutError:
                raise AssertionError(f"lost: datagram {n} of {len(payloads)}") from None
            assert got == payload, f"datagram {n}: {len(got)} bytes, {len(payload)} were sent"

    def exchange(self, payloads: Sequence[bytes]) -> None:
        for payload in payloads:
            self.sender.send(payload)
        self.expect(payloads)

    def exchange_super(self, payload: bytes, segment: int) -> None:
        """Send once with UDP_SEGMENT; expect datagrams of ``segment`` bytes and a shorter last."""
        ancillary = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", segment))]
        self.sender.sendmsg([payload], ancillary)
        self.expect([payload[i : i + segment] for i in range(0, len(payload), segment)])


def exchange_udp(source: Host, target: Host, address: object, largest: int) -> None:
    """Exchange small, large, odd, equal and mixed datagrams, and super-packets.

    largest  the largest UDP payload that fits one packet of the tunnel
    """
    rng = random.Random(largest)
    with UdpFlow(source, target, address) as flow:
        for sizes in (
            [0, 1, 17, 18, 19, 64, 65], [64] * 40, [largest] * 40, [largest, 1, largest, 2],
            [rng.randrange(1, largest) for _ in range(40)], [1200] * 20 + [700],
        ):
            flow.exchange([rng.randbytes(size) for size in sizes])
        for total, segment in (
            (largest * 30, largest), (1200 * 40 + 1, 1200), (64 * 60, 64), (999, 1000),
            (1000 * 2 - 1, 1000),
        ):
            flow.exchange_super(rng.randbytes(total), segment)


@contextlib.contextmanager
def nft_counters(host: Host, device: str, **rules: str) -> Iterator["Counters"]:
    """Let the kernel count the packets that arrive on ``device`` and match nft expressions."""
    # Without the prefix a name could be a keyword of nft.
    counters = "\n".join(f"  counter n_{name} {{}}" for name in rules)
    statements = "\n".join(f"    {rule} counter name n_{name}" for name, rule in rules.items())
    chain = f"type filter hook ingress device {device} priority 0;\n{statements}"
    table = f"watch_{device}"
    host.nft(f"table netdev {table} {{\n{counters}\n  chain c {{\n{chain}\n  }}\n}}\n")
    try:
        yield Counters(host, table)
    finally:
        host.nft(f"delete table netdev {table}\n")


class Counters:
    def __init__(self, host: Host, table: str) -> None:
        self._host, self._table = host, table

    def packets(self) -> dict[str, int]:
        text = self._host.run(["nft", "-j", "list", "table", "netdev", self._table]).stdout
        found = [o["counter"] for o in json.loads(text)["nftables"] if "counter" in o]
        return {c["name"].removeprefix("n_"): c["packets"] for c in found}


def snmp(host: Host, protocol: str) -> dict[str, int]:
    """Return the host's counters of one protocol, from /proc/net/snmp."""
    lines = host.run(["cat", "/proc/net/snmp"]).stdout.splitlines()
    names, values = (
        line.split()[1:] for line in lines if line.startswith(f"{protocol}:")
    )
    return dict(zip(names, map(int, values), strict=True))


def snmp6(host: Host) -> dict[str, int]:
    """Return the host's counters of IPv6, from /proc/net/snmp6."""
    lines = host.run(["cat", "/proc/net/snmp6"]).stdout.splitlines()
    return {name: int(value) for name, value in map(str.split, lines)}


def device_counters(host: Host, device: str) -> dict[str, int]:
    text = host.run(["ip", "-j", "-s", "link", "show", "dev", device]).stdout
    stats = json.loads(text)[0]["stats64"]
    return {"received": stats["rx"]["packets"], "sent": stats["tx"]["packets"]}


Packets = dict[str, dict[str, int]]
Drops = dict[tuple[str, str], int]


def settled(forwarder: Forwarder) -> tuple[Packets, Drops]:
    """Return the status' ``packets`` and the drops of one moment, when no packets move.

    The kernel sends packets of its own on a new device (router solicitations, multicast reports).
    So ``packets`` must be the same in four reads in a row, with the read of the drops among them.
    """
    seen: list[Packets] = []

    def look() -> tuple[Packets, Drops] | None:
        drops = forwarder.drops()
        seen.append(forwarder.status()["packets"])
        quiet = len(seen) > 3 and seen[-4:] == [seen[-1]] * 4
        if quiet and not any(p["queued"] for p in seen[-1].values()):
            return seen[-1], drops
        time.sleep(0.05)
        return None

    return wait_for(look, "the forwarder to be idle")


def settled_packets(forwarder: Forwarder) -> Packets:
    return settled(forwarder)[0]


def assert_invariant(forwarder: Forwarder) -> Packets:
    """read + generated = delivered + consumed + dropped + queued. The drops by reason add up."""
    packets, drops = settled(forwarder)
    for direction, p in packets.items():
        came = p["read"] + p["generated"]
        went = p["delivered"] + p["consumed"] + p["dropped"] + p["queued"]
        assert came == went, f"{direction}: {p}"
        by_reason = sum(n for (where, _), n in drops.items() if where == direction)
        assert by_reason == p["dropped"], f"{direction}: {p}, {drops}"
    return packets
