"""``udptun report``: planted secrets are not in the tar, and pseudonyms are the same everywhere."""

from __future__ import annotations

import io
import ipaddress
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.cli.tty import UDPTUN, Tty
from udptun.cli import cli
from udptun.doctor import bundle
from udptun.doctor.bundle import archive, collect
from udptun.doctor.facts import Facts
from udptun.doctor.redact import Pseudonyms, Secrets
from udptun.instance import Instance
from udptun.lab import wait_for
from udptun.leases.base import Attributes, Lease, Subnets
from udptun.leases.cache import LastKnown, LeaseCache
from udptun.leases.netconf import NetConfig

INSTANCE = "rpt"
KEY_LINE = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj"
PEM = f"-----BEGIN PRIVATE KEY-----\n{KEY_LINE}\n-----END PRIVATE KEY-----\n"
# Each of these is planted, and must not be in the tar.
SECRETS = {
    "argv": "pw-in-argv-1", "environment": "pw-in-environ-2", "file": "pw-in-file-3",
    "kubeconfig": "token-in-kubeconfig-4", "url": "url-user:url-pw-5", "lease": "token-in-lease-6",
    "bearer": "bearer-value-777777", "jwt": "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0.c2ln",
    "pem": KEY_LINE, "subnet.env": "var-in-env-8", "query": "query-value-9",
}


@pytest.fixture
def planted(tmp_path: Path):
    """Return the facts of a node that has secrets everywhere."""
    state = tmp_path / "state"
    state.mkdir()
    (tmp_path / "password").write_text(SECRETS["file"] + "\n")
    (tmp_path / "key.pem").write_text(PEM)
    (tmp_path / "kubeconfig").write_text(
        f"users:\n- name: me\n  user:\n    token: {SECRETS['kubeconfig']}\n")
    # The log has each secret without a word that says what it is.
    (state / "forwarder.log").write_text("".join(f"said {one} there\n" for one in (
        SECRETS["argv"], SECRETS["environment"], SECRETS["file"], SECRETS["kubeconfig"], KEY_LINE))
        + f"GET https://{SECRETS['url']}@192.0.2.7/x?access_token={SECRETS['query']}&a=b\n"
        + f"Authorization: Bearer {SECRETS['bearer']}\n{SECRETS['jwt']}\n{PEM}")
    (tmp_path / "subnet.env").write_text(
        f"FLANNEL_MTU=1472\nMY_API_TOKEN={SECRETS['subnet.env']}\n")
    address = ipaddress.IPv4Address("192.0.2.7")
    lease = Lease(
        "10.244.7.0-24", Subnets(ipaddress.IPv4Network("10.244.7.0/24")),
        Attributes(address, None, "udp", {"token": SECRETS["lease"]}), "worker-seven")
    known = LastKnown("etcd", NetConfig.parse('{"Network": "10.244.0.0/16"}'), lease, (lease,),
                      (address,))
    LeaseCache(state / "leases.json")._write(known)
    # A process that looks like a node daemon: the report must not depend on what it is.
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()", "udptun", "node",
         f"--instance={INSTANCE}", f"--etcd-password={SECRETS['argv']}",
         f"--etcd-password-file={tmp_path / 'password'}", "--node-name=worker-seven",
         f"--etcd-keyfile={tmp_path / 'key.pem'}"],
        stdin=subprocess.PIPE,
        env=os.environ | {
            "UDPTUN_NODE_ETCD_PASSWORD": SECRETS["environment"],
            "UDPTUN_NODE_KUBECONFIG_FILE": str(tmp_path / "kubeconfig"),
            "OTHER_VARIABLE": "of-another-program"})
    facts = Facts(Instance(INSTANCE), tmp_path / "udptun.sock", lambda node, peers: [], state,
                  tmp_path / "subnet.env")

    def started() -> bool:  # exec has happened
        facts.__dict__.pop("processes", None)
        return bool(facts.processes)

    wait_for(started, "the process")
    facts.gather()
    yield facts
    process.communicate()


