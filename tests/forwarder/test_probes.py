"""The probes of a real forwarder, with a peer that is a plain socket in the same namespace."""

import asyncio
import contextlib
import json
import socket
import time

from tests.own_netns import in_own_netns, sh
from udptun import Endpoint, Forwarder, ForwarderConfig, Route
from udptun.forwarder.probes import NAT_SECONDS
from udptun.model import PROBE_REPLY, PROBE_REQUEST, ProbeRecord
from udptun.probe.message import decode

HERE, PEER = "192.0.2.1", "192.0.2.9"
ROUTE = Route.make("10.244.2.0/24", PEER, probe=True)


def forwarder():
    sh(f"ip addr replace {HERE}/32 dev lo", f"ip addr replace {PEER}/32 dev lo")
    return Forwarder(ForwarderConfig(listen=(Endpoint.parse(HERE),), source_check="peer"))


@contextlib.contextmanager
def peer(answer_port=8285):
    """Answer the probes to the peer, from a port of its address."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        ports = {}
        for port in {8285, answer_port}:
            ports[port] = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            ports[port].bind((PEER, port))
        sock = ports[8285]

        def answer():
            data, asker = sock.recvfrom(65535)
            probe = decode(data)
            if probe is not None and probe.kind == PROBE_REQUEST:
                ports[answer_port].sendto(probe.reply(0).encode(), asker)

        loop.add_reader(sock, answer)
        try:
            yield
        finally:
            loop.remove_reader(sock)


async def until(events, kind):
    async with asyncio.timeout(60):
        async for event in events:
            if event["type"] == kind:
                return event
    raise AssertionError("the events ended")


@in_own_netns
async def test_a_peer_behind_a_nat_answers_from_another_port():
    async with forwarder() as running:
        with peer(answer_port=40000), running.subscribe() as events:
            await running.put_route(ROUTE)
            event = await until(events, "peer_reachable")
        assert event["endpoint"] == f"{PEER}:8285"
        key = socket.inet_aton(PEER), 8285
        assert running._probes._prober._max_interval == {key: NAT_SECONDS}


@in_own_netns
async def test_the_counters_of_the_express_path_are_read_only_for_probed_peers():
    async with forwarder() as running:
        reads = 0

        def read():
            nonlocal reads
            reads += 1

        probes = running._probes
        probes._read_express = read
        probes._follow_traffic()
        assert reads == 0
        with peer(), running.subscribe() as events:
            await running.put_route(ROUTE)
            await until(events, "peer_reachable")
            probes._follow_traffic()
            assert reads > 0


@in_own_netns
async def test_a_forged_probe_from_another_port_does_not_mean_a_nat():
    async with forwarder() as running:
        with peer(), running.subscribe() as events:
            await running.put_route(ROUTE)
            await until(events, "peer_reachable")
        for kind in (PROBE_REQUEST, PROBE_REPLY):
            running._probes._take(ProbeRecord(
                kind=kind, address=socket.inet_aton(PEER), port=40000, token=7, heard_ms=0,
                size=24, received_ns=time.monotonic_ns(),
            ))
        assert running._probes._prober._max_interval == {}
        assert running._probes.counters()["probes"]["received"] == 1


@in_own_netns
async def test_the_probes_go_on_after_an_error():
    async with forwarder() as running:
        prober = running._probes._prober
        run, failed = prober.run, asyncio.Event()

        def fail_once():
            prober.run = run
            failed.set()
            raise RuntimeError("injected")

        prober.run = fail_once
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        async with asyncio.timeout(60):
            await failed.wait()
        with peer(), running.subscribe() as events:
            await running.put_route(ROUTE)
            await until(events, "peer_reachable")


@in_own_netns
async def test_a_peer_where_nothing_listens_is_unreachable():
    async with forwarder() as running:
        with running.subscribe() as events:
            await running.put_route(ROUTE)
            event = await until(events, "peer_unreachable")
            assert "perhaps because its route to this node has no `probe`" in event["reason"]
            chunks = [chunk async for chunk in running.peer_chunks()]
            (found,) = json.loads(b"".join(chunks))["peers"]
            assert "port unreachable" in found["last_error"]["text"]
            assert found["probe"]["reason"].endswith(f"; {found['last_error']['text']}")
            with peer():
                answer = await running.probe(Endpoint.parse(PEER))
                assert answer["answered"]
                assert await until(events, "peer_reachable")
            chunks = [chunk async for chunk in running.peer_chunks()]
            assert json.loads(b"".join(chunks))["peers"][0]["probe"]["reason"] == ""
