"""udptun.privileges: what a process and its children keep, measured in /proc/PID/status.

Each case runs in a process of its own, because the change is permanent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOBODY = 65534
NET_ADMIN, NET_RAW, BPF = 1 << 12, 1 << 13, 1 << 39
DAC_OVERRIDE, DAC_READ_SEARCH = 1 << 1, 1 << 2

PROLOGUE = """
import json, logging, os, subprocess, sys, threading
from pathlib import Path
from udptun import privileges
from udptun.privileges import Capability, Needs, keep_only
logging.basicConfig(format="%(message)s")
def status(pid="thread-self"):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name], 16)
            for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")}
def of_child():
    text = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")}
def become_nobody(*capabilities):
    # as a service manager starts a program for a user without privileges
    mask = sum(1 << number for number in capabilities)
    privileges._prctl(8, 1)  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    privileges._set(mask, mask, mask)
    for number in capabilities:
        privileges._prctl(47, 2, number)  # PR_CAP_AMBIENT_RAISE
ADMIN, RAW, BPF = Capability.NET_ADMIN, Capability.NET_RAW, Capability.BPF
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to give up")


def run(code: str, *before: str) -> tuple[Any, str]:
    """Run Python, with ``before`` in front of the command.

    Return what it printed as JSON, and its log.
    """
    done = subprocess.run(
        [*before, sys.executable, "-c", PROLOGUE + code], cwd=ROOT, text=True,
        capture_output=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@needs_root
def test_only_the_given_capabilities_stay() -> None:
    found, log = run("keep_only(Needs(frozenset({ADMIN})))\nprint(json.dumps(status()))")
    assert found == {"CapInh": 0, "CapPrm": NET_ADMIN, "CapEff": NET_ADMIN, "CapBnd": 0,
                     "CapAmb": 0, "NoNewPrivs": 1}
    assert log == ""


@needs_root
def test_threads_that_start_later_have_the_same_capabilities() -> None:
    found, _ = run("""
keep_only(Needs(frozenset({ADMIN})))
thread = threading.Thread(target=lambda: print(json.dumps(status())))
thread.start()
thread.join()
""")
    assert (found["CapPrm"], found["CapBnd"], found["NoNewPrivs"]) == (NET_ADMIN, 0, 1)


def test_a_process_with_other_threads_is_refused() -> None:
    found, _ = run("""
stop = threading.Event()
threading.Thread(target=stop.wait).start()
try:
    keep_only(Needs(frozenset()))
except RuntimeError as error:
    print(json.dumps(str(error)))
stop.set()
""")
    assert "before another thread is started" in found


@needs_root
def test_children_of_root_get_what_is_for_them_and_no_more() -> None:
    found, _ = run("""
keep_only(Needs(frozenset({ADMIN}), children=frozenset({ADMIN, RAW})))
print(json.dumps([status(), of_child()]))
""")
    own, child = found
    assert (own["CapEff"], own["CapPrm"]) == (NET_ADMIN, NET_ADMIN | NET_RAW)
    assert set(child.values()) == {NET_ADMIN | NET_RAW}


@needs_root
def test_children_get_nothing_by_default() -> None:
    found, _ = run("keep_only(Needs(frozenset({ADMIN})))\nprint(json.dumps(of_child()))")
    assert set(found.values()) == {0}


@needs_root
@pytest.mark.parametrize(("children", "expected"), [
    ("frozenset()", 0), ("frozenset({ADMIN})", NET_ADMIN),
])
def test_another_user_keeps_the_capabilities_that_it_was_given(
    children: str, expected: int
) -> None:
    found, log = run(f"""
become_nobody(ADMIN, RAW)
keep_only(Needs(frozenset({{ADMIN, RAW, BPF}}), children={children}))
print(json.dumps([status(), of_child()]))
""")
    own, child = found
    assert own["CapPrm"] == own["CapEff"] == NET_ADMIN | NET_RAW  # CAP_BPF was not given
    assert (own["CapInh"], own["CapAmb"]) == (expected, expected)
    assert child["CapEff"] == expected
    assert log == ""


def test_a_user_without_capabilities_has_none_to_give_up() -> None:
    found, log = run("""
if os.geteuid() == 0:
    become_nobody()
keep_only(Needs(frozenset({ADMIN})))
print(json.dumps(status()))
""")
    assert (found["CapPrm"], found["CapEff"], found["NoNewPrivs"]) == (0, 0, 1)
    assert log == ""


# Files of other users


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A directory of another user that root may use with CAP_DAC_OVERRIDE only."""
    made = tmp_path / "private"
    made.mkdir(mode=0o700)
    (made / "file").write_text("")
    (made / "file").chmod(0o600)
    for path in (made, made / "file"):
        os.chown(path, NOBODY, NOBODY)
    return made


@needs_root
@pytest.mark.parametrize(("what", "name", "kept"), [
    ("write", "file", DAC_OVERRIDE),
    ("write", "new", DAC_OVERRIDE),
    ("write", "new/deeper/file", DAC_OVERRIDE),
    ("read", "file", DAC_READ_SEARCH),
    ("read", ".", DAC_READ_SEARCH),
    ("read", "new", DAC_READ_SEARCH),
])
def test_a_file_in_the_directory_of_another_user_stays_usable(
    private: Path, what: str, name: str, kept: int
) -> None:
    path = private / name
    found, log = run(f"""
keep_only(Needs(frozenset({{ADMIN}}), {what}=(Path({str(path)!r}),)))
print(json.dumps(status()))
""")
    assert found["CapEff"] == found["CapPrm"] == NET_ADMIN | kept
    assert str(path) in log
    assert log.count("\n") == 1


@needs_root
def test_children_may_use_these_files_too(private: Path) -> None:
    found, _ = run(f"""
keep_only(Needs(frozenset({{ADMIN}}), frozenset({{ADMIN}}), write=(Path({str(private)!r}) / "x",)))
print(json.dumps(of_child()))
""")
    assert found["CapEff"] == NET_ADMIN | DAC_OVERRIDE


@needs_root
def test_files_that_root_may_use_anyway_need_no_capability(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o600)
    found, log = run(f"""
here = Path({str(tmp_path)!r})
keep_only(Needs(frozenset({{ADMIN}}), read=(here / "file", here / "none", here),
                write=(here / "file", here / "new", here / "a" / "b")))
print(json.dumps(status()))
""")
    assert found["CapPrm"] == NET_ADMIN
    assert log == ""


@needs_root
def test_no_capability_is_kept_for_a_read_only_file_system(tmp_path: Path) -> None:
    mounted = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o ro none "$0" && exec "$@"')
    found, _ = run(f"""
keep_only(Needs(frozenset({{ADMIN}}), write=(Path({str(tmp_path)!r}) / "file",)))
print(json.dumps(status()))
""", *mounted, str(tmp_path))
    assert found["CapPrm"] == NET_ADMIN


def test_the_rest_of_the_program_can_still_be_imported() -> None:
    found, _ = run("""
from udptun.privileges import program_files
import aiohttp
print(json.dumps([[str(path) for path in program_files()], aiohttp.__file__, os.__file__]))
""")
    directories, *modules = found
    assert str(ROOT / "udptun") in directories
    for module in modules:
        assert any(Path(module).is_relative_to(path) for path in directories)
