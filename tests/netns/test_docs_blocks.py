"""The commands in README.md and docs/control.md work: they are run between two hosts."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from udptun.lab import Forwarder, Host, Lab, wait_for

ROOT = Path(__file__).resolve().parents[2]
PATH = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"  # begins with our udptun
HERE, THERE = "192.0.2.1", "192.0.2.2"  # the addresses in the documents

pytestmark = pytest.mark.slow


@pytest.fixture
def hosts(lab: Lab) -> tuple[Host, Host]:
    pair = lab.host("a"), lab.host("b")
    lab.segment(*pair)
    for host, address in zip(pair, (HERE, THERE), strict=True):
        host.ip(f"address add {address}/24 dev {host.interfaces[0].name}")
    return pair


def blocks(document: str, language: str = "") -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_two_hosts_of_the_readme(lab: Lab, hosts: tuple[Host, Host]) -> None:
    """The block has one column per host. A command that ends with & runs until the end."""
    (block,) = [block for block in blocks("README.md") if block.startswith(f"# on {HERE}")]
    start = block.index(f"# on {THERE}")
    columns = [[line[:start].rstrip() for line in block.splitlines()],
               [line[start:].rstrip() for line in block.splitlines()]]
    later: list[str] = []
    for host, lines in zip(hosts, columns, strict=True):
        folder = lab.folder / f"run-{host.name}"
        folder.mkdir()
        script = "\n".join(lines).replace("/var/lib/udptun", str(folder))
        background, rest = script.split("&\n")
        host.start(["sh", "-c", f"exec {_command(background)}"], name="udptun",
                   env={"RUNTIME_DIRECTORY": str(folder), "PATH": PATH})
        wait_for((folder / "udptun.sock").exists, "the control socket")
        later.append(rest)
    outputs = [
        _run(host, rest.replace("ping ", "ping -c 3 "), lab.folder / f"run-{host.name}/udptun.sock")
        for host, rest in reversed([*zip(hosts, later, strict=True)])
    ]
    assert "192.0.2.1:8285" in outputs[0]
    assert " 0% packet loss" in outputs[1]


def _command(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("#")).strip()


def _run(host: Host, script: str, socket: Path) -> str:
    done = host.run(["sh", "-ec", script], check=False, env={
        "UDPTUN_SOCKET": str(socket), "SOCK": str(socket), "PATH": PATH})
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_requests_of_the_control_api(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    a, b = hosts
    forwarder, _ = (
        Forwarder.start(host, listen=[mine], addresses=[f"10.244.{n}.0"],
                        networks=["10.244.0.0/16"],
                        routes=[f"10.244.{3 - n}.0/24 via {peer} probe"])
        for host, n, mine, peer in ((a, 1, HERE, THERE), (b, 2, THERE, HERE))
    )
    (tmp_path / "routes").write_text(f"10.244.2.0/24 via {THERE}\n")
    requests = [block for block in blocks("docs/control.md", "sh") if "curl" in block]
    assert len(requests) >= 10
    for block in requests:
        script = re.sub(r"^SOCK=.*\n", "", block).replace("@routes", f"@{tmp_path}/routes")
        if "/v1/events" in script:  # never ends
            script = script.replace("curl -N", "curl -N -s -m 2").rstrip() + " | head -n 1\n"
        output = _run(a, script.replace("curl --unix", "curl -sS --unix"), forwarder.control)
        if "/metrics" not in script:
            for line in output.splitlines():
                assert "error" not in json.loads(line), f"{script}\n{output}"
    forwarder.process.wait()  # the last request stops it
