"""Instruction counts: callgrind's file, the key of a build, and the comparison that CI uses.

These tests do not count the steps. ``make test`` counts the steps after the tests, with
``make bench-instructions``.
"""

import json
from pathlib import Path

import pytest

from bench import instructions

# There are two objects with costs: _core.so and libc.so.6. _core.so calls libc.so.6 once. The line
# after "calls=" has the cost of the called function, which is not a cost of _core.so.
CALLGRIND = """\
version: 1
events: Ir
summary: 4242
ob=(1) /x/udptun/_core.so
fn=(1) cut
3 40
+2 5
cob=(2) /lib/libc.so.6
cfn=(2) malloc
calls=1 0
* 1000
ob=(2)
fn=(2)
7 1000
ob=(1)
fn=(3) sum
-1 2
totals: 4242
"""
OURS = (Path("/x/udptun"),)


def test_only_our_own_instructions_count():
    assert instructions.parse(CALLGRIND, OURS) == 47


@pytest.mark.parametrize("text", ["", "summary: 0\n", CALLGRIND.replace("/x/", "/y/")])
def test_a_callgrind_file_without_our_functions_is_an_error(text):
    with pytest.raises(ValueError, match="counted no instructions"):
        instructions.parse(text, OURS)


def test_only_steps_above_the_tolerance_are_reported():
    before = {"a": 1000, "b": 1000, "c": 1000}
    now = {"a": 1010, "b": 1011, "c": 500, "new": 9}
    [line] = instructions.compared(now, before)
    assert line.startswith("b: 1011 instructions, +1.1%")


@pytest.mark.parametrize(
    ("cpuinfo", "want"),
    [("flags\t\t: fpu sse4_2 avx avx2 avx512f", "avx2"), ("flags\t: fpu sse4_2", "sse4_2"),
     ("Features\t: fp asimd", "")],
)
def test_the_simd_path_is_the_widest_that_valgrind_has(cpuinfo, want):
    assert instructions._simd_path(cpuinfo) == want


def test_the_compiler_is_read_from_the_extension():
    name = b"GCC: (Debian 12.2.0-14+deb12u1) 12.2.0"
    assert instructions._compiler(b"\x00GCC: \x00" + name + b"\x00") == name.decode()
    assert instructions._compiler(b"") == "unknown compiler"


@pytest.fixture
def counted(monkeypatch):
    """Replace valgrind: every step has 1000 instructions, and the key of this build is "here"."""
    monkeypatch.setattr(instructions, "count", lambda step: 1000)
    monkeypatch.setattr(instructions, "build_key", lambda: "here")
    monkeypatch.setattr(instructions.shutil, "which", lambda name: name)


def saved(tmp_path, key, n):
    path = tmp_path / "saved.json"
    path.write_text(json.dumps({key: dict.fromkeys(instructions.STEPS, n)}))
    return path


@pytest.mark.parametrize(("n", "code"), [(1000, 0), (989, 1), (2000, 0)])
def test_a_count_is_compared_with_that_of_the_same_build(counted, tmp_path, n, code):
    assert instructions.run(None, saved(tmp_path, "here", n)) == code


def test_counts_of_another_build_are_not_compared(counted, tmp_path, capsys):
    assert instructions.run(None, saved(tmp_path, "elsewhere", 1)) == 0
    assert "NOT COMPARED" in capsys.readouterr().out


def test_saving_keeps_the_counts_of_other_builds(counted, tmp_path):
    path = saved(tmp_path, "elsewhere", 1)
    assert instructions.run(path, None) == 0
    found = json.loads(path.read_text())
    assert sorted(found) == ["elsewhere", "here"]
    assert set(found["here"].values()) == {1000}


def test_the_saved_counts_name_every_step():
    for counts in json.loads(
        (instructions.ROOT / "bench" / "baselines" / "instructions.json").read_text()
    ).values():
        assert set(counts) == set(instructions.STEPS)


@pytest.mark.parametrize("step", instructions.STEPS)
def test_every_step_can_be_replayed(step):
    instructions.replay(step)
