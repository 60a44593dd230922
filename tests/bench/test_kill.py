"""An error in a slot that kills the forwarder does not end the run."""

import types

import pytest

from bench import blocks
from bench.blocks import Refused, Series, SlotResult
from bench.metrics import kill
from udptun.lab import LabError

SERIES = Series("kill", "P1", "")


class Process:
    def __init__(self):
        self.alive = True

    def kill(self):
        self.alive = False


class Path:
    """A path whose first forwarder has a process."""

    def __init__(self):
        self.name, self.in_kernel = "udptun", self._in_kernel
        self.forwarders = types.SimpleNamespace(process=Process()), None
        self.answers = True

    def restart(self, _kept):
        return types.SimpleNamespace(process=Process())

    def wait_forwarding(self):
        assert self.forwarders[0].process.alive

    def discard_ended_processes(self):
        pass

    def _in_kernel(self):
        if not (self.answers and self.forwarders[0].process.alive):
            raise ConnectionRefusedError(111, "Connection refused")
        return 100, 200


@pytest.fixture
def measure(monkeypatch):
    async def copies(_forwarder):
        return {}

    def late(process, _seconds):
        raise LabError(f"{process}: still running")

    monkeypatch.setattr(kill, "copies", copies)
    monkeypatch.setattr(kill, "start_receiver", lambda *_: (Process(), 1))
    monkeypatch.setattr(kill, "start_sender", lambda *_, **__: Process())
    monkeypatch.setattr(kill, "json_result", late)
    return kill.Kill(0)


def test_the_path_works_again_after_an_error(measure):
    path = Path()
    first = path.forwarders[0]
    with pytest.raises(LabError, match="still running"):
        measure(path)
    assert path.forwarders[0] is not first
    assert path.forwarders[0].process.alive


class Count:
    def __sub__(self, _other):
        return self


class Session:
    """Records the lines of slots."""

    def __init__(self, path):
        self.recorder = self.progress = self
        self.path = lambda _name: path

    def counters(self, _name):
        return types.SimpleNamespace(read=lambda: (Count(), Count()))

    def now(self, _text):
        pass

    step = now

    def write(self, _kind, **line):
        return line


def slot(path, measure):
    return blocks._slot(Session(path), SERIES, 0, "udptun", measure, "block 1 of 1")


def test_a_forwarder_that_does_not_answer_refuses_the_slot():
    path = Path()
    path.answers = False

    def connect(_path):
        raise ConnectionRefusedError(111, "Connection refused")

    assert "Connection refused" in slot(path, connect)["refused"]


@pytest.mark.parametrize(("restarts", "share"), [(False, 0.0), (True, None)])
def test_no_share_of_two_forwarders(monkeypatch, restarts, share):
    monkeypatch.setattr(blocks, "refusal_reason", lambda *_: None)
    path, counts = Path(), [(0, 900), (0, 100)]
    path.in_kernel = counts.pop

    def run(path):
        if restarts:
            path.forwarders = path.restart({}), None
        return SlotResult({"lost_packets": 0.0})

    assert slot(path, run)["in_kernel"] == share


def test_a_refusal_is_no_figure():
    def refuse(_path):
        raise Refused("nothing to measure")

    assert slot(Path(), refuse)["values"] == {}