def texts(parts) -> dict[str, str]:
    """Return the files of the tar."""
    with tarfile.open(fileobj=io.BytesIO(archive(parts, "r"))) as tar:
        return {entry.name.partition("/")[2]: tar.extractfile(entry).read().decode()
                for entry in tar}


@pytest.mark.parametrize("redact", [False, True])
def test_no_planted_secret_is_in_the_tar(planted: Facts, redact: bool) -> None:
    found = texts(collect(planted, dict, redact))
    for name, text in found.items():
        for where, secret in SECRETS.items():
            for part in secret.split(":"):
                assert part not in text, f"{name} has the secret of {where}"
        assert "of-another-program" not in text
    assert "said ***" in found["forwarder.log"]
    assert "--etcd-password=***" in found["options.txt"]
    assert "--etcd-password-file=/" in found["options.txt"]  # a path is no secret


def test_pseudonyms_are_consistent(planted: Facts) -> None:
    found = texts(collect(planted, dict, True))
    together = "\n".join(found.values())
    assert "10.244." not in together
    assert "192.0.2.7" not in together
    assert "worker-seven" not in together
    lease = json.loads(found["leases.json"])["leases"][0]
    assert lease["subnets"] == ["net-1/24"]
    assert lease["key"] == "net-1-24"
    assert lease["name"] in found["options.txt"]
    assert f"@{lease['public'][0]}/x" in found["forwarder.log"]


def test_a_part_that_cannot_be_had_has_its_error(planted: Facts, monkeypatch) -> None:
    monkeypatch.setattr(bundle, "COMMANDS", {"none.txt": ("no-such-program",)})
    monkeypatch.setattr(bundle, "_versions", lambda: 1 / 0)
    found = texts(collect(planted, dict, False))
    assert found["none.txt"] == "no-such-program is not installed\n"
    assert "division by zero" in found["versions.txt"]
    assert re.search("none.txt +not there: no-such-program", found["contents.txt"])
    assert "node.json" in found


def test_sizes_and_times_are_bounded(planted: Facts, monkeypatch) -> None:
    monkeypatch.setattr(bundle, "PART_BYTES", 100)
    monkeypatch.setattr(bundle, "PART_SECONDS", 0.5)
    monkeypatch.setattr(bundle, "_sysctls", lambda: time.sleep(60))
    found = texts(collect(planted, dict, False))
    assert found["sysctls.txt"].startswith("not ready within")
    assert all(len(text) < 200 for name, text in found.items() if name != "contents.txt")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start a process of another user")
@pytest.mark.parametrize("program", ["sh", "setuid"])
def test_a_process_of_another_user_names_no_files(tmp_path: Path, monkeypatch, program) -> None:
    """Root would read them, and put them into the report."""
    secret, state = tmp_path / "secret", tmp_path / "state"
    secret.write_text("only root may read this\n")
    secret.chmod(0o600)
    state.mkdir()
    (state / "forwarder.log").symlink_to(secret)
    os.mkfifo(tmp_path / "fifo")  # to read it would take forever
    monkeypatch.setattr(bundle, "COMMANDS", {})
    monkeypatch.setattr(bundle, "UNITS", ())
    argv = ["sh", "-c", "read line", "udptun", "node", f"--instance={INSTANCE}",
            f"--subnet-file={secret}", f"--state-dir={state}", f"--etcd-keyfile={tmp_path}/fifo"]
    effective = 0 if program == "setuid" else 65534
    with subprocess.Popen(
            argv, stdin=subprocess.PIPE,
            preexec_fn=lambda: os.setresuid(65534, effective, 65534),  # noqa: PLW1509 - one thread
            ) as process:
        wait_for(lambda: b"node" in Path(f"/proc/{process.pid}/cmdline").read_bytes(), "exec")
        facts = Facts(Instance(INSTANCE), tmp_path / "udptun.sock", lambda node, peers: [])
        assert facts.processes == []
        facts.gather()
        found = texts(collect(facts, dict, False))
        process.communicate()
    assert not any("only root" in text for text in found.values())


