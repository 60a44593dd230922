"""The real forwarder, controlled with the commands that an operator uses.

Also compares the fake forwarder of the other tests with the real one: answers and metrics.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.control import fakes
from tests.control.test_flannel import message
from tests.own_netns import in_own_netns, sh
from udptun.control.client import ControlClient
from udptun.control.metrics import Metrics
from udptun.errors import ControlError
from udptun.instance import Instance
from udptun.lab.hosts import wait_for
from udptun.model import Route, parse_address
from udptun.takeover.channel import Channel, close_all
from udptun.takeover.message import DESCRIPTORS, Hello

UDPTUN = [sys.executable, "-m", "udptun"]
ROUTE = Route.make("10.244.2.0/24", "192.0.2.2", mtu=1400)


class Running:
    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.routes = folder / "routes"
        self.socket = folder / "run" / "udptun.sock"
        self.flannel = folder / "run" / "flannel.sock"

    def __call__(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*UDPTUN, "--socket", str(self.socket), *argv], capture_output=True, text=True,
            check=False, timeout=60,
        )

    def client(self) -> ControlClient:
        return ControlClient(str(self.socket))

    def wait_for_log(self, text: str) -> None:
        """Read the log up to the line that contains ``text``."""
        assert self.process.stderr is not None
        seen = []
        for line in self.process.stderr:
            seen.append(line)
            if text in line:
                return
        raise AssertionError(f"{text!r} was not logged: {''.join(seen)}")


@contextmanager
def forwarding(*argv: str, table: str = "") -> Iterator[Running]:
    sh("ip link add utD0 type veth peer name utD1", "ip address add 192.0.2.1/24 dev utD0",
       "ip link set utD0 up", "ip link set utD1 up")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = subprocess.Popen(
            [*UDPTUN, "forward", "--tun", "utD", "--address", "10.244.1.0",
             "--network", "10.244.0.0/16", "--listen", "192.0.2.1", "-v",
             "--control", str(folder / "run" / "udptun.sock"),
             "--flannel-control", str(folder / "run" / "flannel.sock"),
             "--routes", str(folder / "routes"), *argv],
            stderr=subprocess.PIPE, text=True,
        )
        running = Running(folder, process)
        try:
            running.routes.write_text(table)
            running.wait_for_log("control socket at")
            yield running
        finally:
            process.kill()
            process.communicate()


def shape(value: Any) -> Any:
    """Return the value; replace each value that differs from run to run by its type."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return "number" if isinstance(value, int | float) else type(value).__name__


@in_own_netns
def test_the_fake_forwarder_answers_like_the_real_one() -> None:
    fake = fakes.FakeForwarder()
    with forwarding("--offload", "auto,-udp-merge") as udptun, udptun.client() as client:
        client.put(replace(ROUTE, probe=True))
        assert not client.probe("192.0.2.2")["answered"]
        real, faked = client.status(), fakes.status_of(1, 1)
        client.put(ROUTE)
        assert client.status(peers=False).keys() == real.keys()
        assert client.status(peers=False)["peers"] == []
        assert client.status(peers=False)["route_count"] == 1
        # Some values of an answered probe are null in the real one.
        assert set(real["peers"][0]["probe"]) == set(faked["peers"][0]["probe"])
        real["peers"][0]["probe"] = faked["peers"][0]["probe"]
        real["peers"][0]["last_seen_seconds"] = 1.0  # null in the real one: no datagram arrived
        real["peers"][0]["last_error"] = faked["peers"][0]["last_error"]  # null: no error arrived
        real["capabilities"]["off"] = faked["capabilities"]["off"]  # depends on the kernel
        assert shape(real) == shape(faked)
        assert set(real["packets"]) == set(faked["packets"])
        reasons = [(d["reason"], d["direction"]) for d in client.drops()]
        assert sorted(reasons) == sorted((d["reason"], d["direction"]) for d in fake.drops())
        fake.table[ROUTE.dst] = ROUTE
        for address in ("10.244.2.9", "10.9.9.9"):
            there = fake.trace(parse_address("address", address))
            assert client.trace(address) == there | {"mtu": there["mtu"] and 1400}

        # These appear with the first answered probe, or the first datagram that the kernel refuses.
        later = {"udptun_probe_loss_ratio", "udptun_round_trip_seconds", "udptun_send_errors"}

        def series(text: str) -> set[tuple[str, tuple[str, ...]]]:
            return {
                (sample.name, tuple(sample.labels.values()))
                for family in text_string_to_metric_families(text) if family.name not in later
                for sample in family.samples
            }

        assert series(client.metrics()) == series(Metrics(fake).render("")[0].decode())


@in_own_netns
def test_operator_commands() -> None:
    with forwarding(table="10.244.3.0/24 via 192.0.2.3\n") as udptun:
        assert udptun("route", "add", *str(ROUTE).split()).returncode == 0
        assert udptun("route", "add", *str(ROUTE).split()).returncode == 0
        other = udptun("route", "add", "10.244.2.0/24", "via", "192.0.2.9")
        assert (other.returncode, "route_exists" in other.stderr) == (1, True)
        unreachable = udptun("route", "add", "10.9.0.0/16", "via", "2001:db8::1")
        assert unreachable.returncode == 1
        assert "all listeners are IPv4" in unreachable.stderr
        assert "trace" not in unreachable.stderr.lower()
        listed = json.loads(udptun("route", "list", "-o", "json").stdout)
        assert [route["dst"] for route in listed["routes"]] == ["10.244.2.0/24", "10.244.3.0/24"]
        assert "mtu:     1400" in udptun("trace", "10.244.2.9").stdout
        assert "drop (no_route)" in udptun("trace", "10.9.9.9").stdout

        assert udptun("route", "sync", str(udptun.routes)).stdout == (
            "added 0, changed 0, removed 1 (generation 3)\n"
        )
        udptun.routes.write_text("10.244.4.0/24 via 192.0.2.4\n10.244.5.0/24 via invalid\n")
        wrong = udptun("route", "sync", str(udptun.routes))
        assert f"{udptun.routes}: line 2: via: 'invalid' is not valid" in wrong.stderr
        udptun.process.send_signal(signal.SIGHUP)
        udptun.wait_for_log("line 2: via: 'invalid'")
        assert "10.244.3.0/24" in udptun("route", "list").stdout

        types = [json.loads(line)["type"]
                 for line in udptun("events", "-o", "json").stdout.splitlines()]
        assert types[0] == "hello"
        assert {"route_added", "route_removed", "routes_replaced"} <= set(types)

        assert udptun("stop").returncode == 0
        udptun.wait_for_log(f"stop requested at {udptun.socket}")
        assert udptun.process.wait(60) == 0
        assert not udptun.socket.exists() and not udptun.flannel.exists()
        assert "utD:" not in sh("ip link show")
        assert udptun("status").returncode == 1


