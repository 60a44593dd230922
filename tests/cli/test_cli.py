"""The command line: arguments, output and exit codes, with a real control server."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.control.fakes import Served, status_of
from tests.processes import DEFAULT_SIGNALS
from udptun.cli import COMMANDS, cli
from udptun.cli.events import event_line
from udptun.cli.options import echo_fitting, echo_table
from udptun.cli.ping import _summary
from udptun.control import protocol
from udptun.control.client import _UnixConnection
from udptun.instance import Instance
from udptun.spans import duration, size

ROUTE = "10.244.2.0/24 via 192.0.2.2"


class Udptun:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, words: str, stdin: str | None = None, **env: str | None) -> Result:
        env = {"UDPTUN_SOCKET": str(self._path)} | env
        return CliRunner().invoke(cli, words.split(), input=stdin, env=env, prog_name="udptun")

    def json(self, words: str) -> Any:
        result = self(f"{words} -o json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


@pytest.fixture
def udptun(served: Served) -> Udptun:
    return Udptun(served.path)


def fails(result: Result, code: int, *texts: str) -> None:
    assert result.exit_code == code, result.output
    for text in texts:
        assert text in result.stderr


# Routes


def test_add_replace_del(udptun: Udptun) -> None:
    for words in (
        f"route add {ROUTE}", f"route add {ROUTE} port 8285", "route del 10.9.0.0/16",
        f"route replace {ROUTE} port 9000 mtu 1400", "route add 2001:db8:5::/64 via 2001:db8::1",
    ):
        result = udptun(words)
        assert (result.exit_code, result.output) == (0, ""), words
    assert udptun.json("route list") == {
        "generation": 4,
        "routes": [
            {"dst": "10.244.2.0/24", "via": "192.0.2.2", "port": 9000, "mtu": 1400},
            {"dst": "2001:db8:5::/64", "via": "2001:db8::1", "port": 8285, "mtu": None},
        ],
    }
    assert udptun("route del 10.244.2.0/24").exit_code == 0
    assert len(udptun.json("route list")["routes"]) == 1


def test_add_with_another_next_hop_fails_and_suggests_replace(udptun: Udptun) -> None:
    udptun(f"route add {ROUTE}")
    result = udptun("route add 10.244.2.0/24 via 192.0.2.3")
    fails(result, 1, "udptun: error:", "route_exists", "use `udptun route replace`")
    assert udptun.json("route list")["routes"][0]["via"] == "192.0.2.2"


def test_list_as_a_table(udptun: Udptun) -> None:
    udptun(f"route add {ROUTE}")
    udptun("route add 2001:db8:5::/64 via 2001:db8::1 port 9 mtu 1400 probe source-port any")
    assert udptun("route list").stdout.splitlines() == [
        "DST              VIA          PORT   MTU  PROBE  SOURCE-PORT",
        "10.244.2.0/24    192.0.2.2    8285     -  no     -",
        "2001:db8:5::/64  2001:db8::1     9  1400  yes    any",
    ]
    assert udptun("route list --no-headers").stdout.startswith("10.244.2.0/24    192.0.2.2")


def test_list_of_an_empty_table(udptun: Udptun) -> None:
    assert udptun("route list").stdout == "DST  VIA  PORT  MTU  PROBE  SOURCE-PORT\n"
    assert udptun("route list --no-headers").stdout == ""


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("route add 10.0.0.1/8 via 192.0.2.2", "dst: '10.0.0.1/8' is not valid: expected a prefix"),
        ("route add 10.0.0.0/8 via peer", "via: 'peer' is not valid: expected an IPv4"),
        ("route add 10.0.0.0/8",
         "expected DST via IP [port P] [mtu M] [source-port P] [probe] [express] [ecn]"),
        ("route replace 10.0.0.0/8 via 192.0.2.2 port 0", "port: 0 is not valid"),
        ("route add", "Missing argument"),
        ("route del nonsense", "DST: 'nonsense' is not valid"),
        ("route add 10.244.2.0 via 192.0.2.2", "such as 10.244.2.0/24, or 10.244.2.0/32 for one"),
        ("route replace fd00:2:: via 192.0.2.2", "such as fd00:2::/64, or fd00:2::/128 for one"),
        ("route del 10.244.2.0", "such as 10.244.2.0/24, or 10.244.2.0/32 for one address"),
        ("route del", "Missing argument"),
        ("route sync", "Missing argument"),
        ("route list -o yaml", "'yaml' is not one of"),
        ("route flush", "No such command"),
        ("nonsense", "No such command"),
        ("status --nonsense", "No such option"),
        ("trace nonsense", "address: 'nonsense' is not valid"),
    ],
)
def test_usage_errors_exit_2(udptun: Udptun, served: Served, words: str, text: str) -> None:
    fails(udptun(words), 2, text)
    assert served.forwarder.calls == []


def test_sync(udptun: Udptun, tmp_path: Path) -> None:
    file = tmp_path / "routes"
    file.write_text("# peers\n10.1.0.0/16 via 192.0.2.1\n10.2.0.0/16 via 192.0.2.2 mtu 1400\n")
    result = udptun(f"route sync {file}")
    assert result.stdout == "added 2, changed 0, removed 0 (generation 2)\n"
    result = udptun("route sync -", stdin="10.1.0.0/16 via 192.0.2.9\n")
    assert result.stdout == "added 0, changed 1, removed 1 (generation 3)\n"
    assert udptun("route sync - --allow-empty -o json", stdin="").stdout == (
        '{\n  "generation": 4,\n  "added": 0,\n  "changed": 0,\n  "removed": 1\n}\n'
    )


@pytest.mark.parametrize("text", ["", "\n", "# 10.1.0.0/16 via 192.0.2.1\n", " \t\n\n  # none\n"])
def test_sync_without_a_route_is_refused(udptun: Udptun, served: Served, text: str) -> None:
    udptun(f"route add {ROUTE}")
    fails(udptun("route sync -", stdin=text), 1, "standard input: there is no route in it",
          "--allow-empty")
    assert served.forwarder.bodies == []
    assert len(udptun.json("route list")["routes"]) == 1
    assert udptun("route sync - --allow-empty", stdin=text).exit_code == 0
    assert udptun.json("route list")["routes"] == []


@pytest.mark.parametrize("text", [f"{ROUTE}\n", f"# none\n\n\t {ROUTE}", f"\n{ROUTE} # one"])
def test_sync_with_one_route_is_not_empty(udptun: Udptun, text: str) -> None:
    assert udptun("route sync -", stdin=text).exit_code == 0
    assert len(udptun.json("route list")["routes"]) == 1


def test_sync_errors_name_file_line_and_field(udptun: Udptun, tmp_path: Path) -> None:
    file = tmp_path / "routes"
    file.write_text("10.1.0.0/16 via 192.0.2.1\n10.2.0.0/16 via 192.0.2.2 mtu 1\n")
    fails(udptun(f"route sync {file}"), 1, f"udptun: error: {file}: line 2: mtu: 1 is not valid")
    fails(udptun("route sync -", stdin="x"), 1, "error: standard input: line 1: route")
    fails(udptun(f"route sync {tmp_path}/absent"), 1, "absent: No such file or directory")
    assert udptun.json("route list") == {"generation": 1, "routes": []}


# Read commands


def test_status(udptun: Udptun) -> None:
    text = re.sub(r"(reachable   )(\d+ \w+ *)  udp", r"\1AGE  udp", udptun("status").stdout)
    text = re.sub(r"FOR +PATH", "FOR  PATH", re.sub(r"probed  - +udp", "probed  -    udp", text))
    assert text == f"""\
