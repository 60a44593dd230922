"""The micro benchmarks start, and find the saved times that they compare with.

If another machine saved the times, pytest-benchmark warns that the machines differ. The tests allow
this warning, because it is information for the reader of the times. If pytest-benchmark warns that
there are no saved times, the test fails.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ANOTHER_MACHINE = "default:Benchmark machine_info is different"


def _outside_xdist():
    """Return our environment without xdist: pytest-benchmark measures nothing inside of it."""
    return {name: value for name, value in os.environ.items() if "XDIST" not in name}


@pytest.mark.skipif(
    not (Path(sys.prefix) / "test.stamp").exists(),
    reason="make would install all it takes first",
)
@pytest.mark.parametrize("machine", ["this", "another"])
def test_they_find_the_saved_times(machine, tmp_path):
    options = f"--collect-only -q -W error -W '{ANOTHER_MACHINE}'"
    if machine == "another":
        (tmp_path / "another_machine.py").write_text(
            "def pytest_benchmark_update_machine_info(machine_info):\n"
            "    machine_info['cpu'] = 'another'\n"
        )
        options += " -p another_machine"
    done = subprocess.run(
        ["make", "-s", "bench-micro", f"VENV={sys.prefix}", f"ARGS={options}"],
        check=False, cwd=ROOT, capture_output=True, text=True,
        env={**_outside_xdist(), "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_lookup[random-100000-4]" in done.stdout
