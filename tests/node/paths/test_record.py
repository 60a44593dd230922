"""What is logged about measured paths: one line per failure, and none for a short failure."""

from __future__ import annotations

import logging
from ipaddress import ip_network
from types import SimpleNamespace

import pytest

from tests.node.node_reports import ready
from udptun.node.paths import record
from udptun.node.paths.choice import Choice, Health, Measured
from udptun.node.paths.record import Recorder
from udptun.node.status.report import PairReport

LOST = Measured(Health.LOST, 0.0, "3 probes in a row were not answered")
GOOD = Measured(Health.GOOD, 0.0)
NET = ip_network("10.5.60.0/24")


class Scene:
    """One pair with a simulated clock. Collects the log lines about the pair."""

    def __init__(self, monkeypatch, caplog, chooses):
        self.now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now)
        monkeypatch.setattr(record, "time", clock)
        caplog.set_level(logging.INFO)
        self._caplog, self._report = caplog, ready()
        self.recorder = Recorder(self._report)
        self.pair = SimpleNamespace(
            subnet=NET, chooses=chooses, choice=Choice(1, 0.0),
            report=PairReport("n60", NET, "vxlan", state="reachable"))

    def measured(self, measured):
        self.recorder.measured(self.pair, measured)
        self.recorder.flush()

    def moved(self, path, why, measured):
        self.pair.choice = Choice(0, 0.0, why)
        self.recorder.moved(self.pair, path)
        self.recorder.measured(self.pair, measured)
        self.recorder.flush()

    def later(self, seconds=10.0):
        self.now += seconds
        self.recorder.flush()

    @property
    def lines(self):
        return self._caplog.messages

    @property
    def events(self):
        return [event["type"] for event in self._report.events.recent]


@pytest.fixture
def scene(monkeypatch, caplog):
    return Scene(monkeypatch, caplog, chooses=True)


def test_a_failure_with_a_working_second_path_causes_one_log_line(scene):
    scene.measured(LOST)
    scene.later(1.0)
    scene.moved("udp", LOST.why, GOOD)
    scene.later()
    assert scene.lines == [
        "n60: packets to 10.5.60.0/24 now use UDP instead of VXLAN: "
        "3 probes in a row were not answered"]
    scene.moved("vxlan", "", GOOD)
    scene.later()
    assert scene.lines[1:] == ["n60: packets to 10.5.60.0/24 now use VXLAN: VXLAN works again"]
    assert scene.events == ["peer_unreachable", "path_changed", "peer_reachable", "path_changed"]


def test_the_begin_and_the_end_of_a_failure_of_all_paths_are_logged(scene):
    scene.measured(LOST)
    scene.later(1.0)
    assert scene.lines == []
    scene.later()
    scene.later()
    assert scene.lines == [
        "n60: 10.5.60.0/24 is unreachable: VXLAN: 3 probes in a row were not answered"]
    scene.measured(GOOD)
    scene.later()
    assert scene.lines[1:] == ["n60: 10.5.60.0/24 is reachable"]


def test_a_late_change_of_the_path_reports_the_peer_as_reachable(scene):
    scene.measured(LOST)
    scene.later()
    scene.moved("udp", LOST.why, GOOD)
    scene.later()
    assert [line.split(": ", 1)[1] for line in scene.lines[1:]] == [
        "packets to 10.5.60.0/24 now use UDP instead of VXLAN: "
        "3 probes in a row were not answered",
        "10.5.60.0/24 is reachable"]


def test_a_short_failure_causes_an_event_but_no_log_line(scene):
    scene.measured(LOST)
    scene.measured(GOOD)
    scene.later()
    assert scene.lines == []
    assert scene.events == ["peer_unreachable", "peer_reachable"]


def test_without_another_path_the_line_comes_at_once(monkeypatch, caplog):
    scene = Scene(monkeypatch, caplog, chooses=False)
    scene.measured(LOST)
    assert len(scene.lines) == 1
    scene.recorder.forget(scene.pair)
    scene.measured(GOOD)
    # After ``forget``, the pair is that of another peer with the same subnet. The new peer did not
    # fail before, so nothing is logged.
    assert len(scene.lines) == 1