device: udptun0
  version: 0.1.0, process {os.getpid()}, up for 1 hour, 2 minutes
  addresses: 10.244.1.0
  networks: 10.244.0.0/16
  listening: 192.0.2.1:8285
  mtu: 1472
  routes: 0 (generation 1)
  source check: strict
  workers: 1
  offloads: tun-gso, udp-gso, batch
  off: udp-merge (asked)
  packets encap: 10 read, 1 generated, 8 delivered, 2 dropped, 1 queued
  packets decap: 20 read, 1 generated, 18 delivered, 2 dropped, 1 queued
  express path: off: --accelerate off

PEER                STATE       FOR  PATH  RTT      LOSS  SENT      RECEIVED   MTU  SEEN  \
SUBNETS        LAST ERROR
192.0.2.2:8285      reachable   AGE  udp   0.41 ms  3%    1.50 KiB  999 B     1472  3 s   \
10.244.2.0/24  ECONNREFUSED 61 s ago
[2001:db8::3]:8285  not probed  -    udp   -        -     0 B       0 B          -  -     \
-              -
"""
    assert udptun("status 192.0.2.2").stdout == """\
peer: 192.0.2.2:8285
  subnets: 10.244.2.0/24
  last seen: 3 seconds ago
  transfer: 999 B received, 1.50 KiB sent
  packets: 3 received, 12 sent
  path mtu: 1500 (measured)
  express path: off: --accelerate off
  last error: connection refused: nothing listens on 192.0.2.2:8285 \