@in_own_netns
def test_flannel_messages_change_routes_and_stop_the_forwarder() -> None:
    with forwarding() as udptun, udptun.client() as client:
        events = udptun.client().events()
        next(events)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as flannel:
            flannel.connect(str(udptun.flannel))
            flannel.send(message(1))
            assert next(events)["dst"] == "10.244.2.0/24"
            assert client.routes()["routes"][0]["via"] == "192.0.2.2"
            flannel.send(message(3))
        assert udptun.process.wait(60) == 0
        events.close()


@contextmanager
def no_descriptor_left(pid: int) -> Iterator[None]:
    """Let the process open no descriptor."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@in_own_netns
def test_the_sockets_answer_again_after_a_lack_of_descriptors() -> None:
    with forwarding() as udptun, ExitStack() as clients:
        paths = [udptun.socket.with_name("takeover.sock"), udptun.socket, udptun.flannel]
        for path in paths:
            wait_for(path.exists, f"{path}")
        with no_descriptor_left(udptun.process.pid):
            for path in paths:
                kind = socket.SOCK_STREAM if path == udptun.socket else socket.SOCK_SEQPACKET
                client = clients.enter_context(socket.socket(socket.AF_UNIX, kind))
                client.connect(str(path))
            udptun.wait_for_log(f"{udptun.flannel}: accept: {os.strerror(errno.EMFILE)}")
        with udptun.client() as control:
            control.put(ROUTE)
        asyncio.run(ask_for_copies(paths[0]))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as flannel:
            flannel.connect(str(udptun.flannel))
            flannel.send(message(3))
        assert udptun.process.wait(60) == 0


async def ask_for_copies(path: Path) -> None:
    channel = await Channel.connect(path)
    try:
        async with asyncio.timeout(60):
            await channel.send(Hello(want=DESCRIPTORS))
            copies = await channel.receive_descriptors()
        assert len(copies) == 2
        close_all(copies)
    finally:
        channel.close()


@in_own_netns
def test_error_codes_of_an_invalid_table() -> None:
    with forwarding() as udptun, udptun.client() as client:
        for body, code in ((b"{", "bad_json"), (b'{"routes":[{}]}', "bad_route")):
            try:
                client._replace(body, "application/json", None)
            except ControlError as exc:
                assert exc.code == code
            else:
                raise AssertionError(f"{body!r} was taken")


@in_own_netns
def test_a_second_forwarder_on_the_same_socket_is_refused() -> None:
    with forwarding() as udptun:
        second = subprocess.run(
            [*UDPTUN, "forward", "--instance", "second", "--tun", "utD2",
             "--listen", "192.0.2.1:9999", "--control", str(udptun.socket)],
            capture_output=True, text=True, check=False, timeout=60,
        )
        assert second.returncode == 1
        assert f"udptun: error: {udptun.socket} is in use" in second.stderr
        assert "Traceback" not in second.stderr
        assert udptun("status").returncode == 0
        assert "utD2" not in sh("ip link show")


@in_own_netns
def test_two_instances_run_side_by_side() -> None:
    """The UDP endpoint does not depend on the instance: the kernel refuses a second bind."""
    sh("ip address add 192.0.2.1/32 dev lo")

    def start(*argv: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*UDPTUN, "forward", "-v", *argv], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if "control socket at" in line:
                return process
        process.communicate()
        raise AssertionError("".join(seen))

    def output_of(*argv: str) -> str:
        done = subprocess.run([*UDPTUN, *argv], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    blue = start("--instance", "utblue", "--listen", "192.0.2.1:8285")
    try:
        with pytest.raises(AssertionError, match="another process listens there"):
            start("--instance", "utred", "--listen", "192.0.2.1:8285")
        with pytest.raises(AssertionError, match="the instance utblue is already running"):
            start("--instance", "utblue", "--listen", "192.0.2.1:8286")
        red = start("--instance", "utred", "--listen", "192.0.2.1:8286")
        try:
            assert output_of("route", "add", *str(ROUTE).split(), "--instance", "utred") == ""
            assert "device: utblue0" in output_of("status", "--instance", "utblue")
            assert "10.244.2.0/24" not in output_of("route", "list", "--instance", "utblue")
            assert "10.244.2.0/24" in output_of("--instance", "utred", "route", "list")
            assert output_of("stop", "--instance", "utred") == ""
            assert red.wait(60) == 0
            assert "device: utblue0" in output_of("status", "--instance", "utblue")
        finally:
            red.kill()
            red.communicate()
    finally:
        blue.kill()
        blue.communicate()
        for name in ("utblue", "utred"):
            shutil.rmtree(Instance(name).run_dir, ignore_errors=True)
