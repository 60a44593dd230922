"""Versions: which one the delegate gets, and results in the format of another version."""

from __future__ import annotations

from typing import Any

import pytest

from udptun.cni.versions import SUPPORTED, common, convert

NEW: dict[str, Any] = {
    "cniVersion": "1.0.0", "ips": [{"address": "10.244.1.2/24"}, {"address": "fd00::2/64"}],
    "routes": [{"dst": "0.0.0.0/0"}],
}
OLD: dict[str, Any] = {
    "cniVersion": "0.4.0", "routes": [{"dst": "0.0.0.0/0"}],
    "ips": [{"version": "4", "address": "10.244.1.2/24"},
            {"version": "6", "address": "fd00::2/64"}],
}
OLDEST: dict[str, Any] = {"cniVersion": "0.2.0", "ip4": {"ip": "10.244.1.2/24"}}


@pytest.mark.parametrize(("wanted", "offered", "expected"), [
    ("1.1.0", ["0.4.0", "1.0.0"], "1.0.0"),
    ("0.3.1", ["0.3.0", "0.3.1", "1.0.0"], "0.3.1"),
    ("1.0.0", ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0"], "0.4.0"),
    ("1.1.0", list(SUPPORTED), "1.1.0"),
    ("1.1.0", [*SUPPORTED, "2.0.0"], "1.1.0"),
    ("0.3.1", ["1.0.0"], None),
    ("1.1.0", [], None),
    ("1.1.0", [5, None, {}], None),
])
def test_the_common_version(wanted: str, offered: list[object], expected: str | None) -> None:
    assert common(wanted, offered) == expected


@pytest.mark.parametrize(("result", "version", "expected"), [
    (NEW, "1.1.0", {**NEW, "cniVersion": "1.1.0"}),
    (NEW, "0.4.0", OLD),
    (OLD, "1.0.0", NEW),
    (OLD, "0.3.1", {**OLD, "cniVersion": "0.3.1"}),
    (OLDEST, "0.2.0", OLDEST),
    (OLDEST, "1.0.0", OLDEST),
    (NEW, "0.2.0", NEW),
    ({"cniVersion": "1.0.0", "ips": None}, "0.4.0", {"cniVersion": "0.4.0", "ips": None}),
    ({"cniVersion": "1.0.0", "ips": [1]}, "0.4.0", {"cniVersion": "0.4.0", "ips": [1]}),
    ({"cniVersion": []}, "0.4.0", {"cniVersion": []}),
])
def test_conversion(result: dict[str, Any], version: str, expected: dict[str, Any]) -> None:
    assert convert(result, version) == expected
