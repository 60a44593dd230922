"""The micro benchmarks start, and have something to be compared with."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.skipif(
    not (ROOT / ".venv" / "test.stamp").exists(), reason="make would install all it takes first"
)
def test_they_find_the_saved_times():
    done = subprocess.run(
        ["make", "-s", "bench-micro", "ARGS=--collect-only -q -W error"],
        check=False, cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_lookup[random-100000-4]" in done.stdout
