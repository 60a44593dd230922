"""``make demo-etcd`` as a user runs it. The whole demo is in `make test-all`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import WITHOUT_ROOT
from udptun.lab.cluster import etcd_obstacle

pytestmark = pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))

DEMO = [sys.executable, "-m", "udptun.lab.demo_etcd"]


@pytest.mark.slow
def test_demo_shows_joining_and_leaving_nodes_and_cleans_up():
    with subprocess.Popen(
        DEMO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as demo:
        text = demo.communicate(timeout=110)[0]
    assert demo.returncode == 0, text
    for pairs in (6, 12, 6):
        _, found, text = text.partition(f"{pairs} of {pairs} came back")
        assert found
    count = re.search(r"(\d+) of (\d+) pings came back", text)
    assert count
    assert count[1] == count[2]
    assert "removed 10 namespaces" in text
    assert not [*Path("/run/netns").glob(f"ut{demo.pid}-*")]


@pytest.mark.unprivileged
def test_the_demo_needs_root():
    """Pretends to have no privilege: another user may not be able to read this checkout."""
    script = f"{WITHOUT_ROOT}; from udptun.lab.demo_etcd import run; sys.exit(run())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("make demo-etcd needs root")