(ICMP port unreachable from 192.0.2.2), 1 minute, 1 second ago
  state: reachable since 2026-11-23T13:05:24Z
  probes: round trip 0.41 ms, loss 3%, last answer 2026-11-23T13:06:01Z, largest packet 1472
"""
    assert udptun.json("status")["peers"][0]["endpoint"] == "192.0.2.2:8285"


def test_peers(udptun: Udptun, served: Served) -> None:
    lines = udptun("peers").stdout.splitlines()
    assert lines[0].split("  ")[0] == "ENDPOINT"
    assert lines[0].endswith("LAST ANSWER           LARGEST  REASON")
    assert lines[1].split() == [
        "192.0.2.2:8285", "reachable", "2026-11-23T13:05:24Z", "0.41", "ms", "3%",
        "2026-11-23T13:06:01Z", "1472", "-",
    ]
    assert lines[2].startswith("[2001:db8::3]:8285  not probed")
    rows = udptun("peers --no-headers").stdout.splitlines()
    assert [row.split() for row in rows] == [line.split() for line in lines[1:]]
    assert udptun.json("peers")["peers"] == udptun.json("status")["peers"]


def test_drops(udptun: Udptun, served: Served) -> None:
    assert udptun("drops").stdout.splitlines() == [
        "REASON    DIRECTION  PACKETS",
        "no_route  encap            7",
    ]
    everything = served.forwarder.drops()
    assert len(udptun("drops --all --no-headers").stdout.splitlines()) == len(everything)
    assert udptun.json("drops") == {"drops": everything}


def test_drops_explained_without_a_forwarder(tmp_path: Path) -> None:
    udptun = Udptun(tmp_path / "absent")
    assert "ICMP net unreachable" in udptun("drops --explain").stdout
    first = udptun.json("drops --explain")["reasons"][0]
    assert set(first) == {"reason", "direction", "meaning"}


def test_no_block_of_status_is_wider_than_the_terminal(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("udptun.cli.status.terminal_width", lambda: 60)
    wide = status_of(1, 0)["packets"] | {"encap": dict.fromkeys(
        ("read", "generated", "delivered", "consumed", "dropped", "queued"), 10**12)}
    served.forwarder.other_status = {"packets": wide}
    block = Udptun(served.path)("status").stdout.split("\n\n")[0]
    assert max(map(len, block.splitlines())) <= 60
    assert "0000000 dropped, 1000000000000 queued\n" in block


def test_a_ping_without_an_answer_names_the_next_step() -> None:
    found = {"rtt_ms": [None], "sent": 1, "answered": 0, "loss": 1.0, "largest_size": None,
             "full_size": 1472, "method": "echo", "directions": {"from_peer": None},
             "node": None, "address": "10.244.2.7"}
    *_, last = _summary(found, "10.244.2.7")
    assert last == \
        "next: `udptun trace 10.244.2.7` shows its path; `udptun doctor` looks for the cause"
    *_, last = _summary(found | {"node": "n2"}, "n2")
    assert "`udptun status n2`" in last
    *_, last = _summary(found | {"answered": 1, "rtt_ms": [0.5], "loss": 0.0}, "n2")
    assert last == "directions: both work"


def test_recent_events(udptun: Udptun) -> None:
    udptun(f"route add {ROUTE}")
    assert udptun("events").stdout == (
        "2026-11-23T12:00:00.000+00:00  forwarder  route_added       "
        "10.244.2.0/24 via 192.0.2.2 port 8285\n"
    )
    lines = [json.loads(line) for line in udptun("events -o json").stdout.splitlines()]
    assert [line["type"] for line in lines] == ["hello", "route_added"]


def test_an_event_is_shown_without_its_empty_fields() -> None:
    event = {"time": "T", "type": "peer_reachable", "endpoint": "192.0.2.2:8285", "reason": "",
             "rtt_us": None, "largest_size": 0, "probe": True, "full_size_passes": False}
    event["source"] = "node"
    assert event_line(event) == (
        "T  node       peer_reachable    endpoint 192.0.2.2:8285 largest_size 0 "
        "probe yes full_size_passes no")


def test_an_event_cannot_control_the_terminal():
    event = {"time": "2026-07-01T10:00:00Z", "type": "error", "message": "from\x1b[2J a server"}
    assert "\x1b" not in event_line(event)
    assert "from\\x1b[2J a server" in event_line(event)


def test_version(tmp_path: Path) -> None:
    udptun = Udptun(tmp_path / "absent")
    assert udptun("version").stdout == udptun("--version").stdout == "udptun 0.1.0\n"
    assert udptun.json("version") == {"version": "0.1.0"}


# The socket


@pytest.mark.parametrize(
    "words",
    ["status", "peers", "drops", "trace 127.0.0.1", "events", "events -w", "stop", "route list",
     f"route add {ROUTE}", f"route replace {ROUTE}", "route del 10.0.0.0/8",
     "route sync - --allow-empty"],
)
def test_no_forwarder(tmp_path: Path, words: str) -> None:
    result = Udptun(tmp_path / "absent")(words, stdin="")
    fails(result, 1, "udptun: error: no forwarder answers on", "udptun forward", "UDPTUN_SOCKET")
    assert result.stderr.count("\n") == 1


def test_the_socket_comes_from_either_option_or_the_environment(served: Served) -> None:
    lost = Udptun(Path("/nonexistent"))
    assert lost("status").exit_code == 1
    assert lost(f"--socket {served.path} status").exit_code == 0
    assert lost(f"status --socket {served.path}").exit_code == 0
    assert lost(f"--socket /other status --socket {served.path}").exit_code == 0
    assert lost(f"route list --socket {served.path}").exit_code == 0
    assert lost("status", UDPTUN_SOCKET=str(served.path)).exit_code == 0
    result = lost("status", UDPTUN_SOCKET=None)
    fails(result, 1, protocol.DEFAULT_SOCKET)
    assert str(Instance().control_socket()) == protocol.DEFAULT_SOCKET


@pytest.mark.parametrize(
    ("words", "env", "path"),
    [
        ("status --instance blue", {}, "/run/blue/blue.sock"),
        ("--instance blue status", {}, "/run/blue/blue.sock"),
        ("--instance red status --instance blue", {}, "/run/blue/blue.sock"),
        ("status", {"UDPTUN_INSTANCE": "blue"}, "/run/blue/blue.sock"),
        ("status", {"UDPTUN_INSTANCE": "blue", "UDPTUN_SOCKET": "/s"}, "/s"),
        ("status --socket /s", {"UDPTUN_INSTANCE": "blue"}, "/s"),
        ("status --instance blue --socket /s", {}, "/s"),
        ("--socket /s route list --instance blue", {}, "/s"),
        ("status --instance blue", {"UDPTUN_SOCKET": "/s"}, "/run/blue/blue.sock"),
    ],
)
def test_the_instance_selects_the_default_socket(
    tmp_path: Path, words: str, env: dict[str, str], path: str
) -> None:
    result = Udptun(tmp_path)(words, **{"UDPTUN_SOCKET": None} | env)
    fails(result, 1, f"no forwarder answers on {path}:")


def test_a_bad_instance_name(udptun: Udptun) -> None:
    for words in ("status --instance Blue", "--instance Blue status"):
        fails(udptun(words), 2, "--instance", "'Blue' is not valid", "1 to 8 of a-z")


def test_stop(udptun: Udptun, served: Served) -> None:
    assert udptun("stop").exit_code == 0
    assert served.forwarder.stopped.is_set()


# Help and formatting


@pytest.mark.parametrize("name", COMMANDS)
def test_help(tmp_path: Path, name: str) -> None:
    udptun = Udptun(tmp_path)
    result = udptun(f"{name} -h")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"Usage: udptun {name}")
    assert all(len(line) <= 100 for line in result.stdout.splitlines())


def test_overall_help_lists_every_command_in_order_of_use(tmp_path: Path) -> None:
    out = Udptun(tmp_path)("--help").stdout
    listed = [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines()]
    assert listed == list(COMMANDS)
    assert "UDPTUN_SOCKET" in out


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536, "1.50 KiB"),
     (5 * 1024**2, "5.00 MiB"), (1024**4, "1.00 TiB"), (5000 * 1024**4, "5000.00 TiB")],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 seconds"), (1.9, "1 second"), (61, "1 minute, 1 second"), (3600, "1 hour"),
     (90061, "1 day, 1 hour"), (86400 * 3 + 5, "3 days, 5 seconds")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_table_with_only_absent_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    echo_table(["A", "B"], [("x", None), ("yy", None)])
    assert capsys.readouterr().out == "A   B\nx   -\nyy  -\n"


def test_a_table_that_fits_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(room: int | None) -> list[str]:
        echo_fitting(["A", "BYTES", "C"], [("x" * 10, 1, "y" * 40), ("x", None, None)],
                     ["BYTES", "C"], room, cut_last=True)
        return capsys.readouterr().out.splitlines()

    assert shown(None) == shown(80) == [
        "A           BYTES  C", f"{'x' * 10}      1  {'y' * 40}", "x               -  -"]
    assert shown(50)[1] == f"{'x' * 10}      1  {'y' * 28}..."
    assert shown(42) == ["A           C", f"{'x' * 10}  {'y' * 27}...", "x           -"]
    assert shown(20) == ["A", "x" * 10, "x"]


# As processes


def run(*argv: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "udptun", *argv], capture_output=True, text=True, check=check,
        timeout=60, **options,
    )


def test_as_a_process(served: Served) -> None:
    socket = str(served.path)
    run("route", "add", *ROUTE.split(), "--socket", socket)
    assert "10.244.2.0/24" in run("--socket", socket, "route", "list").stdout
    failed = run("route", "add", "10.244.2.0/24", "via", "192.0.2.3", "--socket", socket,
                 check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("udptun: error: ")
    assert "Traceback" not in failed.stderr


def test_watching_prints_each_event_at_once_and_ends_with_the_forwarder(
    served: Served,
) -> None:
    argv = [sys.executable, "-m", "udptun", "events", "-w", "-o", "json", "--socket",
            str(served.path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["type"] == "hello"
        run("route", "add", *ROUTE.split(), "--socket", str(served.path))
        assert json.loads(watching.stdout.readline())["dst"] == "10.244.2.0/24"
        served.close()
        assert watching.stdout.readline() == ""
        assert watching.wait(60) == 0


def test_ctrl_c_ends_watching_without_an_error(served: Served) -> None:
    argv = [*DEFAULT_SIGNALS, sys.executable, "-m", "udptun", "events", "-w", "-o", "json",
            "--socket", str(served.path)]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout is not None
        watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        out, err = watching.communicate(timeout=60)
    assert (watching.returncode, out, err) == (130, "", "")


HEAVY = {
    "asyncio", "aiohttp", "pyroute2", "uvloop", "prometheus_client", "logging", "dataclasses",
    "udptun._core", "udptun.model", "udptun.forwarder", "udptun.lab",
    "concurrent.futures", "multiprocessing", "subprocess", "tempfile", "unittest",
}


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        ("status", set()),
        ("drops", set()),
        ("trace 127.0.0.1", {"udptun.model", "dataclasses"}),
        ("events", set()),
        ("route list", set()),
        ("version", set()),
        (f"route add {ROUTE}", {"udptun.model", "dataclasses"}),
        ("route del 10.0.0.0/8", {"udptun.model", "dataclasses"}),
    ],
)
def test_client_commands_import_little(served: Served, words: str, needs: set[str]) -> None:
    """Few imports make a client command start fast; the time itself depends on the machine."""
    script = f"""
