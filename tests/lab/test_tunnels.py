"""UDPTUN_LAB_ACCELERATE: which forwarders and routes of the lab get the express path."""

import types

import pytest

from udptun.lab import Forwarder, tunnels


@pytest.mark.parametrize(
    ("extra", "routes"),
    [
        ((), ["10.1.0.0/16 via 192.0.2.2 express"]),
        (("--accelerate=off",), ["10.1.0.0/16 via 192.0.2.2"]),
        (("--accelerate", "off"), ["10.1.0.0/16 via 192.0.2.2"]),
    ],
)
def test_an_option_of_the_test_is_kept(monkeypatch, tmp_path, extra, routes):
    monkeypatch.setenv(tunnels.ACCELERATE, "auto")
    started = []
    host = types.SimpleNamespace(
        name="a", lab=types.SimpleNamespace(folder=tmp_path), v4="192.0.2.1",
        start=lambda argv, **_: started.extend(argv))
    made = Forwarder.start(
        host, routes=["10.1.0.0/16 via 192.0.2.2"], extra=extra, wait=False)
    assert made.routes_file.read_text().splitlines() == routes
    assert sum(one.startswith("--accelerate") for one in started) == 1


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        ("10.1.0.0/16 via 192.0.2.2", "10.1.0.0/16 via 192.0.2.2 express"),
        ("10.1.0.0/16 via 192.0.2.2 express", "10.1.0.0/16 via 192.0.2.2 express"),
        ("10.1.0.0/16 via 192.0.2.2  # why", "10.1.0.0/16 via 192.0.2.2 express # why"),
        ("# only a comment", "# only a comment"),
    ],
)
def test_a_comment_stays_at_the_end(route, expected):
    assert tunnels._with_express(route) == expected
