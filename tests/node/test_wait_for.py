"""``udptun forward --wait-for FILE``: the sources of its options, and errors in the file.

The tests run the real command until it would create a forwarder.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

PROGRAM = """
import sys
import udptun.forwarder
from udptun.cli import main

class Told:
    def __init__(self, config, *others):
        print(*(f"{name}={getattr(config, name)}" for name in config.__slots__), sep="\\n")
        sys.exit(0)

udptun.forwarder.Forwarder = Told
main()
"""
WANTED = {
    "tun": "wire0", "listen": ["192.0.2.1:8285", "[2001:db8::1]:8285"],
    "address": ["10.244.1.0"], "network": ["10.244.0.0/16"], "control": "/run/c.sock",
    "state": "/var/s", "mtu": 1422, "routes": None,
}


@contextmanager
def forwarding(*argv: str, **env: str) -> "Iterator[subprocess.Popen[str]]":
    with TemporaryDirectory() as directory:  # for the instance's lock
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "forward", *argv],
            env=os.environ | {"RUNTIME_DIRECTORY": directory} | env,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def end(process: "subprocess.Popen[str]") -> tuple[int, dict[str, str], str]:
    out, err = process.communicate(timeout=30)
    told = dict(line.partition("=")[::2] for line in out.splitlines())
    return process.returncode, told, err


def write(path: Path, value: object) -> Path:
    new = path.with_name("new")
    new.write_text(value if isinstance(value, str) else json.dumps(value))
    new.replace(path)
    return path


def wait_until_it_waits(process: "subprocess.Popen[str]", path: Path) -> None:
    assert process.stderr is not None
    assert f"waiting for the options file {path}" in process.stderr.readline()


def test_a_file_that_is_there_gives_the_options(tmp_path: Path) -> None:
    path = write(tmp_path / "forward.json", WANTED)
    with forwarding("--wait-for", str(path)) as process:
        code, told, err = end(process)
    assert (code, err) == (0, "")
    assert told["tun"] == "wire0"
    assert told["listen"] == (
        "(Endpoint(address=IPv4Address('192.0.2.1'), port=8285), "
        "Endpoint(address=IPv6Address('2001:db8::1'), port=8285))"
    )
    assert told["addresses"] == "(IPv4Address('10.244.1.0'),)"
    assert told["networks"] == "(IPv4Network('10.244.0.0/16'),)"
    assert (told["control"], told["state_file"], told["mtu"]) == ("/run/c.sock", "/var/s", "1422")
    assert (told["routes_file"], told["source_check"]) == ("None", "strict")  # as without a file


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    path = write(tmp_path / "forward.json", WANTED)
    with forwarding(UDPTUN_FORWARD_WAIT_FOR=str(path)) as process:
        code, told, _ = end(process)
    assert (code, told["tun"]) == (0, "wire0")


def test_forward_waits_for_the_file_and_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "run" / "udptun" / "forward.json"
    with forwarding("--wait-for", str(path)) as process:
        wait_until_it_waits(process, path)
        path.parent.mkdir(parents=True)
        write(path, WANTED)
        code, told, _ = end(process)
    assert code == 0
    assert told["tun"] == "wire0"


def test_forward_can_be_stopped_while_it_waits(tmp_path: Path) -> None:
    path = tmp_path / "forward.json"
    with forwarding("--wait-for", str(path)) as process:
        wait_until_it_waits(process, path)
        process.terminate()
        code, told, err = end(process)
    assert (code, told, err) == (-signal.SIGTERM, {}, "")


def test_command_line_and_environment_take_precedence_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "forward.json", WANTED | {"listen": "192.0.2.1"})
    env = {"UDPTUN_FORWARD_WORKERS": "2", "UDPTUN_FORWARD_TUN": "env0"}
    # one option before --wait-for, and one option after it
    with forwarding("--mtu", "1300", "--wait-for", str(path), "--control", "/c", **env) as process:
        code, told, _ = end(process)
    assert code == 0
    assert (told["mtu"], told["control"], told["tun"]) == ("1300", "/c", "env0")
    assert told["workers"] == "2"
    assert told["listen"] == "(Endpoint(address=IPv4Address('192.0.2.1'), port=8285),)"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("{", "'{' is not valid: expected JSON ("),
        ("", "'' is not valid: expected JSON ("),
        ("[]", "[] is not valid: expected an object with the long options"),
        (WANTED | {"lisen": "192.0.2.1"}, ": lisen: '192.0.2.1' is not valid: expected only long"),
        (WANTED | {"wait-for": "/x"}, ": wait-for: '/x' is not valid: expected only long"),
        (WANTED | {"listen": "peer"}, ": listen: 'peer' is not valid: expected an IPv4 or IPv6"),
        (WANTED | {"listen": [["192.0.2.1"]]}, "expected a string or a number, or a list of these"),
        (WANTED | {"listen": {}}, "expected a string or a number, or a list of these"),
        (WANTED | {"tun": ["a", "b"]}, ": tun: ['a', 'b'] is not valid: expected a string or"),
        (WANTED | {"tun": True}, ": tun: True is not valid: expected a string or a number"),
        (WANTED | {"mtu": 1.5}, ": mtu: 1.5 is not valid: expected a string or a number"),
        (WANTED | {"mtu": "big"}, ": mtu: 'big' is not valid: expected auto or a whole number"),
        (WANTED | {"source-check": "loose"}, ": source-check: 'loose' is not one of"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, value: object, says: str) -> None:
    path = write(tmp_path / "forward.json", value)
    with forwarding("--wait-for", str(path)) as process:
        code, told, err = end(process)
    assert (code, told) == (1, {})
    assert err.startswith(f"udptun: error: {path}: ")
    assert says in err
    assert err.count("\n") == 1


def test_options_that_contradict_each_other_name_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "forward.json", WANTED | {"listen": ["192.0.2.1", "192.0.2.2"]})
    with forwarding("--wait-for", str(path)) as process:
        code, _, err = end(process)
    assert code == 2
    assert "--listen: '192.0.2.2' is not valid: expected at most one IPv4 and" in err
    assert f"(some options are from {path})" in err


def test_a_file_without_what_is_required(tmp_path: Path) -> None:
    path = write(tmp_path / "forward.json", {"tun": "wire0"})
    with forwarding("--wait-for", str(path)) as process:
        code, _, err = end(process)
    assert code == 2
    assert "Missing option '--listen'" in err


def test_a_path_that_cannot_be_read(tmp_path: Path) -> None:
    with forwarding("--wait-for", str(tmp_path)) as process:
        code, _, err = end(process)
    assert code == 1
    assert err == f"udptun: error: {tmp_path}: Is a directory\n"
    below = write(tmp_path / "file", {}) / "forward.json"
    with forwarding("--wait-for", str(below)) as process:
        assert end(process)[::2] == (1, f"udptun: error: {below}: Not a directory\n")