import sys
from udptun.cli import cli
code = cli.main({words.split()!r}, prog_name="udptun", standalone_mode=False)
assert not code, code
print("loaded:", *sys.modules, file=sys.stderr)
"""
    env = dict(os.environ, UDPTUN_SOCKET=str(served.path))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env
    )
    loaded = set(done.stderr.split("loaded:")[1].split())
    assert loaded & HEAVY <= needs
    assert not {name for name in loaded if name.startswith(("email.mime", "udptun.control.server"))}


def test_the_last_dropped_packets(udptun: Udptun) -> None:
    assert udptun("drops --last").stdout.splitlines() == [
        "TIME          REASON    DIRECTION  PACKETS  BYTES  PEER OR SENDER  PACKET",
        "13:05:24.921  no_route  encap            1     84               -  "
        "udp 10.244.1.7:40000 > 10.244.9.9:53",
    ]
    (row,) = [row for row in udptun.json("drops --last")["drops"] if row["last"]]
    assert row["last"][0]["dst_port"] == 53


def test_status_of_some_peers(udptun: Udptun) -> None:
    assert [row["state"] for row in udptun.json("status --sort state")["mesh"]] == [
        "not probed", "reachable"]
    assert [row["name"] for row in udptun.json("status --sort received")["mesh"]] == [
        "192.0.2.2:8285", "[2001:db8::3]:8285"]
    text = udptun("status --state unreachable").stdout
    assert text.endswith("no peer in this state\n2 more peers in other states\n")
    fails(udptun("status nobody"), 2, "'nobody' is not a peer: see `udptun status`")


def test_status_for_programs(udptun: Udptun) -> None:
    dump = [line.split("\t") for line in udptun("status -o dump").stdout.splitlines()]
    assert [len(row) for row in dump] == [20, 20]
    assert dump[0][:2] == ["192.0.2.2:8285", "reachable"]
    assert dump[0][12:16] == ["12", "1536", "3", "999"]
    assert dump[0][16:] == ["10.244.2.0/24", "ECONNREFUSED", "-", "-"]
    text = udptun("status -o yaml").stdout
    assert '"mesh":\n  -\n    "name": "192.0.2.2:8285"\n' in text
    assert '"mark": null\n' in text


def test_status_with_rates(
    served: Served, udptun: Udptun, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = status_of(1, 0)["peers"][0] | {"endpoint": "192.0.2.9:8285", "subnets": []}
    served.forwarder.other_status = {"peers": [peer]}

    def sends(_: float) -> None:
        """The peer receives 1000 bytes between the two counts."""
        peer["encap"]["bytes"] += 1000

    monkeypatch.setattr("udptun.cli.status.time", SimpleNamespace(
        sleep=sends, monotonic=iter((1.0, 1.5) * 9).__next__))
    row = udptun.json("status 192.0.2.9 --rates")["mesh"][0]
    assert (row["out_bytes_per_second"], row["in_bytes_per_second"]) == (2000, 0)
    (line,) = udptun("status 192.0.2.9 --rates -o dump").stdout.splitlines()
    assert line.endswith("\t2000\t0")
    assert "1.95 KiB/s" in udptun("status --rates").stdout
    row = udptun.json("status 192.0.2.9")["mesh"][0]
    assert (row["out_bytes_per_second"], row["in_bytes_per_second"]) == (None, None)


def test_the_address_of_a_pod_names_its_peer(udptun: Udptun) -> None:
    assert [row["name"] for row in udptun.json("status 10.244.2.9")["mesh"]] == ["192.0.2.2:8285"]
    assert [row["name"] for row in udptun.json("status 2001:DB8:0::3")["mesh"]] == [
        "[2001:db8::3]:8285"]


def test_status_that_repeats_keeps_one_connection(
    udptun: Udptun, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, rounds, connect = [], [], _UnixConnection.connect

    def stop_at_third(_: float) -> None:
        rounds.append(None)
        if len(rounds) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(
        _UnixConnection, "connect", lambda self: connect(self) or opened.append(self))
    monkeypatch.setattr("udptun.cli.status.time.sleep", stop_at_third)
    assert udptun("status -w").exit_code == 130
    assert len(opened) == 1


def test_status_check(udptun: Udptun, served: Served) -> None:
    result = udptun("status --check")
    assert (result.exit_code, result.output) == (0, "")
    peer = status_of(1, 0)["peers"][0]
    peer["probe"] |= {"state": "unreachable", "reason": "3 probes in a row were not answered"}
    served.forwarder.other_status = {"peers": [peer]}
    result = udptun("status --check")
    assert (result.exit_code, result.output) == (
        1, "192.0.2.2:8285 is unreachable: 3 probes in a row were not answered\n")
