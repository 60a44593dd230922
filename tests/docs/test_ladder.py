"""examples/ladder: each exercise is broken at first, and its documented solution repairs it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LADDER = ROOT / "examples" / "ladder" / "ladder.py"


def load():
    spec = importlib.util.spec_from_file_location("ladder", LADDER)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ladder"] = module  # dataclasses looks the module up
    spec.loader.exec_module(module)
    return module


ladder = load()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(ladder.EXERCISES) + 1))
def test_the_documented_solution_repairs_the_tunnel(number: int) -> None:
    exercise = ladder.EXERCISES[number - 1]
    lines = ["check", "hint", "solution"]
    lines += [f"{name} {command}" for name, command in exercise.solution]
    done = subprocess.run(
        [sys.executable, str(LADDER), str(number)], input="\n".join([*lines, "check", "quit", ""]),
        capture_output=True, text=True, check=True)
    assert "Not yet" in done.stdout
    before, _, after = done.stdout.partition(exercise.why)
    assert "Well done" not in before
    assert "Well done" in after, done.stdout
    assert done.stdout.endswith("removed the hosts\n")


@pytest.mark.unprivileged
def test_the_page_lists_the_exercises() -> None:
    page = (ROOT / "docs" / "ladder.md").read_text()
    titles = re.findall(r"^\| (\d) \| ([^|]+) \|", page, re.MULTILINE)
    assert titles == [(str(n), one.title) for n, one in enumerate(ladder.EXERCISES, 1)]


@pytest.mark.unprivileged
def test_the_page_quotes_the_first_exercise() -> None:
    page = (ROOT / "docs" / "ladder.md").read_text()
    assert f"\n{ladder.EXERCISES[0].title}\n\n{ladder.EXERCISES[0].task}\n" in page


@pytest.mark.unprivileged
def test_a_wrong_number_lists_the_exercises() -> None:
    done = subprocess.run([sys.executable, str(LADDER), "9"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == len(ladder.EXERCISES)
