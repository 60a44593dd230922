"""Delegates that fail: their errors are passed on, and what is no answer is reported as such."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cni.runtime import Runtime, fake_plugin
from udptun.cni.delegate import MAX_OUTPUT


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    runtime = Runtime(tmp_path, str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    runtime.write_subnet()
    return runtime


@pytest.mark.parametrize(("script", "code", "words"), [
    ("""echo '{"code": 11, "msg": "busy", "details": "lock"}'; exit 1""", 11, "bridge: busy"),
    ("""echo '{"code": 7, "msg": 3}'; exit 1""", 999, "bridge ADD ended with exit code 1"),
    ("echo panic >&2; exit 2", 999, "bridge ADD ended with exit code 2"),
    ("kill -9 $$", 999, "bridge ADD ended with signal 9"),
    ("echo hello", 6, "bridge ADD printed no JSON object"),
    ("echo '[1]'", 6, "bridge ADD printed no JSON object"),
    ("exit 0", 6, "bridge ADD printed no result"),
    (f"head -c {MAX_OUTPUT + 1} /dev/zero", 6, "more than"),
    ("exec 1>&-; exit 0", 6, "printed no result"),
])
def test_a_delegate_that_fails(runtime: Runtime, script: str, code: int, words: str) -> None:
    fake_plugin(Path(runtime.path), "bridge", script)
    answer = runtime.run("ADD")
    assert answer.error[0] == code
    assert words in answer.error[1]
    assert answer.json["cniVersion"] == "1.1.0"


def test_what_a_delegate_gets(runtime: Runtime) -> None:
    """The configuration, and the environment with its own command. It need not read its input."""
    seen = runtime.directory / "seen"
    fake_plugin(Path(runtime.path), "ptp", f"""
cat >{seen}
env >{seen}.env
echo '{{"cniVersion": "1.0.0", "ips": [{{"address": "10.244.1.9/24"}}]}}'
""")
    answer = runtime.run(
        "ADD", delegate={"type": "ptp", "ipMasq": True, "mtu": 1200}, ipam={"type": "static"},
        environ={"CNI_ARGS": "K8S_POD_NAME=web"})
    assert answer.json == {"cniVersion": "1.1.0", "ips": [{"address": "10.244.1.9/24"}]}
    assert json.loads(seen.read_text()) == {
        "type": "ptp", "ipMasq": True, "mtu": 1200, "name": "net1", "cniVersion": "1.0.0",
        "ipam": {"type": "static", "ranges": [[{"subnet": "10.244.1.0/24"}]],
                 "routes": [{"dst": "10.244.0.0/16"}]},
    }
    environ = dict(line.split("=", 1) for line in Path(f"{seen}.env").read_text().splitlines())
    assert {name: environ[name] for name in environ if name.startswith("CNI_")} == {
        "CNI_COMMAND": "ADD", "CNI_CONTAINERID": runtime.container_id, "CNI_IFNAME": "eth0",
        "CNI_NETNS": runtime.netns, "CNI_PATH": runtime.path, "CNI_ARGS": "K8S_POD_NAME=web",
    }


def test_a_delegate_that_does_not_read_a_large_configuration(runtime: Runtime) -> None:
    fake_plugin(Path(runtime.path), "bridge", "echo '{}'")
    assert runtime.run("ADD", delegate={"x": "x" * 1_000_000}).code == 0


def test_a_missing_delegate_and_a_delegate_that_is_no_program(runtime: Runtime) -> None:
    for expected in ("is not in CNI_PATH", "is not in CNI_PATH", "cannot be started"):
        code, message = runtime.run("ADD").error
        assert code == 5
        assert expected in message
        program = Path(runtime.path) / "bridge"
        if program.exists():
            program.chmod(0o755)
        else:
            program.write_bytes(b"\x7fELF")
            program.chmod(0o644)
    assert runtime.run("STATUS").error[0] == 50


def test_a_delegate_with_newer_versions_only(runtime: Runtime) -> None:
    program = Path(runtime.path) / "bridge"
    program.write_text("""#!/bin/sh
echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}'
""")
    program.chmod(0o755)
    code, message = runtime.run("ADD", cniVersion="0.3.1").error
    assert code == 1
    assert "none of the versions up to 0.3.1: it has 1.0.0" in message


def test_gc_goes_on_after_a_failure_and_reports_it(runtime: Runtime) -> None:
    fake_plugin(Path(runtime.path), "bridge", """
if [ "$CNI_COMMAND" = ADD ]; then echo '{}'; exit 0; fi
if [ "$CNI_CONTAINERID" = c1 ]; then echo '{"code": 100, "msg": "stuck"}'; exit 1; fi
""")
    for runtime.container_id in ("c1", "c2"):
        assert runtime.run("ADD").code == 0
    answer = runtime.run("GC", **runtime.attachments())
    assert answer.error == (100, "bridge: stuck")
    assert "c1 is not removed" in answer.stderr
    assert runtime.saved() == ["net1:c1:eth0"]


def test_status_and_gc_of_a_delegate_that_has_them(runtime: Runtime) -> None:
    seen = runtime.directory / "seen"
    for name in ("bridge", "host-local"):
        program = Path(runtime.path) / name
        program.write_text(f"""#!/bin/sh
if [ "$CNI_COMMAND" = VERSION ]; then
  echo '{{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}}'
  exit 0
fi
echo {name} $CNI_COMMAND $(cat) >>{seen}
[ "{name}" = bridge ] || [ "$CNI_COMMAND" != STATUS ] || {{
  echo '{{"code": 50, "msg": "full"}}'; exit 1; }}
""")
        program.chmod(0o755)
    assert runtime.run("STATUS").error == (50, "host-local: full")
    assert runtime.run("GC", **runtime.attachments(("c1", "eth0"))).code == 0
    calls = [line.split(" ", 2) for line in seen.read_text().splitlines()]
    assert [call[:2] for call in calls] == [
        ["bridge", "STATUS"], ["host-local", "STATUS"], ["bridge", "GC"]]
    assert json.loads(calls[2][2])["cni.dev/valid-attachments"] == [
        {"containerID": "c1", "ifname": "eth0"}]
