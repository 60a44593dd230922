"""The paths, headers and error codes that client and server share."""

import pytest

from udptun.control import protocol
from udptun.errors import (
    ControlError,
    DeviceError,
    FieldError,
    GenerationMismatch,
    RouteExists,
    RouteLoops,
    UdptunError,
)


@pytest.mark.parametrize("dst", ["10.244.2.0/24", "0.0.0.0/0", "2001:db8::/32", "a b%/é"])
def test_route_path_round_trip(dst: str) -> None:
    path = protocol.route_path(dst)
    assert "/" not in path.removeprefix("/v1/routes/")
    assert protocol.parse_route_path(path) == dst


@pytest.mark.parametrize(
    ("path", "dst"),
    [
        ("/v1/routes/10.0.0.0/8", "10.0.0.0/8"),
        ("/v1/routes/10.0.0.0%2f8", "10.0.0.0/8"),
        ("/v1/routes/%ff", "�"),
        ("/v1/routes/", None),
        ("/v1/routes", None),
        ("/v1/route/10.0.0.0/8", None),
    ],
)
def test_parse_route_path(path: str, dst: str | None) -> None:
    assert protocol.parse_route_path(path) == dst


@pytest.mark.parametrize(
    ("value", "generation"), [(None, None), ("*", None), ('"0"', 0), (' "17" ', 17)]
)
def test_parse_if_match(value: str | None, generation: int | None) -> None:
    assert protocol.parse_if_match(value) == generation


def test_if_match_round_trip() -> None:
    assert protocol.parse_if_match(protocol.format_generation(2**40)) == 2**40


@pytest.mark.parametrize("value", ["7", '""', '"', 'W/"7"', '"-1"', '"x"', '"1","2"', '"٣"', ""])
def test_invalid_if_match_is_refused(value: str) -> None:
    with pytest.raises(ControlError, match="If-Match") as caught:
        protocol.parse_if_match(value)
    assert caught.value.code == "bad_request"


def test_parse_if_none_match() -> None:
    assert protocol.parse_if_none_match("*") is True
    assert protocol.parse_if_none_match(None) is False
    with pytest.raises(ControlError, match="If-None-Match"):
        protocol.parse_if_none_match('"7"')


def test_parse_flag() -> None:
    assert [protocol.parse_flag("peers", v) for v in (None, "1", "0")] == [True, True, False]
    with pytest.raises(ControlError, match="peers: 'yes' is not valid: expected 0 or 1"):
        protocol.parse_flag("peers", "yes")


def test_errors_of_a_request_have_a_code_and_a_status() -> None:
    codes = {
        FieldError("via", "x", "an address"): "bad_route",
        FieldError("body", "x", "JSON"): "bad_json",
        RouteExists("there"): "route_exists",
        RouteLoops("10.244.3.0/24", "10.244.3.7", "udptun0"): "route_loops",
        GenerationMismatch("moved"): "generation_mismatch",
        ControlError("too_large", "big"): "too_large",
    }
    for exc, code in codes.items():
        found = protocol.error_of(exc)
        assert found is not None
        assert (found.code, found.message) == (code, str(exc))
        assert code in protocol.STATUS_OF
    for failure in (DeviceError(5, "tun"), UdptunError("x"), ValueError("bug")):
        assert protocol.error_of(failure) is None


def test_parse_error() -> None:
    error = protocol.parse_error(409, b'{"error":{"code":"route_exists","message":"there"}}')
    assert (error.code, error.message) == ("route_exists", "there")


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error":1}', b'{"error":{}}', b"\xff"])
def test_error_in_another_format_becomes_internal(body: bytes) -> None:
    error = protocol.parse_error(502, body)
    assert error.code == "internal"
    assert "502" in error.message
