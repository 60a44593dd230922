"""A route whose endpoint the host routes into the forwarder's own TUN is refused."""

import errno
import json
import socket

import pytest

from tests.control.test_flannel import message
from tests.forwarder.test_control import forwarding
from tests.forwarder.test_forwarder import config
from tests.own_netns import in_own_netns, sh
from udptun import Forwarder, Route
from udptun.errors import ControlError, RouteLoops
from udptun.model import parse_address, parse_prefix

GOOD = Route.make("10.244.2.0/24", "192.0.2.2")
INSIDE = Route.make("10.244.3.0/24", "10.244.3.7")
ROUTED = Route.make("10.244.4.0/24", "198.51.100.7")  # outside; the host routes it into the TUN


def text_of(*routes):
    return "".join(f"{route}\n" for route in routes).encode()


def json_of(*routes):
    return json.dumps({"routes": [route.to_json() for route in routes]}).encode()


CHANGES = {
    "add": lambda forwarder, file, bad: forwarder.add_route(bad),
    "put": lambda forwarder, file, bad: forwarder.put_route(bad),
    "replace": lambda forwarder, file, bad: forwarder.replace_routes([GOOD, bad]),
    "json": lambda forwarder, file, bad: forwarder.replace_routes_json(json_of(GOOD, bad)),
    "text": lambda forwarder, file, bad: forwarder.replace_routes_text(text_of(bad, GOOD)),
    "reload": lambda forwarder, file, bad: (file.write_bytes(text_of(bad)), forwarder.reload())[1],
}


@in_own_netns
async def test_every_change_refuses_a_looping_route_and_has_no_effect(tmp_path):
    file = tmp_path / "routes"
    file.write_bytes(text_of(GOOD))
    async with Forwarder(config(routes_file=file)) as forwarder:
        sh("ip route add 198.51.100.7 dev udptun0")
        for name, change in CHANGES.items():
            for bad in (INSIDE, ROUTED):
                with pytest.raises(RouteLoops) as caught:
                    await change(forwarder, file, bad)
                assert caught.value.errno == errno.ELOOP, name
                assert str(caught.value) == (
                    f"route {bad.dst}: via: '{bad.via}' is not valid: expected an address that "
                    "this host does not route into udptun0 itself (ELOOP)")
                assert (forwarder.generation, forwarder.route_count) == (1, 1), name
        await forwarder.delete_route(GOOD.dst)
        sh("ip route del 198.51.100.7 dev udptun0", "ip route add blackhole 198.51.100.7")
        await forwarder.replace_routes([GOOD, ROUTED])
        assert forwarder.route_count == 2


@in_own_netns
async def test_an_underlay_within_the_network_is_usable():
    sh("ip link add under0 type veth peer name wire", "ip link set wire up",
       "ip link set under0 up", "ip address add 10.200.0.1/24 dev under0",
       "ip route add 10.201.0.0/16 via 10.200.0.254")
    options = {"networks": (parse_prefix("network", "10.0.0.0/8"),),
               "addresses": (parse_address("address", "10.244.1.0"),)}
    async with Forwarder(config(**options)) as forwarder:
        await forwarder.put_route(Route.make("10.244.2.0/24", "10.200.0.2"))
        await forwarder.put_route(Route.make("10.244.3.0/24", "10.201.0.3"))
        with pytest.raises(RouteLoops):
            await forwarder.put_route(Route.make("10.244.4.0/24", "10.202.0.4"))
        many = [Route.make(f"10.{n >> 8}.{n & 255}.0/24", f"10.201.{n >> 8}.{n & 255}")
                for n in range(300, 600)]
        await forwarder.replace_routes(many)
        with pytest.raises(RouteLoops, match=r"route 10\.99\.0\.0/24: via: '10\.202\.9\.9'"):
            await forwarder.replace_routes([*many, Route.make("10.99.0.0/24", "10.202.9.9")])
        assert forwarder.route_count == 300


@in_own_netns
@pytest.mark.parametrize("source", ["state_file", "routes_file"])
async def test_at_start_only_the_bad_routes_are_left_out(tmp_path, caplog, source):
    file = tmp_path / "routes"
    bad = [Route.make(f"10.244.{n}.0/24", f"10.244.{n}.7") for n in range(3, 20)]
    file.write_bytes(text_of(*bad, GOOD))
    async with Forwarder(config(**{source: file})) as forwarder:
        (peer,) = (await forwarder.status())["peers"]
        assert peer["subnets"] == [str(GOOD.dst)]
    (line,) = [text for text in caplog.messages if "left out" in text]
    assert line.startswith(
        f"routes of {file} are left out, because this host routes their endpoint into udptun0 "
        f"itself (ELOOP): {bad[0]}, {bad[1]}, ")
    assert line.endswith(f"{bad[9]} and 7 more")
    assert ("via 10.244." in file.read_text()) == (source == "routes_file")


@in_own_netns
def test_the_control_api_and_flannels_messages_refuse_it():
    with forwarding() as udptun, udptun.client() as client:
        why = "route 10.244.3.0/24: via: '10.244.3.7' is not valid: expected an address that " \
            "this host does not route into utD itself (ELOOP)"
        added = udptun("route", "add", *str(INSIDE).split())
        assert added.returncode == 1
        assert why in added.stderr
        for change in (lambda: client.put(INSIDE), lambda: client.add(INSIDE),
                       lambda: client.replace([GOOD, INSIDE]),
                       lambda: client.replace_text(text_of(GOOD, INSIDE))):
            with pytest.raises(ControlError) as caught:
                change()
            assert (caught.value.code, str(caught.value)) == ("route_loops", why)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as flannel:
            flannel.connect(str(udptun.flannel))
            flannel.send(message(1, "10.244.3.0", 24, "10.244.3.7"))
            udptun.wait_for_log(f"message ignored: {why}")
        assert client.routes() == {"generation": 1, "routes": []}
