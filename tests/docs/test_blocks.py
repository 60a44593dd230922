"""The commands in the documents work. ``tests.docs.blocks`` explains the markers.

Each page with blocks to run has a test. The hosts have the addresses and names of the documents,
and a /run and a /var/lib of their own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, all_blocks, functions_of
from tests.e2e import migration  # noqa: F401 - it fills the table of steps
from tests.e2e.step import STEPS
from udptun.lab import Host, Lab, Process, wait_for

PATH = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"  # begins with our udptun
ADDRESSES = {"n1": "192.0.2.1", "n2": "192.0.2.2"}
HOSTS_FILE = 'network = "10.244.0.0/16"\n' + "".join(
    f'[[nodes]]\nname = "{name}"\npublic = "{address}"\nsubnets = "10.244.{n}.0/24"\n'
    for n, (name, address) in enumerate(ADDRESSES.items(), 1))
QUICK = {"docs/start.md"}
BLOCKS = all_blocks()
RUN = [block for block in BLOCKS if block.kind == "run"]


class World:
    """Two hosts. Each has a folder for its /run, /var/lib and /etc/udptun."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.hosts: dict[str, Host] = {name: lab.host(name) for name in ADDRESSES}
        lab.segment(*self.hosts.values())
        for name, host in self.hosts.items():
            host.ip(f"address add {ADDRESSES[name]}/24 dev {host.interfaces[0].name}")
            for part in ("run", "lib", "etc"):
                (self.folder(name) / part).mkdir(parents=True)
            (self.folder(name) / "etc" / "hosts.toml").write_text(HOSTS_FILE)

    def folder(self, name: str) -> Path:
        return self.lab.folder / f"files-{name}"

    def script(self, name: str, text: str) -> list[str]:
        """Return the argument vector that runs ``text`` with the directories of the host."""
        folder = self.folder(name)
        mounts = "".join(f"mount --bind {folder}/{part} {target}\n"
                         for part, target in (("run", "/run"), ("lib", "/var/lib")))
        text = text.replace("/etc/udptun", f"{folder}/etc")
        return ["sh", "-ec", f"{mounts}cd {folder}\n{text}"]

    def run(self, name: str, text: str) -> str:
        done = self.hosts[name].run(
            self.script(name, ending(text)), check=False, env={"PATH": PATH})
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self, name: str, text: str) -> Process:
        command = " ".join(line for line in text.splitlines() if line).replace("\\ ", "")
        argv = self.script(name, f"exec {command} --node-name {name}" if "udptun node" in command
                           else f"exec {command}")
        return self.hosts[name].start(argv, name="block", env={"PATH": PATH})

    def await_socket(self, name: str, socket: str) -> None:
        wait_for((self.folder(name) / "run" / "udptun" / socket).exists, f"{socket} of {name}")

    def await_reachable(self) -> None:
        for name in self.hosts:
            wait_for(lambda name=name: "reachable" in self.run(name, "udptun peers"), "a probe")


def ending(text: str) -> str:
    """Change commands that run until Ctrl-C into commands that end after two seconds."""
    changed = re.sub(r"^(udptun \w+ .*-w\b.*?)( *#.*)?$", r"timeout -s INT 2 \1 || true", text,
                     flags=re.MULTILINE)
    return re.sub(r"^(udptun status --check)( *#.*)?$", r"\1 || [ $? = 1 ]", changed,
                  flags=re.MULTILINE)


def two_hosts(world: World) -> None:
    """Nothing runs yet."""


def tunnel(world: World) -> None:
    """A forwarder on each host, and the routes."""
    for n, (name, other) in enumerate((("n1", "n2"), ("n2", "n1")), 1):
        world.start(name, f"udptun forward --listen {ADDRESSES[name]} --address 10.244.{n}.0 "
                          "--network 10.244.0.0/16")
        world.await_socket(name, "udptun.sock")
        world.run(name, f"udptun route add 10.244.{3 - n}.0/24 via {ADDRESSES[other]} probe")
        (world.folder(name) / "etc" / "routes").write_text(
            f"10.244.{3 - n}.0/24 via {ADDRESSES[other]} probe\n")
    world.await_reachable()


def nodes(world: World) -> None:
    """A node daemon with a hosts file on each host."""
    for name in world.hosts:
        world.start(name, "udptun node --hosts /etc/udptun/hosts.toml")
    for name in world.hosts:
        world.await_socket(name, "udptun.sock")
    world.await_reachable()


WORLDS: dict[str, Callable[[World], None]] = {
    "two-hosts": two_hosts, "tunnel": tunnel, "nodes": nodes,
}


@pytest.mark.parametrize(
    ("page", "name"),
    [pytest.param(page, name, id=f"{page}-{name}",
                  marks=[] if page in QUICK and name == "two-hosts" else pytest.mark.slow)
     for page, name in dict.fromkeys((block.page, block.world) for block in RUN)],
)
def test_the_blocks_of_a_page(lab: Lab, page: str, name: str) -> None:
    world = World(lab)
    WORLDS[name](world)
    background: list[Process] = []
    for block in RUN:
        if (block.page, block.world) != (page, name):
            continue
        if block.in_background:
            background.append(world.start(block.host, block.text))
            world.await_socket(block.host, "udptun.sock")
        else:
            world.run(block.host, block.text)
    for process in background:
        assert process.alive, process.text()


# The markers


@pytest.mark.unprivileged
def test_each_command_block_has_a_marker() -> None:
    """See tests/docs/blocks.py for the markers."""
    assert [f"{block}: no marker" for block in BLOCKS if not block.kind] == []


@pytest.mark.unprivileged
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_marker_names_something_that_exists(block: Block) -> None:
    if block.kind == "run":
        assert block.world in WORLDS
        assert block.host in ADDRESSES
    elif block.kind == "run by" and block.marker.startswith("make e2e, step "):
        assert block.marker.removeprefix("make e2e, step ") in STEPS
    elif block.kind in ("run by", "checked by"):
        path, _, name = block.marker.partition("::")
        assert name in functions_of(ROOT / path)


IN_CLUSTER = [block for block in BLOCKS if block.marker.startswith("make e2e")]
CLUSTER = "\n".join(path.read_text() for path in sorted((ROOT / "tests" / "e2e").glob("*.py")))
OF_THE_SHELL = {"for", "command", "in", "do", "done"}


@pytest.mark.unprivileged
@pytest.mark.parametrize("block", IN_CLUSTER, ids=str)
def test_the_whole_cluster_has_the_words_of_a_block(block: Block) -> None:
    """This finds a command that no step runs. It does not find that another step runs it."""
    text = re.sub(r" # .*|> \S+|docker\.io/\S+", "", block.text)
    words = {word.rstrip("-") for word in re.findall(r"[a-z][\w-]+", text)} - OF_THE_SHELL
    assert [word for word in sorted(words) if word not in CLUSTER] == []


@pytest.mark.unprivileged
def test_few_blocks_are_not_run() -> None:
    assert sum(block.kind == "not run" for block in BLOCKS) <= len(BLOCKS) / 3
