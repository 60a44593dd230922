"""Endpoints and routes: accepted values, refused values and the errors; the lazy package."""

import subprocess
import sys
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

import udptun
from udptun import _core, model
from udptun.cli import reasons
from udptun.drops import DIRECTIONS, DROP_REASONS
from udptun.errors import FieldError, UdptunError
from udptun.model import SOURCE_CHECKS, Endpoint, Mark, Route, RouteDiff

networks = st.one_of(
    st.builds(lambda a, n: ip_network((a, n), strict=False), st.ip_addresses(v=4),
              st.integers(0, 32)),
    st.builds(lambda a, n: ip_network((a, n), strict=False),
              st.ip_addresses(v=6), st.integers(0, 128)),
)


routes = st.builds(
    Route, networks, st.ip_addresses().filter(model.is_unicast), st.integers(1, 65535),
    st.none() | st.integers(model.MIN_MTU6, model.MAX_MTU), st.booleans(),
    st.sampled_from((None, model.ANY_PORT, (1, 1), (9000, 9000), (9000, 9015), (2, 65535))),
)


def field_of(excinfo: pytest.ExceptionInfo[FieldError]) -> tuple[str, object]:
    return excinfo.value.field, excinfo.value.value


@given(routes)
def test_route_text_and_json_round_trip(route: Route) -> None:
    assert Route.from_words(str(route).split()) == route
    assert Route.from_json(route.to_json()) == route


@given(st.ip_addresses(), st.integers(1, 65535))
def test_endpoint_text_round_trip(address: object, port: int) -> None:
    endpoint = Endpoint(address, port)  # type: ignore[arg-type]
    assert Endpoint.parse(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    ("text", "address", "port"),
    [
        ("192.0.2.1", "192.0.2.1", 8285),
        ("192.0.2.1:9", "192.0.2.1", 9),
        ("2001:db8::1", "2001:db8::1", 8285),
        ("[2001:db8::1]", "2001:db8::1", 8285),
        ("[2001:db8::1]:9", "2001:db8::1", 9),
    ],
)
def test_endpoint(text: str, address: str, port: int) -> None:
    assert Endpoint.parse(text) == Endpoint(ip_address(address), port)
    assert Endpoint.parse(text, default_port=8286).port == (8286 if port == 8285 else port)


@pytest.mark.parametrize(
    "text",
    ["", ":", "192.0.2.1:", "192.0.2.1:0", "192.0.2.1:65536", "192.0.2.1:+1", "192.0.2.1:1:2",
     "[2001:db8::1", "[2001:db8::1]9", "[2001:db8::1]:", "fe80::1%eth0", "host:1", "192.0.2.1/32"],
)
def test_invalid_endpoint_is_refused(text: str) -> None:
    with pytest.raises(FieldError, match="--listen"):
        Endpoint.parse(text, "--listen")


