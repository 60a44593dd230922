"""The parts of ``udptun top`` and its rates: cells, keys, samples."""

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.scene import HOSTILE
from tests.control.fakes import FakeForwarder, status_of
from udptun.cli import express
from udptun.cli.answers import Answers
from udptun.cli.samples import UNKNOWN, Change, History, Sample, vxlan_bytes
from udptun.cli.top.cells import ASCII_BARS, amount, bars, count, fit, width
from udptun.cli.top.screen import HELP, Screen
from udptun.cli.top.terminal import keys
from udptun.node.status.report import DeviceCount


@given(st.text(), st.integers(0, 40), st.booleans())
def test_a_cell_has_its_width_and_only_printable_characters(
    text: str, cells: int, right: bool
) -> None:
    shown = fit(text, cells, right)
    assert width(shown) == cells and shown.isprintable()


def test_cells() -> None:
    assert fit("abcdef", 4) == "abc~"
    assert fit("ab", 4, right=True) == "  ab"
    assert fit("日本語", 4) == "日~ "
    assert fit("\x1b[2J", 10) == "\\x1b[2J   "
    assert fit(None, 2) == "- "


@pytest.mark.parametrize(("value", "text"), [
    (None, "-"), (0, "0 B"), (1023, "1023 B"), (1023.6, "1.00 KiB"), (1024 * 99.96, "100 KiB"),
    (1536, "1.50 KiB"), (1024**2 * 10, "10.0 MiB"), (2**60, "1048576 TiB"),
])
def test_amounts(value: float | None, text: str) -> None:
    assert amount(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (None, "-"), (0, "0"), (0.34, "0.3"), (12, "12"), (999.4, "999"), (999.6, "1.0k"),
    (12_345, "12.3k"), (5e6, "5M"), (7e12, "7000G"),
])
def test_counts(value: float | None, text: str) -> None:
    assert count(value) == text


def test_bars() -> None:
    assert bars([0, 1, 4, 8], 4, 4, ASCII_BARS) == " .=@"
    assert bars([8], 60, 6, ASCII_BARS) == "     @"  # the minute has just begun
    assert bars([0.001, 1000], 2, 2, ASCII_BARS) == ".@"
    assert bars([None, 0, 0], 3, 3, ASCII_BARS) == "   "
    assert bars([1, 2, 8, 2], 4, 2, ASCII_BARS) == ":@"
    assert bars([1, 8], 2, 4, ASCII_BARS) == "..@@"  # more cells than values


@pytest.mark.parametrize(("text", "wanted"), [
    ("q/", ["q", "/"]), ("\x1b[A\x1bOB\x1b[6~", ["up", "down", "page down"]), ("\x1b", ["escape"]),
    ("\x1b[200~x", ["x"]), ("\r\x7f", ["enter", "backspace"]), ("\x1b[1;5Cé\x00", ["é"]),
])
def test_keys(text: str, wanted: list[str]) -> None:
    assert [*keys(text)] == wanted


def test_vxlan_devices_are_those_that_the_daemon_has_counted() -> None:
    counts = [DeviceCount(path, device, direction, 1, size, 0, 0) for path, device, direction, size
              in (("vxlan", "flannel.1", "encap", 9), ("vxlan", "flannel.1", "decap", 1),
                  ("udp", "udptun0", "encap", 7), ("udp", "udptun0", "decap", 7))]
    assert vxlan_bytes({"devices": [asdict(count) for count in counts]}) == {"flannel.1": (9, 1)}
    assert vxlan_bytes({}) == vxlan_bytes(None) == {}


def sample(at: float, **changed: Any) -> Sample:
    status = status_of(1, 0) | changed
    taken = Sample(Answers(None, status), FakeForwarder().drops())
    taken.at, taken.vxlan = at, {"flannel.1": (100, 200)}
    return taken


def peer(sent: int) -> dict[str, Any]:
    found: dict[str, Any] = status_of(1, 0)["peers"][0]
    return found | {"encap": {"packets": 1, "bytes": sent}}


