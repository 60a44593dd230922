"""When flannel's leftovers stay: real processes with flannel's names, and a real /proc."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.own_netns import in_own_netns
from udptun.node.host import leftovers

ASK = "from udptun.node.host.leftovers import why_keep; print(why_keep())"
NO_PTRACE = ("setpriv", "--bounding-set", "-sys_ptrace")


@contextmanager
def running(folder, name):
    program = folder / name
    shutil.copy(shutil.which("sleep"), program)
    # ``exec`` has happened when Popen returns.
    process = subprocess.Popen([program, "1000"])
    try:
        yield program
    finally:
        process.kill()
        process.wait()


def ask(*wrapper):
    if wrapper and shutil.which(wrapper[0]) is None:
        pytest.skip(f"{wrapper[0]} is missing")
    done = subprocess.run([*wrapper, sys.executable, "-c", ASK], capture_output=True, text=True,
                          check=False)
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert not done.stderr
    return done.stdout.strip()


@in_own_netns
def test_a_why_keepd_is_seen(tmp_path):
    with running(tmp_path, "flanneld"):
        assert leftovers.why_keep() == "flanneld runs here"


@in_own_netns
def test_a_why_keepd_is_seen_without_the_privilege_to_inspect_it(tmp_path):
    """The unit and the DaemonSet give no CAP_SYS_PTRACE."""
    with running(tmp_path, "flanneld"):
        assert ask(*NO_PTRACE).startswith("flanneld runs")


@in_own_netns
def test_a_running_program_is_seen_whose_file_was_removed(tmp_path, monkeypatch):
    """By the name of its file; a process can change its comm."""
    monkeypatch.setattr(leftovers, "_comm", lambda process: "main")
    with running(tmp_path, "k3s") as program:
        program.unlink()
        assert leftovers.why_keep() == "k3s runs here"


@in_own_netns
def test_where_the_host_is_not_visible_everything_stays():
    assert ask("unshare", "--pid", "--fork", "--mount-proc") == \
        "the host's processes are not visible here"
