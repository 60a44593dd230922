"""``udptun forward``: its options, their errors, and signals.

The forwarder itself is a fake here, in a process of its own; tests/netns runs the real one.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from click.testing import CliRunner, Result

from tests.own_netns import in_own_mount_namespace, in_own_netns, sh
from udptun.cli import cli

NEEDED = ["--listen", "192.0.2.1"]


def invoke(*argv: str, **env: str) -> Result:
    return CliRunner().invoke(cli, ["forward", *argv], env=env, prog_name="udptun")


@pytest.mark.parametrize(
    ("argv", "option", "value", "expected"),
    [
        (["--listen", "peer:8285"], "--listen", "'peer'", "an IPv4 or IPv6 address"),
        (["--listen", "192.0.2.1:0"], "--listen", "'192.0.2.1:0'", "from 1 to 65535, not 0"),
        (["--listen", "0.0.0.0:8285"], "--listen", "'0.0.0.0:8285'", "the address of an interface"),
        ([*NEEDED, "--listen", "192.0.2.2"], "--listen", "'192.0.2.2'", "at most"),
        ([*NEEDED, "--address", "10.244.1.0/32"], "--address", "'10.244.1.0/32'", "address"),
        ([*NEEDED, "--address", "10.0.0.1", "--address", "10.0.0.2"], "--address", "'10.0.0.2'",
         "at most"),
        ([*NEEDED, "--network", "10.244.0.1/16"], "--network", "'10.244.0.1/16'",
         "(10.244.0.0/16)"),
        ([*NEEDED, "--network", "224.0.0.0/4"], "--network", "'224.0.0.0/4'", "(multicast)"),
        ([*NEEDED, "--network", "127.1.0.0/16"], "--network", "'127.1.0.0/16'", "(loopback)"),
        ([*NEEDED, "--network", "fe80::/64"], "--network", "'fe80::/64'", "(link-local)"),
        ([*NEEDED, "--network", "0.0.0.0/0"], "--network", "'0.0.0.0/0'", "default route"),
        ([*NEEDED, "--mtu", "big"], "--mtu", "'big'", "auto or a whole number"),
        ([*NEEDED, "--mtu", "100"], "--mtu", "100", "auto, or from 576"),
        ([*NEEDED, "--mtu", "0"], "--mtu", "0", "auto, or from 576"),
        ([*NEEDED, "--workers", "0"], "--workers", "0", "auto, or from 1"),
        ([*NEEDED, "--mtu", "1279", "--address", "fd00::1"], "--mtu", "1279", "at least 1280"),
        ([*NEEDED, "--tun", "a:b"], "--tun", "'a:b'", "a device name"),
        ([*NEEDED, "--control", "/s", "--flannel-control", "/s"], "--flannel-control", "'/s'",
         "another path"),
        ([*NEEDED, "--workers", "1000"], "--workers", "1000", "from 1 to 64"),
        ([*NEEDED, "--offload", "auto,udp-gso"], "--offload", "'udp-gso'", "tun-gso"),
        ([*NEEDED, "--offload", "on"], "--offload", "'on'", "auto, off"),
        ([*NEEDED, "--source-check", "loose"], "--source-check", "'loose'", "'strict'"),
        ([*NEEDED, "--tun", "a/b"], "--tun", "'a/b'", "a device name"),
        ([*NEEDED, "--tun", "x" * 16], "--tun", "'xxxxxxxxxxxxxxxx'", "15 bytes"),
        ([*NEEDED, "--flannel-control-fd", "-1"], "--flannel-control-fd", "-1", "x>=0"),
        ([*NEEDED, "--instance", "Blue"], "--instance", "'Blue'", "1 to 8 of a-z"),
        ([], "--listen", "", "Missing option"),
    ],
)
def test_error_of_an_invalid_value_names_the_option(
    argv: list[str], option: str, value: str, expected: str
) -> None:
    result = invoke(*argv)
    assert result.exit_code == 2, result.output
    for text in (option, value, expected):
        assert text in result.stderr
    assert "Traceback" not in result.output


# In a process of its own

PROGRAM = '''
import asyncio, os, sys
import udptun.forwarder
from udptun.errors import DeviceError, FieldError

class Fake:
    """Prints each call on stdout; ``how`` selects a failure."""

    successor = None

    def __init__(self, config, lock, kept, forget):
        self.lock = lock
        self.config, self.how, self.stop = config, os.environ.get("HOW"), asyncio.Event()

    async def __aenter__(self):
        self.lock.acquire_if_possible()
        if self.how == "device":
            raise DeviceError(1, "opening the TUN device udptun0: Operation not permitted")
        if self.how == "route":
            raise FieldError("via", "x", "an IPv4 address", "routes.txt: line 3")
        if self.how == "os":
            raise FileNotFoundError(2, "No such file or directory", "/state")
        if self.how == "bug":
            raise ZeroDivisionError("a bug")
        print("up", type(asyncio.get_running_loop()).__module__, flush=True)
        return self

    async def __aexit__(self, *exc):
        print("draining", flush=True)
        self.lock.release()
        if self.how == "stuck":
            await asyncio.Event().wait()

    async def wait_stopped(self):
        await self.stop.wait()

    def request_stop(self):
        self.stop.set()

    async def reload(self):
        print("reload", flush=True)
        if self.how == "reload":
            raise FieldError("via", "x", "an IPv4 address", "routes.txt: line 3")

    def check_host(self):
        pass

    def on_device(self, keep):
        keep({})

    async def answers(self):
        return True

    def log_state(self):
        print("state", flush=True)

udptun.forwarder.Forwarder = Fake
if os.environ.get("HOW") == "config":
    class Recorder(Fake):
        async def __aenter__(self):
            fields = {name: str(getattr(self.config, name)) for name in self.config.__slots__}
            import json
            print(json.dumps(fields))
            self.stop.set()
            return self
    udptun.forwarder.Forwarder = Recorder
from udptun.cli import main
main()
'''


@contextmanager
def forwarding(
    *argv: str, how: str = "", before: tuple[str, ...] = (), **env: str
) -> Iterator["subprocess.Popen[str]"]:
    """Run ``udptun forward`` in a process with its own runtime directory.

    With a common directory, two processes would need the same instance lock.

    how     behaviour of the fake forwarder in PROGRAM
    before  options that come before ``forward``
    """
    kept = {
        k: v for k, v in os.environ.items()
        if k != "JOURNAL_STREAM" and not k.startswith("UDPTUN_")
    }
    with TemporaryDirectory() as directory:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *before, "forward", *NEEDED, *argv],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=kept | {"HOW": how, "RUNTIME_DIRECTORY": directory} | env,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_0(number: signal.Signals) -> None:
    with forwarding() as process:
        assert line(process) == "up uvloop"
        process.send_signal(number)
        code, out, err = end(process)
    assert (code, out) == (0, "draining\n")
    assert f"INFO udptun: {number.name}: stopping" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_exits_at_once(second: signal.Signals) -> None:
    with forwarding(how="stuck") as process:
        line(process)
        process.send_signal(signal.SIGTERM)
        assert line(process) == "draining"
        process.send_signal(second)
        code, _, err = end(process)
    assert code == 1
    assert f"{second.name} again: exiting at once" in err


def test_hup_reloads_and_usr1_logs_the_state() -> None:
    with forwarding("--routes", "/r") as process:
        line(process)
        process.send_signal(signal.SIGHUP)
        assert line(process) == "reload"
        process.send_signal(signal.SIGUSR1)
        assert line(process) == "state"
        process.terminate()
        assert end(process)[0] == 0


def test_an_invalid_route_file_leaves_the_forwarder_running() -> None:
    with forwarding("--routes", "/r", how="reload") as process:
        line(process)
        process.send_signal(signal.SIGHUP)
        assert line(process) == "reload"
        process.terminate()
        code, _, err = end(process)
    assert code == 0
    assert "the routes stay as they are: routes.txt: line 3: via: 'x' is not valid" in err


def test_hup_without_a_route_file_keeps_the_table() -> None:
    with forwarding() as process:
        line(process)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGUSR1)
        assert line(process) == "state"
        process.terminate()
        code, _, err = end(process)
    assert code == 0
    assert "no route file is configured" in err


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("device", "udptun: error: opening the TUN device udptun0: Operation not permitted"),
        ("route", "udptun: error: routes.txt: line 3: via: 'x' is not valid: expected an IPv4"),
        ("os", "udptun: error: [Errno 2] No such file or directory: '/state'"),
    ],
)
def test_error_prints_one_line_and_exits_1(how: str, says: str) -> None:
    with forwarding(how=how) as process:
        code, _, err = end(process)
    assert code == 1
    assert err.startswith(says)
    assert err.count("\n") == 1
    with forwarding("-vv", how=how) as process:
        code, _, err = end(process)
    assert code == 1
    assert "Traceback" in err and says in err


def test_an_unexpected_error_has_a_traceback() -> None:
    with forwarding(how="bug") as process:
        code, _, err = end(process)
    assert code == 1
    assert "Traceback" in err and "ZeroDivisionError: a bug" in err


def test_options_become_the_config() -> None:
    words = """--listen [2001:db8::1]:9 --tun wire0 --address 10.244.1.0 --address fd00::1
               --network 10.244.0.0/16 --network fd00::/48 --control /c --routes /r --state /s
               --mtu 1400 --workers 2 --offload auto,-udp-merge --source-check peer
               --admit own --subnet 10.244.1.0/24 --subnet fd00::/64 --mark 0x1000/0xf000
               --dscp inherit
               --flannel-control /f --flannel-control-fd 7 --metrics 9100 --metrics-peers 3"""
    with forwarding(*words.split(), how="config") as process:
        config = json.loads(line(process))
    plain = {k: re.sub(r"IPv[46](Address|Network)\('([^']*)'\)", r"\2", v)
             for k, v in config.items()}
    assert plain == {
        "listen": "(Endpoint(address=192.0.2.1, port=8285), "
                  "Endpoint(address=2001:db8::1, port=9))",
        "tun": "wire0", "addresses": "(10.244.1.0, fd00::1)",
        "networks": "(10.244.0.0/16, fd00::/48)", "control": "/c", "routes_file": "/r",
        "state_file": "/s", "mtu": "1400", "workers": "2", "offload": "auto,-udp-merge",
        "source_check": "peer", "flannel_control": "/f", "flannel_control_fd": "7",
        "takeover": "/c.takeover.sock", "take_over": "False", "accelerate": "off",
        "metrics": "127.0.0.1:9100", "metrics_peers": "3",
        "admit": "own", "subnets": "(10.244.1.0/24, fd00::/64)", "mark": "0x1000/0xf000",
        "dscp": "None",
    }


def test_defaults_and_environment(tmp_path: Path) -> None:
    env = {"RUNTIME_DIRECTORY": str(tmp_path), "UDPTUN_FORWARD_ADDRESS": "10.244.1.0 fd00::1"}
    with forwarding("--workers", "auto", how="config", **env) as process:
        config = json.loads(line(process))
    assert config["control"] == f"{tmp_path}/udptun.sock"
    with forwarding(how="config", RUNTIME_DIRECTORY=f"{tmp_path}/a:{tmp_path}/b") as process:
        assert json.loads(line(process))["control"] == f"{tmp_path}/a/udptun.sock"
    assert config["addresses"] == "(IPv4Address('10.244.1.0'), IPv6Address('fd00::1'))"
    assert (config["mtu"], config["workers"], config["dscp"]) == ("None", "None", "0")
    assert (config["tun"], config["offload"], config["source_check"]) == (
        "udptun0", "auto", "strict",
    )


@pytest.mark.parametrize(
    ("before", "argv", "env", "name"),
    [
        ((), ("--instance", "blue"), {}, "blue"),
        (("--instance", "blue"), (), {}, "blue"),
        ((), (), {"UDPTUN_INSTANCE": "blue"}, "blue"),
        ((), ("--instance", "blue"), {"UDPTUN_INSTANCE": "red"}, "blue"),
        (("--instance", "blue"), (), {"UDPTUN_INSTANCE": "red"}, "blue"),
        (("--instance", "red"), ("--instance", "blue"), {}, "blue"),
        ((), (), {}, "udptun"),
    ],
)
def test_the_instance_gives_the_default_names(
    tmp_path: Path, before: tuple[str, ...], argv: tuple[str, ...], env: dict[str, str], name: str
) -> None:
    with forwarding(
        *argv, how="config", before=before, RUNTIME_DIRECTORY=str(tmp_path), **env
    ) as process:
        config = json.loads(line(process))
    assert config["tun"] == f"{name}0"
    assert config["control"] == f"{tmp_path}/{name}.sock"


def test_explicit_names_take_precedence_over_the_instance(tmp_path: Path) -> None:
    with forwarding(
        "--instance", "blue", "--tun", "wire0", "--control", "/c", how="config"
    ) as process:
        config = json.loads(line(process))
    assert (config["tun"], config["control"]) == ("wire0", "/c")


def test_an_instance_in_the_options_file(tmp_path: Path) -> None:
    """The command line and the environment take precedence, as for every option in the file."""
    file = tmp_path / "forward.json"
    file.write_text(json.dumps({"instance": "blue"}))
    for argv, env, tun in (
        ((), {}, "blue0"), (("--instance", "red"), {}, "red0"),
        ((), {"UDPTUN_INSTANCE": "red"}, "red0"),
    ):
        with forwarding("--wait-for", str(file), *argv, how="config", **env) as process:
            assert json.loads(line(process))["tun"] == tun


def test_second_forwarder_of_an_instance_is_refused(tmp_path: Path) -> None:
    env = {"RUNTIME_DIRECTORY": str(tmp_path)}
    with forwarding(**env) as first:
        assert line(first) == "up uvloop"
        with forwarding(**env) as second:
            code, _, err = end(second)
        assert code == 1
        assert err.startswith("udptun: error: udptun forward of the instance udptun is already")
        assert err.count("\n") == 1
        with forwarding("--instance", "blue", **env) as other:
            assert line(other) == "up uvloop", end(other)
    with forwarding(**env) as again:
        assert line(again) == "up uvloop"


def test_forwarder_without_access_to_the_lock_runs_unlocked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with forwarding(RUNTIME_DIRECTORY=str(tmp_path / "file")) as process:
        assert line(process) == "up uvloop"
        process.terminate()
        assert "cannot lock the instance udptun" in end(process)[2]


def test_no_time_stamp_for_the_journal(tmp_path: Path) -> None:
    """systemd sets JOURNAL_STREAM to device and inode of the stderr that it has made."""
    reader, writer = os.pipe()
    stream = os.fstat(writer)
    program = "from udptun.cli import logs; logs.start(); logs.log.info('one')"
    for variable, expected in (
        (f"{stream.st_dev}:{stream.st_ino}", r"INFO udptun: one\n"),
        ("8:1", r"\d{4}-\d\d-\d\d [\d:,]+ INFO udptun: one\n"),  # inherited, another stderr
    ):
        subprocess.run([sys.executable, "-c", program], stderr=writer, check=True,
                       env=os.environ | {"JOURNAL_STREAM": variable})
        assert re.fullmatch(expected, os.read(reader, 1 << 16).decode())
    os.close(reader)
    os.close(writer)


def test_a_log_file_has_times_and_a_limit(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from udptun.cli import logs
logs.FILE_MAX = 4000
logs.start()
logs.log.info("before")
logs.start(0, "text", Path(sys.argv[1]))
for n in range(1000):
    logs.log.info("line %d", n)
os.write(2, b"the text of a crash")
"""
    file = tmp_path / "forwarder.log"
    result = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True,
        env=os.environ | {"JOURNAL_STREAM": "8:1"},
    )
    assert result.stderr.endswith("before\n") and result.stderr.count("\n") == 1
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["forwarder.log", "forwarder.log.1"]
    assert all(path.stat().st_size <= 4100 for path in files)
    lines = file.read_text().splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d [\d:,]+ INFO udptun: line ", lines[0])
    assert lines[-2].endswith("line 999") and lines[-1] == "the text of a crash"