def test_rates() -> None:
    before, now = sample(1.0, peers=[peer(100)]), sample(3.0, peers=[peer(300)])
    change = Change(before, now)
    assert change.peers == {"192.0.2.2:8285": (100.0, 0.0)} and change.total == (100.0, 0.0)
    assert change.cpu == [0.0] and change.vxlan == {"flannel.1": (0.0, 0.0)}
    assert change.drops["no_route", "encap"] == 0.0
    assert change.batch == UNKNOWN  # no call


def test_packets_that_pass_in_the_kernel_are_in_no_batch() -> None:
    before = sample(1.0)
    side = {**status_of(1, 0)["packets"]["encap"]}
    worker = status_of(1, 0)["workers"][0]
    now = sample(
        2.0, packets={"encap": side | {"delivered": side["delivered"] + 1100},
                      "decap": status_of(1, 0)["packets"]["decap"]},
        accelerate=status_of(1, 0)["accelerate"] | {"packets": {
            **status_of(1, 0)["accelerate"]["packets"],
            "sent": status_of(1, 0)["accelerate"]["packets"].get("sent", 0) + 1000}},
        workers=[worker | {"syscalls": worker["syscalls"] | {
            "send": worker["syscalls"]["send"] + 10}}])
    change = Change(before, now)
    assert change.packets == (1100.0, 0.0) and change.batch == (10.0, None)
    assert change.kernel == (1000.0, 0.0)


def test_the_express_path_as_text() -> None:
    path = status_of(1, 0)["accelerate"]
    status = status_of(1, 0) | {"accelerate": path | {
        "mode": "auto", "active": True, "reason": None, "devices": ["eth0"],
        "packets": path["packets"] | {"sent": 6, "receive_dropped": 1, "receive_source": 2}}}
    assert [*express.lines(status)] == [
        ("express path", "active on eth0"),
        ("in the kernel", "6 of 8 sent packets (75%), 0 of 20 received packets (0%), "
                          "1 receive_dropped"),
        ("left to workers", "2 receive_source"),
    ]
    assert express.rates(status, (50.0, None), (100.0, 0.0)) == \
        "carries 50% of the sent packets, - of the received"
    status["accelerate"] |= {"active": False, "reason": "there is no device udptun0"}
    assert express.rates(status, (0.0, 0.0), (1.0, 1.0)) == "off: there is no device udptun0"
    assert express.is_wanted(status) and not express.is_wanted(status_of(1, 0))
    assert express.state({}) == express.of_peer({}) == "unknown to this version of the forwarder"


def test_a_counter_that_begins_again_has_no_rate() -> None:
    change = Change(sample(1.0, peers=[peer(300)]), sample(2.0, peers=[peer(100)], pid=77))
    assert change.peers["192.0.2.2:8285"] == (None, 0.0)
    assert change.cpu == [None]
    assert Change(None, sample(1.0)).total == UNKNOWN


def test_the_history_forgets_peers_that_are_gone_for_a_minute() -> None:
    history = History(interval=20)
    for at in range(4):
        history.add(sample(float(at), peers=[peer(100 * at)]))
    paused = history.copy()
    assert [*history.peers["192.0.2.2:8285"]] == [(100.0, 0.0)] * 3
    for at in range(3):
        assert history.peers
        history.add(sample(at + 4.0, peers=[]))
    assert not history.peers and paused.peers and paused.length == 3


def test_the_help_fits_into_80_columns() -> None:
    assert max(map(width, HELP)) <= 80


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (40, 10), (20, 4), (300, 5)])
@pytest.mark.parametrize("key", ["q", "?", "/", "d"])
def test_a_picture_has_the_size_of_the_terminal(size: tuple[int, int], key: str) -> None:
    history = History(1)
    history.add(sample(1.0))
    rows = [peer(5) | {"endpoint": name, "subnets": [name]} for name in HOSTILE]
    history.add(sample(2.0, peers=rows))
    screen = Screen(history, 1, styled=False)
    screen.press(key)
    for _ in HOSTILE:
        screen.press("down")
        lines = screen.lines(*size)
        assert len(lines) == size[1]
        assert all(width(line) <= size[0] and line.isprintable() for line in lines)
