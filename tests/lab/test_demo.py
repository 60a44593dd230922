"""``udptun demo`` as a user runs it: output, colour, Ctrl-C, and what it leaves behind."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import DEFAULT_SIGNALS, WITHOUT_ROOT
from udptun.lab import wait_for

DEMO = [*DEFAULT_SIGNALS, sys.executable, "-m", "udptun", "demo", "--seconds", "1"]


def leftovers(pid: int) -> list[str]:
    return [p.name for p in Path("/run/netns").glob(f"ut{pid}-*")]


def test_demo_prints_every_step_and_cleans_up():
    with subprocess.Popen(
        DEMO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as demo:
        text = demo.communicate(timeout=100)[0]
    assert demo.returncode == 0, text
    for expected in ("host a", "pod 10.244.2.2", "20 of 20 came back", "Gbit/s", "loss",
                     "round trip", "VXLAN", "removed 4 namespaces"):
        assert expected in text
    assert "\x1b" not in text, "colour without a terminal"
    assert not leftovers(demo.pid)


@pytest.mark.parametrize("no_colour", [False, True])
def test_colour_only_on_a_terminal_without_no_color(no_colour):
    ours, theirs = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    env |= {"NO_COLOR": "1"} if no_colour else {}
    with subprocess.Popen(DEMO, stdout=theirs, env=env, start_new_session=True) as demo:
        os.close(theirs)
        seen = b""
        while b"forwarder on host a" not in seen:
            seen += os.read(ours, 4096)
        demo.send_signal(signal.SIGINT)
        demo.wait(60)
    os.close(ours)
    assert (b"\x1b[1m" in seen) is not no_colour
    assert not leftovers(demo.pid)


def test_ctrl_c_removes_everything_that_was_created():
    with subprocess.Popen(
        DEMO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as demo:
        wait_for(lambda: len(leftovers(demo.pid)) == 4, "the hosts")
        seen = ""
        while "ping host a" not in seen:
            seen += demo.stdout.readline()
        demo.send_signal(signal.SIGINT)
        text = demo.communicate(timeout=30)[0]
    assert demo.returncode == 130
    assert "interrupted; removed 4 namespaces" in text
    assert "Traceback" not in text
    assert not leftovers(demo.pid)


@pytest.mark.unprivileged
def test_the_demo_needs_root():
    """Pretends to have no privilege: another user may not be able to read this checkout."""
    script = f"{WITHOUT_ROOT}; from udptun.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "demo"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("udptun demo needs root")
    assert len(done.stderr.splitlines()) == 1