def test_route_defaults() -> None:
    route = Route.from_words(["10.244.2.0/24", "via", "192.0.2.2"])
    assert route == Route(ip_network("10.244.2.0/24"), ip_address("192.0.2.2"), 8285, None)
    assert str(route) == "10.244.2.0/24 via 192.0.2.2 port 8285"
    words = ["10.0.0.1", "via", "192.0.2.2", "mtu", "1400", "port", "9"]
    host = Route(ip_network("10.0.0.1/32"), ip_address("192.0.2.2"), 9, 1400)
    assert Route.from_words(words) == host
    for flag in ("probe", "express", "ecn"):
        for words_with_flag in ([*words, flag], [*words[:3], flag, *words[3:]]):
            flagged = Route.from_words(words_with_flag)
            assert flagged == replace(host, **{flag: True})
        assert str(flagged) == f"10.0.0.1/32 via 192.0.2.2 port 9 mtu 1400 {flag}"
        assert Route.from_json(flagged.to_json()) == flagged
        assert flag not in host.to_json()


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("", "route", ""),
        ("10.0.0.0/8 via", "route", "10.0.0.0/8 via"),
        ("10.0.0.0/8 dev eth0", "route", "10.0.0.0/8 dev eth0"),
        ("10.0.0.0/8 via 192.0.2.1 metric 3", "route", "metric"),
        ("10.0.0.0/8 via 192.0.2.1 port 1 port 2", "route", "port"),
        ("10.0.0.0/8 via 192.0.2.1 port", "port", ""),
        ("10.0.0.0/8 via 192.0.2.1 probe probe", "route", "probe"),
        ("10.0.0.0/8 via 192.0.2.1 probe yes", "route", "yes"),
        ("10.0.0.0/8 via 192.0.2.1 express express", "route", "express"),
        ("10.0.0.0/8 via 192.0.2.1 ecn ecn", "route", "ecn"),
        ("10.0.0.0/8 via 192.0.2.1 port 0", "port", 0),
        ("10.0.0.0/8 via 192.0.2.1 port 70000", "port", 70000),
        ("10.0.0.0/8 via 192.0.2.1 port -1", "port", "-1"),
        ("10.0.0.0/8 via 192.0.2.1 source-port", "source-port", ""),
        ("10.0.0.0/8 via 192.0.2.1 source-port 1 source-port 1", "route", "source-port"),
        ("10.0.0.0/8 via 192.0.2.1 source_port 1", "route", "source_port"),
        ("10.0.0.0/8 via 192.0.2.1 source-port all", "source_port", "all"),
        ("10.0.0.0/8 via 192.0.2.1 source-port 0", "source_port", "0"),
        ("10.0.0.0/8 via 192.0.2.1 source-port 9-8", "source_port", "9-8"),
        ("10.0.0.0/8 via 192.0.2.1 source-port 1-65536", "source_port", "1-65536"),
        ("10.0.0.0/8 via 192.0.2.1 mtu 67", "mtu", 67),
        ("10.0.0.0/8 via 192.0.2.1 mtu 65536", "mtu", 65536),
        ("10.0.0.0/8 via 192.0.2.256", "via", "192.0.2.256"),
        ("10.0.0.0/8 via 0.0.0.0", "via", "0.0.0.0"),
        ("10.0.0.0/8 via 224.0.0.1", "via", "224.0.0.1"),
        ("10.0.0.0/8 via 255.255.255.255", "via", "255.255.255.255"),
        ("10.0.0.0/8 via ::", "via", "::"),
        ("10.0.0.0/8 via ff02::1", "via", "ff02::1"),
        ("10.0.0.0/8 via ::ffff:192.0.2.1", "via", "::ffff:192.0.2.1"),
        ("fd00::/64 via 192.0.2.1 mtu 1279", "mtu", 1279),
        ("10.0.0.0/8 via 192.0.2.0/24", "via", "192.0.2.0/24"),
        ("10.0.0.0/8 via fe80::1%eth0", "via", "fe80::1%eth0"),
        ("10.0.0.1/8 via 192.0.2.1", "dst", "10.0.0.1/8"),
        ("10.0.0.0/33 via 192.0.2.1", "dst", "10.0.0.0/33"),
        ("10.0.0.0/ via 192.0.2.1", "dst", "10.0.0.0/"),
        ("10.0.0.0/255.0.0.0 via 192.0.2.1", "dst", "10.0.0.0/255.0.0.0"),
        ("010.0.0.0/8 via 192.0.2.1", "dst", "010.0.0.0/8"),
        ("default via 192.0.2.1", "dst", "default"),
    ],
)
def test_invalid_route_text_is_refused(text: str, field: str, value: object) -> None:
    with pytest.raises(FieldError, match=r"^line 7: ") as caught:
        Route.from_words(text.split(), "line 7")
    assert field_of(caught) == (field, value)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (None, "route"),
        ([], "route"),
        ({}, "dst"),
        ({"dst": "10.0.0.0/8"}, "via"),
        ({"dst": 10, "via": "192.0.2.1"}, "dst"),
        ({"dst": "10.0.0.0/8", "via": None}, "via"),
        ({"dst": "10.0.0.0/8", "via": "192.0.2.1", "metric": 1}, "route"),
        ({"dst": "10.0.0.0/8", "via": "192.0.2.1", "port": None}, "port"),
        ({"dst": "10.0.0.0/8", "via": "192.0.2.1", "port": True}, "port"),
        ({"dst": "10.0.0.0/8", "via": "192.0.2.1", "port": 1.0}, "port"),
        ({"dst": "10.0.0.0/8", "via": "192.0.2.1", "mtu": []}, "mtu"),
        ({"dst": "10.0.0.0/8", "via": "192.0.2.1", "probe": None}, "probe"),
        ({"dst": "10.0.0.0/8", "via": "192.0.2.1", "probe": 1}, "probe"),
        ({"dst": "10.0.0.0/8", "via": "192.0.2.1", "probe": "true"}, "probe"),
        ({"dst": "10.0.0.0/8", "via": "192.0.2.1", "express": 1}, "express"),
        ({"dst": "10.0.0.0/8", "via": "192.0.2.1", "ecn": "true"}, "ecn"),
    ],
)
def test_invalid_route_json_is_refused(value: object, field: str) -> None:
    with pytest.raises(FieldError, match=r"^routes\[3\]: ") as caught:
        Route.from_json(value, "routes[3]")
    assert caught.value.field == field


