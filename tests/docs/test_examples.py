"""The programs in examples/, and the Python blocks of README.md and docs/python.md, work."""

from __future__ import annotations

import json
import re
import signal
import sys
import textwrap
from pathlib import Path

import pytest

from tests.docs.test_blocks import ADDRESSES, World
from udptun.lab import Lab, Process, ping, wait_for

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def program(name: str, *words: object) -> str:
    return " ".join(map(str, (sys.executable, EXAMPLES / name, *words)))


@pytest.fixture
def world(lab: Lab) -> World:
    return World(lab)


def start_two_hosts(world: World) -> list[Process]:
    addresses = list(ADDRESSES.values())
    return [
        world.start(name, program("two_hosts.py", here, there, number))
        for number, (name, here, there) in enumerate(
            zip(ADDRESSES, addresses, addresses[::-1], strict=True), 1)
    ]


def test_the_examples_between_two_hosts(world: World, tmp_path: Path) -> None:
    used = {"two_hosts.py", "unreachable.py", "routes_from_json.py", "drop_rates.py"}
    assert used == {path.name for path in EXAMPLES.glob("*.py")}
    running = start_two_hosts(world)
    for process in running:
        process.wait_for_output("reachable")
    assert ping(world.hosts["n1"], "10.244.2.0", count=1).received
    assert world.run("n1", program("unreachable.py")) == ""
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps({"10.244.2.0/24": "192.0.2.2", "10.244.7.0/24": "192.0.2.77"}))
    assert world.run("n1", program("routes_from_json.py", file)).startswith("1 added, 0 changed")
    rates = world.start("n1", program("drop_rates.py", 60))

    def reported() -> bool:
        ping(world.hosts["n1"], "10.244.9.1", count=1, wait=0.2)
        return "no_route (encap)" in rates.text()

    wait_for(reported, "a drop rate")
    found = world.hosts["n1"].run(
        world.script("n1", f"until {program('unreachable.py')} >out; [ $? = 1 ]; do sleep 1; done;"
                           " cat out"), check=False)
    assert found.stdout.startswith("192.0.2.77:8285 since "), found
    for process in running:
        process.signal(signal.SIGINT)
        assert process.wait() == 0


def as_program(block: str) -> str:
    """Return a block that can be run: ``await`` outside a function needs one."""
    if "asyncio.run" in block or "async with" not in block:
        return block
    head, _, body = block.partition("\n\n")
    body = textwrap.indent(body, "    ")
    return f"import asyncio\n{head}\nasync def main():\n{body}\nasyncio.run(main())\n"


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_python_blocks_of(page: str, world: World, tmp_path: Path) -> None:
    blocks = PYTHON.findall((ROOT / page).read_text())
    assert blocks
    for number, block in enumerate(blocks):
        file = tmp_path / f"block{number}.py"
        file.write_text(as_program(block))
        background = None
        if "ControlClient" in block:
            background = world.start("n1", program("two_hosts.py", "192.0.2.1", "192.0.2.2", 1))
            background.wait_for_output("is up")
        assert world.run("n1", f"{sys.executable} {file}")
        if background is not None:
            background.stop()
