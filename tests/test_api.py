"""The Python API as a program uses it that does not know udptun: text for addresses, clear errors,
typed answers, the same names in the forwarder and in its client."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import errno
import inspect
import ipaddress
import json
import pickle
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

import udptun
from tests.own_netns import in_own_netns, sh
from udptun import (
    ControlClient,
    DeviceError,
    Endpoint,
    FieldError,
    Forwarder,
    ForwarderConfig,
    OffloadRequest,
    Route,
    UdptunError,
    answers,
)
from udptun.answers import Answer
from udptun.device.tun import Tun
from udptun.forwarder import config as config_module
from udptun.model import Mark

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text())["components"]["schemas"]
ANSWERS = [kind for kind in vars(answers).values()
           if inspect.isclass(kind) and issubclass(kind, Answer) and kind is not Answer]


def test_text_is_accepted_where_addresses_are_meant() -> None:
    text = ForwarderConfig(
        "192.0.2.1", addresses="10.244.1.0", networks=["10.244.0.0/16"], control="/run/x.sock",
        state_file="state", offload="auto,-udp-gso", mark="0x1000/0x1000", subnets="10.244.1.0/24")
    values = ForwarderConfig(
        (Endpoint(ipaddress.IPv4Address("192.0.2.1")),),
        addresses=(ipaddress.IPv4Address("10.244.1.0"),),
        networks=(ipaddress.IPv4Network("10.244.0.0/16"),), control=Path("/run/x.sock"),
        state_file=Path("state"), offload=OffloadRequest.parse("auto,-udp-gso"),
        mark=Mark(0x1000, 0x1000), subnets=(ipaddress.IPv4Network("10.244.1.0/24"),))
    assert text == values
    assert ForwarderConfig(["192.0.2.1:9000", Endpoint.parse("[2001:db8::1]")]).listen == (
        Endpoint.parse("192.0.2.1:9000"), Endpoint.parse("[2001:db8::1]:8285"))


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"listen": "192.0.2"}, "listen"), ({"listen": 8285}, "listen"), ({"listen": ()}, "listen"),
     ({"listen": None}, "listen"),
     ({"addresses": "10.244.1.0/24"}, "addresses"), ({"addresses": [7]}, "addresses"),
     ({"networks": "10.244.0.0"}, "networks"), ({"networks": ["10.244.1.1/16"]}, "networks"),
     ({"subnets": 5}, "subnets"), ({"control": 5}, "control"), ({"mark": "x"}, "mark"),
     ({"mark": 5}, "mark"), ({"mtu": "1400"}, "mtu"), ({"mtu": 1}, "mtu"),
     ({"workers": "auto"}, "workers"), ({"offload": "fast"}, "offload"),
     ({"offload": 1}, "offload"),
     ({"source_check": "no"}, "source-check"), ({"tun": ""}, "tun"), ({"tun": "x" * 16}, "tun"),
     ({"tun": 5}, "tun")],
)
def test_an_error_names_the_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(FieldError) as raised:
        ForwarderConfig(**{"listen": "192.0.2.1"} | changes)  # type: ignore[arg-type]
    assert raised.value.field.partition(" ")[0] == field


def test_a_route_is_parsed_like_an_endpoint() -> None:
    assert Route.parse("10.244.2.0/24 via 192.0.2.2 mtu 1400 probe") == Route.make(
        "10.244.2.0/24", "192.0.2.2", mtu=1400, probe=True)
    network = ipaddress.ip_network("10.244.2.0/24")
    assert Route.make(network, ipaddress.ip_address("192.0.2.2")).dst == network
    with pytest.raises(FieldError, match="route: 7 is not valid"):
        Route.parse(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ANSWERS, ids=lambda kind: kind.__name__)
def test_the_typed_answers_have_the_fields_of_the_openapi_document(kind: type[Answer]) -> None:
    hints = {name for name in inspect.get_annotations(kind) if not name.startswith("_")}
    assert hints == set(SCHEMAS[kind.__name__]["properties"])


def test_the_objects_inside_an_answer_have_their_declared_types() -> None:
    for kind in ANSWERS:
        hints = get_type_hints(kind)
        inner = {name for name, hint in hints.items() if not name.startswith("_") and any(
            f"answers.{other.__name__}" in str(hint) or hint is other for other in ANSWERS)}
        assert inner == set(kind._types), kind
        for name, other in kind._types.items():
            assert other.__name__ in str(hints[name])


def test_an_answer_is_a_dict_and_an_object() -> None:
    peer = {"endpoint": "192.0.2.2:8285", "probe": {"rtt_us": 7}, "last_error": None, "new": 1}
    status = answers.Status({"peers": [peer], "device": {"mtu": 1472}})
    assert status["peers"][0]["endpoint"] == status.peers[0].endpoint == "192.0.2.2:8285"
    assert (status.device.mtu, status.peers[0].probe.rtt_us, status.peers[0].new) == (1472, 7, 1)
    assert status.peers[0].last_error is None
    assert pickle.loads(pickle.dumps(status)) == status == json.loads(json.dumps(status))
    with pytest.raises(AttributeError, match="Status has no field 'peer': it has peers, device"):
        _ = status.peer


SHARED = ("add_route", "put_route", "delete_route", "replace_routes", "routes", "status", "peers",
          "drops", "trace", "probe", "set_standby")


def test_the_client_has_the_names_of_the_forwarder() -> None:
    for name in SHARED:
        assert callable(getattr(Forwarder, name)), name
        assert callable(getattr(ControlClient, name)), name


def test_every_public_name_can_be_imported_and_is_explained() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    for name in udptun.__all__:
        assert getattr(udptun, name) is not None
        assert name == "__version__" or f"`{name}" in page, name


@in_own_netns
async def test_a_forwarder_and_its_client_with_text_alone(tmp_path: Path) -> None:
    sh("ip address add 192.0.2.1/32 dev lo")
    path = str(tmp_path / "udptun.sock")
    config = ForwarderConfig("192.0.2.1", addresses="10.244.1.0", control=path)
    async with Forwarder(config) as forwarder:
        await forwarder.replace_routes(["10.244.2.0/24 via 192.0.2.2 probe"])
        await forwarder.put_route("10.244.3.0/24 via 192.0.2.3")
        await forwarder.add_route("10.244.4.0/24 via 192.0.2.3")
        await forwarder.delete_route("10.244.4.0/24")
        assert [str(route.dst) for route in await forwarder.routes()] == [
            "10.244.2.0/24", "10.244.3.0/24"]
        assert forwarder.trace("10.244.3.7").peer == "192.0.2.3:8285"
        assert not (await forwarder.probe("192.0.2.2", timeout=0.1)).answered
        status = await forwarder.status()
        assert status.device.listen == ["192.0.2.1:8285"]
        assert {peer.endpoint for peer in await forwarder.peers()} == {
            peer.endpoint for peer in status.peers}
        assert {drop.direction for drop in forwarder.drops()} == {"encap", "decap"}
        await asyncio.to_thread(_as_client, path)
        assert len(await forwarder.routes()) == 1


def _as_client(path: str) -> None:
    with ControlClient(path) as client:
        assert client.status().route_count == 2
        client.replace_routes(["10.244.2.0/24 via 192.0.2.2"])
        client.add_route("10.244.5.0/24 via 192.0.2.2")
        client.put_route("10.244.5.0/24 via 192.0.2.3")
        assert client.trace(ipaddress.ip_address("10.244.5.1")).peer == "192.0.2.3:8285"
        client.delete_route(ipaddress.ip_network("10.244.5.0/24"))
        with pytest.raises(FieldError, match="dst"):
            client.put_route("x via 192.0.2.2")


@in_own_netns
async def test_a_tun_that_is_gone_raises_inside_async_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise DeviceError(errno.EPERM, "opening /dev/net/tun: Operation not permitted")

    sh("ip address add 192.0.2.1/32 dev lo")
    monkeypatch.setattr(Tun, "reopen", refused)
    after = False
    with pytest.raises(UdptunError, match="udptun0 was deleted"):
        async with Forwarder(ForwarderConfig("192.0.2.1")):
            sh("ip link del udptun0")
            await asyncio.sleep(60)
            after = True
    assert not after
    await asyncio.sleep(0)  # this task is not cancelled any more


@in_own_netns
async def test_a_cancelled_body_stays_cancelled() -> None:
    sh("ip address add 192.0.2.1/32 dev lo")

    async def body() -> None:
        async with Forwarder(ForwarderConfig("192.0.2.1")):
            started.set()
            await asyncio.sleep(60)

    started = asyncio.Event()
    task = asyncio.create_task(body())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_the_declared_arguments_of_the_configuration_are_its_fields() -> None:
    """The class declares its arguments by hand, because they also accept text."""
    tree = ast.parse(Path(config_module.__file__).read_text())
    [declared] = [node for node in ast.walk(tree)
                  if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    assert [argument.arg for argument in declared.args.args[1:]] == [
        field.name for field in dataclasses.fields(ForwarderConfig)]
