"""Each line that the daemons log with --log-format json is a JSON object, from start to failure."""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

from tests.netns.hosts_file import two_nodes
from udptun.lab import wait_for
from udptun.lab.cluster import start_all

KEYS = {"time", "level", "logger", "message"}


def entries(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    for entry in found:
        assert KEYS <= entry.keys() <= KEYS | {"exception"}, entry
    return found


def test_every_line_of_both_daemons_is_json(lab: Any) -> None:
    a, b = two_nodes(lab, "--log-format=json")
    start_all([a, b])
    log = a.folder / "state" / "forwarder.log"
    b.host.run(["kill", "-KILL", str(b.forwarder_pid())])
    a.host.ip("link delete udptun0")  # the forwarder repairs it
    wait_for(lambda: "was deleted" in log.read_text(), "the repair", 60)
    b.daemon.wait_for_output("SIGKILL", 60)
    wait_for(lambda: b.ready()[0], "the next forwarder", 60)
    a.daemon.signal(signal.SIGHUP)
    a.daemon.wait_for_output("reloading")
    assert a.daemon.stop() == b.daemon.stop() == 0
    for member in (a, b):
        said = [entry["message"] for entry in entries(member.daemon.text())]
        assert any(message.startswith("ready: ") for message in said)
        text = (member.folder / "state" / "forwarder.log").read_text()
        assert any("udptun0 is up" in entry["message"] for entry in entries(text))
    (killed,) = {entry["message"] for entry in entries(b.daemon.text())
                 if "SIGKILL" in entry["message"]}
    assert '{"' not in killed  # it quotes messages, not JSON


def test_the_last_line_of_a_failure_is_json(lab: Any) -> None:
    host = lab.host("n1")
    for argv, code, text in (
        (["forward", "--listen", "192.0.2.7"], 1, "192.0.2.7"),
        (["forward", "--listen", "127.0.0.1", "--mtu", "9"], 2, "--mtu: 9 is not valid"),
        (["node", "--hosts", str(lab.folder / "none.toml"), "--etcd-username", "x"], 2, "--hosts"),
    ):
        process = host.start(
            [sys.executable, "-m", "udptun", *argv, "--log-format", "json"], name="failing")
        assert process.wait(60) == code
        last = entries(process.text())[-1]
        assert last["level"] == "critical"
        assert text in last["message"]