def test_a_log_file_that_cannot_be_written() -> None:
    with forwarding("--log-file", "/nonexistent/log") as process:
        code, _, err = end(process)
    assert (code, err) == (1, "udptun: error: --log-file /nonexistent/log: No such file or "
                              "directory (ENOENT)\n")


@in_own_netns
def test_a_log_file_on_a_readonly_disk_is_used_later(tmp_path: Path) -> None:
    """Also if the disk has no room for a new file after the former one was renamed."""
    in_own_mount_namespace()
    program = """
import subprocess, sys
from pathlib import Path
from udptun.cli import logs
file = Path(sys.argv[1])
def remount(how):
    subprocess.run(["mount", "-o", f"remount,{how}", file.parent], check=True)
logs.FILE_MAX = 4000
logs.start(file=file)
logs.log.info("to stderr")
remount("rw")
logs.log.info("to the file")
for n in range(200):
    logs.log.info("line %d", n)
remount("nr_inodes=9")
logs.log.info("the last line")
"""
    disk = tmp_path / "disk"
    disk.mkdir()
    sh(f"mount -t tmpfs -o ro,nr_inodes=2 none {disk}")
    file = disk / "forwarder.log"
    result = subprocess.run([sys.executable, "-c", program, str(file)],
                            capture_output=True, text=True, check=True)
    assert result.stderr.endswith("to stderr\n") and result.stderr.count("\n") == 1
    assert file.read_text().endswith("the last line\n")


def test_a_log_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "log"
    link.symlink_to(tmp_path / "other")
    with forwarding("--log-file", str(link)) as process:
        code, _, err = end(process)
    assert (code, err) == (1, f"udptun: error: --log-file: {link} is a symbolic link: expected a "
                              "regular file\n")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("act", ["shutil.rmtree(file.parent)", "file.unlink()",
                                 "file.rename(file.with_suffix('.old'))"])
def test_a_log_file_that_was_removed_is_made_again(tmp_path, act):
    file = tmp_path / "state" / "forwarder.log"
    file.parent.mkdir()
    program = f"""
import shutil, sys
from pathlib import Path
from udptun.cli import logs
file = Path(sys.argv[1])
logs.start(file=file)
logs.log.info("before")
{act}
logs.log.info("after")
print("a crash", file=sys.stderr, flush=True)
"""
    subprocess.run([sys.executable, "-c", program, str(file)], check=True)
    assert re.fullmatch(r"\S+ \S+ INFO udptun: after\na crash\n", file.read_text())