def test_the_log_is_not_read_through_a_link(planted: Facts, tmp_path: Path) -> None:
    log, secret = planted.state_dir / "forwarder.log", tmp_path / "secret"
    log.unlink()
    secret.write_text("only root may read this\n")
    log.symlink_to(secret)
    found = texts(collect(planted, dict, False))
    assert "is a symbolic link" in found["forwarder.log"]
    assert not any("only root" in text for text in found.values())


def test_a_process_of_the_owner_of_the_socket_counts(tmp_path: Path) -> None:
    """A forwarder can run as a user of its own."""
    control = tmp_path / "udptun.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(control))
    facts = Facts(Instance(INSTANCE), control, lambda node, peers: [])
    assert facts.users == {0, os.geteuid()}
    if os.geteuid() == 0:
        os.chown(control, 65534, 65534)
        facts = Facts(Instance(INSTANCE), control, lambda node, peers: [])
        assert facts.users == {0, 65534}


def test_the_command_writes_a_private_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("udptun.doctor.checks.CHECKS", ())
    file = tmp_path / "r.tar.gz"
    done = CliRunner().invoke(cli, [
        "--socket", str(tmp_path / "none.sock"), "report", "-o", str(file)])
    assert done.exit_code == 0, done.output
    assert file.stat().st_mode & 0o777 == 0o600
    assert "doctor.json" in done.output
    with tarfile.open(file) as tar:
        assert all(entry.mode == 0o600 for entry in tar)
    done = CliRunner().invoke(cli, [
        "--socket", str(tmp_path / "none.sock"), "report", "-o", str(tmp_path / "no" / "r")])
    assert done.exit_code == 1
    assert "cannot be written" in done.output


def test_the_command_writes_to_a_pipe(tmp_path: Path) -> None:
    """As in a pod, whose file system is read-only."""
    done = subprocess.run(
        [*UDPTUN, "--socket", str(tmp_path / "none.sock"), "report", "-o", "-"], cwd=tmp_path,
        capture_output=True, check=True)
    assert [*tmp_path.iterdir()] == []
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        assert any(name.endswith("/doctor.json") for name in tar.getnames())
    assert b"doctor.json" in done.stderr
    assert b"--redact" in done.stderr


def test_the_command_writes_no_archive_to_a_terminal() -> None:
    with Tty([*UDPTUN, "report", "-o", "-"]) as terminal:
        terminal.until("needs a pipe or a file")
        assert terminal.ended() == 2


@pytest.mark.parametrize(("text", "clean"), [
    ("--etcd-password hunter22", "--etcd-password ***"),
    ('{"token": "a\\"b", "x": 1}', '{"token": "***", "x": 1}'),
    ("password: null", "password: null"),
    ("etcd at http://a:b@h:1/", "etcd at http://***@h:1/"),
    ("--etcd-password-file=/etc/x", "--etcd-password-file=/etc/x"),
    ("client-key-data: QUJD", "client-key-data: ***"),
    ("nothing here 10.1.2.3", "nothing here 10.1.2.3"),
])
def test_what_looks_like_a_secret(text: str, clean: str) -> None:
    assert Secrets().remove(text) == clean


def test_addresses_of_each_form() -> None:
    names = Pseudonyms([ipaddress.ip_network("10.244.1.0/24"), ipaddress.ip_network("fd00:1::/64")],
                       ["web", "web-2"])
    assert names.replace("10.244.1.0/24 via 10.244.1.7, [fd00:1::5]:8285, 192.0.2.1:8285") == \
        "net-1/24 via net-1.7, [net-2.5]:8285, ip-1:8285"
    assert names.replace("10.244.1.0-24 10.244.1.7/32 0.0.0.0/0 127.0.0.1 ::1 at 12:59:04") == \
        "net-1-24 net-1.7/32 0.0.0.0/0 127.0.0.1 ::1 at 12:59:04"
    assert names.replace("web web-2 webs web.x aa:bb:cc:00:11:22 198.51.100.0/24") == \
        "node-2 node-1 webs node-2.x mac-1 net-3/24"
    assert names.replace("version 1.2.3, 192.0.2.1") == "version 1.2.3, ip-1"
