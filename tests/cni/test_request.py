"""Wrong environments and configurations: each gives an error as JSON, with the right code."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cni.runtime import Answer, Runtime
from udptun.cni import request as module
from udptun.cni.failure import BAD_CONFIG, BAD_CONTENT, BAD_ENVIRONMENT, INCOMPATIBLE_VERSION
from udptun.cni.plugin import run
from udptun.cni.request import DATA_DIRS, MAX_INPUT, Request
from udptun.cni.versions import SUPPORTED
from udptun.instance import Instance

ENVIRON = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_NETNS": "/none",
           "CNI_IFNAME": "eth0", "CNI_PATH": "/none"}
CONFIG: dict[str, Any] = {"cniVersion": "1.1.0", "name": "net1", "type": "udptun"}


def call(
    config: object = None, environ: dict[str, str] | None = None, **changes: Any
) -> Answer:
    text = config if isinstance(config, bytes) else json.dumps(
        {**CONFIG, **changes} if config is None else config).encode()
    sink = io.BytesIO()
    code = run({**ENVIRON, **(environ or {})}, io.BytesIO(text), sink)
    return Answer(code, sink.getvalue().decode(), "")


@pytest.mark.parametrize(("text", "code", "words"), [
    (b"", BAD_CONTENT, "not valid JSON"),
    (b"not JSON", BAD_CONTENT, "not valid JSON"),
    (b"\xff\xfe{}", BAD_CONTENT, "not valid JSON"),
    (b"[" * 200_000, BAD_CONTENT, "not valid JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", BAD_CONTENT, "not valid JSON"),
    (b"[1]", BAD_CONTENT, "expected a JSON object"),
    (b'"' + b"x" * 10_000 + b'"', BAD_CONTENT, "expected a JSON object"),
    (b" " * (MAX_INPUT + 1), BAD_CONTENT, f"more than {MAX_INPUT} bytes"),
    (b'{"cniVersion": "9.0.0", "name": "n"}', INCOMPATIBLE_VERSION, "'9.0.0' is not supported"),
    (b'{"cniVersion": ["1.0.0"], "name": "n"}', INCOMPATIBLE_VERSION, "is not supported"),
    (b'{"cniVersion": {"a": 1}}', INCOMPATIBLE_VERSION, "is not supported"),
])
def test_hostile_input(text: bytes, code: int, words: str) -> None:
    answer = call(text)
    assert answer.error[0] == code
    assert words in answer.error[1]
    assert answer.json["cniVersion"] in SUPPORTED
    assert len(answer.output) < 2000


@pytest.mark.parametrize(("changes", "words"), [
    ({"name": ""}, "name: ''"),
    ({"name": 5}, "name: 5"),
    ({"name": "../x"}, "name: '../x'"),
    ({"name": "a:b"}, "name: 'a:b'"),
    ({"type": ["x"]}, "type: ['x']"),
    ({"instance": "Blue!"}, "instance: 'Blue!'"),
    ({"instance": 7}, "instance: 7"),
    ({"subnetFile": "subnet.env"}, "an absolute path"),
    ({"nodeSocket": "/a\0b"}, "an absolute path"),
    ({"dataDir": 1}, "dataDir: 1"),
    ({"waitSeconds": -1}, "waitSeconds: -1"),
    ({"waitSeconds": True}, "waitSeconds: True"),
    ({"waitSeconds": 1e9}, "a number from 0 to 60"),
    ({"delegate": []}, "delegate: []"),
    ({"delegate": {"name": "x"}}, "delegate.name: 'x'"),
    ({"delegate": {"ipam": {}}}, "delegate.ipam: {}"),
    ({"delegate": {"type": 3}}, "delegate.type: 3"),
    ({"delegate": {"type": "../bridge"}}, "delegate.type: '../bridge'"),
    ({"delegate": {"type": "flannel"}}, "delegate.type: 'flannel'"),
    ({"delegate": {"type": ".."}}, "delegate.type: '..'"),
    ({"ipam": "host-local"}, "ipam: 'host-local'"),
    ({"ipam": {"type": "a/b"}}, "ipam.type: 'a/b'"),
    ({"ipam": {"routes": {}}}, "ipam.routes: {}"),
    ({"runtimeConfig": 1}, "runtimeConfig: 1"),
    ({"prevResult": "x"}, "prevResult: 'x'"),
])
def test_wrong_values_in_the_configuration(changes: dict[str, Any], words: str) -> None:
    """The error names the field and the value."""
    request = Request(ENVIRON, json.dumps(CONFIG).encode())
    request.config.update(changes)
    with pytest.raises(module.CniError) as caught:
        again = Request(ENVIRON, json.dumps(request.config).encode())
        for name in ("files", "data_dir", "wait", "delegate", "ipam", "runtime_config",
                     "previous_result"):
            getattr(again, name)
    assert caught.value.code == BAD_CONFIG
    assert words in caught.value.message


@pytest.mark.parametrize(("attachments", "words"), [
    ("none", "a list"),
    ([1], "valid-attachments[0]"),
    ([{"containerID": "c1"}], "containerID and ifname"),
    ([{"containerID": "c1", "ifname": ""}], "containerID and ifname"),
    ([{"containerID": 1, "ifname": "eth0"}], "containerID and ifname"),
])
def test_wrong_lists_of_attachments(attachments: object, words: str) -> None:
    answer = call(environ={"CNI_COMMAND": "GC"}, **{module.ATTACHMENTS: attachments})
    assert answer.error[0] == BAD_CONFIG
    assert words in answer.error[1]


def test_gc_without_a_list_removes_nothing() -> None:
    assert call(environ={"CNI_COMMAND": "GC"}).error[0] == BAD_CONFIG


@pytest.mark.parametrize(("environ", "words"), [
    ({"CNI_COMMAND": ""}, "CNI_COMMAND is ''"),
    ({"CNI_COMMAND": "add"}, "CNI_COMMAND is 'add'"),
    ({"CNI_COMMAND": "x" * 10_000}, "CNI_COMMAND is 'xxx"),
    ({"CNI_NETNS": "", "CNI_IFNAME": ""}, "CNI_NETNS, CNI_IFNAME"),
    ({"CNI_CONTAINERID": "../../etc/passwd"}, "CNI_CONTAINERID"),
    ({"CNI_CONTAINERID": "a:b"}, "CNI_CONTAINERID"),
    ({"CNI_CONTAINERID": "a" * 300}, "CNI_CONTAINERID"),
    ({"CNI_IFNAME": "eth0/x"}, "CNI_IFNAME"),
    ({"CNI_IFNAME": ".."}, "CNI_IFNAME"),
    ({"CNI_IFNAME": "sixteen-letters-"}, "CNI_IFNAME"),
    ({"CNI_IFNAME": "a b"}, "CNI_IFNAME"),
])
def test_wrong_environments(environ: dict[str, str], words: str) -> None:
    code, message = call(environ=environ).error
    assert code == BAD_ENVIRONMENT
    assert words in message
    assert len(message) < 1000


@pytest.mark.parametrize(("command", "version"), [
    ("CHECK", "0.3.1"), ("STATUS", "1.0.0"), ("GC", "1.0.0"), ("GC", "")])
def test_a_command_that_the_configurations_version_does_not_have(
    command: str, version: str
) -> None:
    answer = call(environ={"CNI_COMMAND": command}, cniVersion=version)
    assert answer.error[0] == INCOMPATIBLE_VERSION
    assert command in answer.error[1]


@pytest.mark.parametrize(("text", "version"), [
    (b"", "1.1.0"), (b'{"cniVersion": "0.3.1"}', "0.3.1"), (b'{"cniVersion": "7"}', "1.1.0"),
    (b"{}", "0.1.0"),
])
def test_version(text: bytes, version: str) -> None:
    answer = call(text, {"CNI_COMMAND": "VERSION", "CNI_PATH": "", "CNI_CONTAINERID": ""})
    assert answer.code == 0
    assert answer.json == {"cniVersion": version, "supportedVersions": list(SUPPORTED)}


def test_version_with_wrong_input() -> None:
    assert call(b"{", {"CNI_COMMAND": "VERSION"}).error[0] == BAD_CONTENT


@pytest.mark.parametrize("name", ["udptun", "blue"])
def test_the_files_of_an_instance(name: str) -> None:
    config = {**CONFIG, "instance": name}
    files = Request(ENVIRON, json.dumps(config).encode()).files
    instance = Instance(name)
    assert files == (str(instance.subnet_file), str(instance.node_socket))
    assert Request(ENVIRON, json.dumps(CONFIG).encode()).data_dir == DATA_DIRS["udptun"]


def test_an_error_of_the_program_is_an_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("out of order\x1b[2J")

    monkeypatch.setattr("udptun.cni.plugin.execute", broken)
    assert call().error == (999, "ValueError: out of order\\x1b[2J")


def test_the_program_reads_a_large_input_and_answers(tmp_path: Path) -> None:
    """As a process: the runtime can write everything, and gets one JSON object."""
    runtime = Runtime(tmp_path, "/none")
    answer = runtime.run("ADD", b" " * (2 * MAX_INPUT))
    assert answer.error[0] == BAD_CONTENT
    assert runtime.run(None).error[0] == BAD_ENVIRONMENT


def test_the_command_of_udptun_is_the_plugin(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path, "/none")
    runtime.program = [sys.executable, "-m", "udptun", "cni"]
    assert runtime.run("VERSION").json["supportedVersions"] == list(SUPPORTED)
    assert runtime.run("ADD").error[0] == 5