def test_the_text_and_json_of_source_ports() -> None:
    start = "10.0.0.0/8 via 192.0.2.1 port 8285"
    for text, ports, value in (
        ("any", model.ANY_PORT, "any"), ("1-65535", model.ANY_PORT, "any"),
        ("9000", (9000, 9000), 9000), ("9000-9015", (9000, 9015), "9000-9015"),
    ):
        route = Route.from_words(f"{start} source-port {text}".split())
        assert (route.source_port, route.to_json()["source_port"]) == (ports, value)
        assert str(route) == f"{start} source-port {value}"
    plain = Route.from_words(start.split())
    assert plain.source_port is None and "source_port" not in plain.to_json()
    assert Route.from_json({**plain.to_json(), "source_port": None}) == plain


@pytest.mark.parametrize("text", ["0x1000/0x1000", "4096/4096", "0x1000/4096"])
def test_a_mark(text: str) -> None:
    assert Mark.parse(text) == Mark(0x1000, 0x1000)
    assert str(Mark.parse(text)) == "0x1000/0x1000"
    assert Mark.parse("7") == Mark(7, 0xFFFFFFFF)


@pytest.mark.parametrize("text", ["", "x", "0", "0/1", "1/0", "3/1", "-1", "1/", "/1", "1/2/3",
                                  "0x100000000", "1/0x1ffffffff", "010"])
def test_a_mark_that_is_not_valid_is_refused(text: str) -> None:
    with pytest.raises(FieldError, match="VALUE/MASK"):
        Mark.parse(text)


def test_host_bits_are_refused_with_the_prefix() -> None:
    with pytest.raises(FieldError, match=r"without host bits \(10\.0\.0\.0/8\)"):
        model.parse_prefix("dst", "10.1.2.3/8")


@pytest.mark.parametrize("text", ["10.244.0.0", "10.244.1.7", "fd00::", "", "/16", "10.244.0.0/",
                                  "10.244.0.0/255.255.0.0", "10.244.0.0/-1"])
def test_the_prefix_of_a_network_needs_its_length(text: str) -> None:
    with pytest.raises(FieldError, match="expected a prefix"):
        model.parse_prefix("network", text)


def test_the_destination_of_a_route_may_be_one_address() -> None:
    assert str(model.parse_destination("dst", "10.244.1.7")) == "10.244.1.7/32"
    assert str(model.parse_destination("dst", "fd00::7")) == "fd00::7/128"


def test_diff_to_json() -> None:
    assert RouteDiff(7, 1, 2, 3).to_json() == {
        "generation": 7, "added": 1, "changed": 2, "removed": 3,
    }


# The one list of drop reasons


def test_drop_reasons_are_named_once_and_in_known_directions() -> None:
    names = [reason.name for reason in DROP_REASONS]
    assert len(set(names)) == len(names)
    for reason in DROP_REASONS:
        assert reason.name.isidentifier() and reason.name == reason.name.lower()
        assert reason.directions and set(reason.directions) <= set(DIRECTIONS)
        assert reason.meaning.endswith(".") and "|" not in reason.meaning


def test_docs_drops_md_is_up_to_date(pytestconfig: pytest.Config) -> None:
    text = (pytestconfig.rootpath / "docs" / "drops.md").read_text()
    assert text == reasons.page(), "run python -m udptun.cli.reasons > docs/drops.md"


# The package


def test_public_names_are_in_their_modules() -> None:
    assert set(udptun._HOME_OF) == set(udptun.__all__) - {"__version__"}
    assert set(udptun.__all__) <= set(dir(udptun))
    assert udptun.Route is Route
    assert issubclass(udptun.FieldError, UdptunError)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = udptun.Nonsense


def test_import_udptun_loads_little() -> None:
    script = """
import sys
before = set(sys.modules)
import udptun
new = {name for name in sys.modules if name not in before}
print(sorted(n for n in new if n.startswith("udptun")), *sorted(new & {
    "asyncio", "ipaddress", "socket", "json", "click", "http.client", "dataclasses"}))
assert udptun.__version__
"""
    argv = [sys.executable, "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['udptun', 'udptun._version']"


def test_core_and_model_have_the_same_source_checks():
    assert set(_core.SOURCE_CHECKS) == set(SOURCE_CHECKS)
