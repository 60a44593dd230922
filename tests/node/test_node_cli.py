"""``udptun node``: the configuration from flags and variables, and errors for invalid values.

The daemon itself is a fake here.
"""

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner, Result

from udptun._version import __version__
from udptun.cli import cli
from udptun.cli.node import node
from udptun.errors import DeviceError
from udptun.instance import Instance
from udptun.leases.etcd.config import EtcdConfig
from udptun.leases.file.config import FileConfig
from udptun.leases.kube.config import KubeConfig
from udptun.leases.sources import NotInstalled
from udptun.node.config import InterfaceOptions, NodeConfig

FLANNELD = {  # flag: default, as in flanneld's usage text
    "etcd-endpoints": "http://127.0.0.1:4001,http://127.0.0.1:2379",
    "etcd-prefix": "/coreos.com/network", "etcd-keyfile": "", "etcd-certfile": "",
    "etcd-cafile": "", "etcd-username": "", "etcd-password": "", "iface": None,
    "iface-regex": None, "iface-can-reach": None, "subnet-file": "/run/flannel/subnet.env",
    "public-ip": None, "public-ipv6": None, "subnet-lease-renew-margin": "60",
    "ip-masq": "false", "kube-subnet-mgr": "false", "kube-api-url": "",
    "kube-annotation-prefix": "flannel.alpha.coreos.com/", "kubeconfig-file": None,
    "healthz-ip": "0.0.0.0", "healthz-port": "0", "iptables-resync": "5",
    "iptables-forward-rules": "true", "net-config-path": "/etc/kube-flannel/net-conf.json",
    "set-node-network-unavailable": "true", "version": "false", "v": "0",
}


class FakeDaemon:
    def __init__(self) -> None:
        self.configs: list[NodeConfig] = []
        self.error: Exception | None = None

    async def run(self, config: NodeConfig) -> None:
        self.configs.append(config)
        if self.error is not None:
            raise self.error


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    fake, module = FakeDaemon(), ModuleType("udptun.node.daemon")
    module.run = fake.run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "udptun.node.daemon", module)
    # This process has to keep its privileges.
    monkeypatch.setattr("udptun.privileges.keep_only", lambda needs: None)
    for name in ("NODE_NAME", "POD_NAME", "POD_NAMESPACE", "STATE_DIRECTORY", "JOURNAL_STREAM"):
        monkeypatch.delenv(name, raising=False)
    root, ours = logging.getLogger(), logging.getLogger("udptun")
    levels = root.level, ours.level
    yield fake
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def invoke(*argv: str, **env: str) -> Result:
    """Run the command without pytest's log handlers, because a program starts without handlers."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    root.handlers.clear()
    try:
        return CliRunner().invoke(cli, ["node", *argv], env=env, prog_name="udptun")
    finally:
        root.handlers[:] = handlers


def parsed(daemon: FakeDaemon, *argv: str, **env: str) -> NodeConfig:
    result = invoke(*argv, **env)
    assert result.exit_code == 0, result.output
    return daemon.configs[-1]


# flanneld's command lines


def test_every_flanneld_flag_exists_with_flannelds_default(daemon: FakeDaemon) -> None:
    options = {
        opt.lstrip("-"): param for param in node.params for opt in param.opts
        if isinstance(param, click.Option)
    }
    assert set(FLANNELD) <= set(options)
    context = click.Context(node)
    for name, default in {**FLANNELD, "healthz-ip": "127.0.0.1"}.items():  # safer than flannel's
        have = options[name].get_default(context)
        assert str(have) == default or default is None, f"{name}: {have}"
        if name != "version":
            variable = name.upper().replace("-", "_")
            assert options[name].envvar == [f"UDPTUN_NODE_{variable}", f"FLANNELD_{variable}"]


def test_the_defaults_are_those_of_flanneld(daemon: FakeDaemon) -> None:
    config = parsed(daemon)
    assert config == NodeConfig(EtcdConfig())
    assert config.source.kind == "etcd"
    assert config.forward_file == Path("/run/udptun/forward.json")
    assert config.source == EtcdConfig(
        endpoints=("http://127.0.0.1:4001", "http://127.0.0.1:2379"),
        prefix="/coreos.com/network", renew_margin_minutes=60,
    )


def test_flanneld_command_line_for_etcd(daemon: FakeDaemon) -> None:
    words = """-etcd-endpoints=https://192.0.2.1:2379,https://192.0.2.2:2379 -etcd-prefix /net
        --etcd-keyfile=/k --etcd-certfile /c --etcd-cafile=/ca -etcd-username u -etcd-password=p
        --iface=eth0 --iface 192.0.2.7 --iface-regex=^en.* --iface-can-reach 192.0.2.9
        --subnet-file=/s --public-ip=198.51.100.1 --public-ipv6 2001:db8::1
        --subnet-lease-renew-margin 30 --ip-masq --healthz-ip=127.0.0.1 --healthz-port=8080
        --iptables-resync=7 --iptables-forward-rules=false -v=4 -vmodule=a=1"""
    assert parsed(daemon, *words.split()) == NodeConfig(
        source=EtcdConfig(
            endpoints=("https://192.0.2.1:2379", "https://192.0.2.2:2379"), prefix="/net",
            keyfile="/k", certfile="/c", cafile="/ca", username="u", password="p",
            renew_margin_minutes=30,
        ),
        interface=InterfaceOptions(
            ("eth0", "192.0.2.7"), ("^en.*",), ip_address("192.0.2.9"),
            ip_address("198.51.100.1"), ip_address("2001:db8::1"),
        ),
        subnet_file=Path("/s"), ip_masq=True, iptables_forward_rules=False, iptables_resync=7,
        healthz_ip=ip_address("127.0.0.1"), healthz_port=8080,
    )
    assert logging.getLogger("udptun").level == logging.DEBUG


def test_flannels_daemonset_command_line(daemon: FakeDaemon) -> None:
    """The arguments and variables of flannel's DaemonSet."""
    config = parsed(daemon, "--ip-masq", "--kube-subnet-mgr", POD_NAME="flannel-x",
                  POD_NAMESPACE="kube-flannel", EVENT_QUEUE_DEPTH="5000",
                  CONT_WHEN_CACHE_NOT_READY="false")
    assert config == NodeConfig(
        source=KubeConfig(pod_name="flannel-x", pod_namespace="kube-flannel"), ip_masq=True,
    )
    assert config.source.kind == "kubernetes"


def test_flanneld_command_line_for_kubernetes_with_all_flags(daemon: FakeDaemon) -> None:
    words = """--kube-subnet-mgr=true --kube-api-url=https://192.0.2.1:6443 --kubeconfig-file /kc
        --kube-annotation-prefix=example.org/net --net-config-path=/nc
        --set-node-network-unavailable=false --ip-blackhole-route
        --etcd-endpoints=http://192.0.2.9:2379"""  # flanneld ignores this option here
    config = parsed(daemon, *words.split(), NODE_NAME="n1")
    assert config.source == KubeConfig(
        node_name="n1", api_url="https://192.0.2.1:6443", kubeconfig_file=Path("/kc"),
        annotation_prefix="example.org/net", net_config_path=Path("/nc"),
        set_node_network_unavailable=False,
    )


def test_flags_of_newer_flanneld_are_accepted_with_a_warning(daemon: FakeDaemon) -> None:
    result = invoke("--ip-blackhole-route", "--ip-masq-fully-random-disable=false")
    assert result.exit_code == 0
    assert "WARNING udptun: --ip-blackhole-route has no effect: " in result.stderr
    assert "fully-random" not in result.stderr


def test_an_empty_value_counts_as_not_given(daemon: FakeDaemon) -> None:
    argv = ("--iface=", "--iface-regex=", "--public-ip=", "--kubeconfig-file=", "--healthz-ip=",
            "--iface-can-reach=", "--hosts=", "--etcd-endpoints=http://192.0.2.1:2379,")
    assert parsed(daemon, *argv) == NodeConfig(
        source=EtcdConfig(endpoints=("http://192.0.2.1:2379",))
    )


# udptun's own options


def test_our_own_flags(daemon: FakeDaemon) -> None:
    words = """--hosts /etc/udptun/hosts.toml --node-name a --backend auto --advertise=off
        --control /run/x/c.sock --state-dir /var/x --tun wire0 --forwarder external
        --forward-file /run/y/f.json --cleanup"""
    config = parsed(daemon, *words.split())
    assert config == NodeConfig(
        source=FileConfig(Path("/etc/udptun/hosts.toml"), "a"), backend="auto", advertise=False,
        control=Path("/run/x/c.sock"), state_dir=Path("/var/x"), tun="wire0",
        forwarder="external", forward_file=Path("/run/y/f.json"), cleanup=True,
    )
    assert config.source.kind == "file"


def test_the_forward_file_is_in_the_directory_of_the_control_socket(daemon: FakeDaemon) -> None:
    config = parsed(daemon, "--control=/run/x/c.sock")
    assert config.forward_file == Path("/run/x/forward.json")


def test_udptun_socket_sets_the_control_socket(daemon: FakeDaemon) -> None:
    assert parsed(daemon, UDPTUN_SOCKET="/run/x.sock").control == Path("/run/x.sock")


def test_the_instance_sets_the_default_of_each_name(daemon: FakeDaemon) -> None:
    config = parsed(daemon, "--instance=blue")
    assert config == NodeConfig(source=EtcdConfig(), instance=Instance("blue"))
    assert (config.tun, config.control, config.forward_file) == (
        "blue0", Path("/run/blue/blue.sock"), Path("/run/blue/forward.json"))
    assert (config.state_dir, config.subnet_file) == (
        Path("/var/lib/blue"), Path("/run/blue/subnet.env"))
    assert parsed(daemon, UDPTUN_INSTANCE="blue") == config
    given = ("--tun=x0", "--control=/c/c.sock", "--state-dir=/s", "--subnet-file=/e")
    config = parsed(daemon, "--instance=blue", *given)
    assert (config.tun, config.control, config.state_dir, config.subnet_file) == (
        "x0", Path("/c/c.sock"), Path("/s"), Path("/e"))


def test_an_instance_with_a_wrong_name_is_refused(daemon: FakeDaemon) -> None:
    result = invoke("--instance=Blue_1")
    assert result.exit_code == 2
    assert "'Blue_1' is not valid: expected 1 to 8 of a-z" in result.stderr


def test_state_directory_of_a_service_manager(daemon: FakeDaemon) -> None:
    assert parsed(daemon, STATE_DIRECTORY="/var/a:/var/b").state_dir == Path("/var/a")
    assert parsed(daemon).state_dir == Path("/var/lib/udptun")


def test_variables(daemon: FakeDaemon) -> None:
    env = {"FLANNELD_IFACE": "eth0", "FLANNELD_IP_MASQ": "true", "UDPTUN_NODE_BACKEND": "udp",
           "FLANNELD_PUBLIC_IP": "192.0.2.1", "UDPTUN_NODE_PUBLIC_IP": "192.0.2.2",
           "FLANNELD_SUBNET_FILE": "/env", "UDPTUN_NODE_CLEANUP": "true",
           "FLANNELD_VERSION": "true"}
    config = parsed(daemon, "--subnet-file=/argv", **env)
    assert config == NodeConfig(
        source=EtcdConfig(), ip_masq=True, backend="udp", subnet_file=Path("/argv"),
        interface=InterfaceOptions(names=("eth0",), public_ip=ip_address("192.0.2.2")),
    )


# Invalid command lines


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--hosts=/h", "--kube-subnet-mgr"], "--hosts and --kube-subnet-mgr select two"),
        (["--hosts=/h", "--etcd-prefix=/x"], "--hosts and --etcd-prefix select two"),
        (["--kube-subnet-mgr"], "NODE_NAME: '' is not valid"),
        (["--etcd-endpoints="], "--etcd-endpoints: '' is not valid"),
        (["--etcd-endpoints=ftp://x"], "--etcd-endpoints: 'ftp://x' is not valid"),
        (["--etcd-keyfile=/k"], "--etcd-certfile: '' is not valid"),
        (["--subnet-lease-renew-margin=0"], "--subnet-lease-renew-margin: 0 is not valid"),
        (["--subnet-lease-renew-margin=1440"], "--subnet-lease-renew-margin: 1440 is not valid"),
        (["--iface-regex=("], "--iface-regex: '(' is not valid: expected a regular expression"),
        (["--iface-can-reach=eth0"], "'--iface-can-reach': 'eth0' is not valid"),
        (["--public-ip=2001:db8::1"], "'2001:db8::1' is not valid: expected an IPv4 address"),
        (["--public-ipv6=192.0.2.1"], "'192.0.2.1' is not valid: expected an IPv6 address"),
        (["--subnet-file="], "'--subnet-file': '' is not valid: expected the path"),
        (["--state-dir="], "'--state-dir': '' is not valid: expected the path"),
        (["--healthz-ip=any"], "'--healthz-ip': 'any' is not valid"),
        (["--healthz-port=65536"], "--healthz-port: 65536 is not valid"),
        (["--iptables-resync=0"], "'0' is not valid: expected at least 1"),
        (["--backend=host-gw"], "'host-gw' is not one of 'auto', 'udp', 'vxlan'"),
        (["--advertise"], "--advertise needs a value"),
        (["--advertise=yes"], "'yes' is not one of 'on', 'off'"),
        (["--forwarder=none"], "'none' is not one of 'spawn', 'external'"),
        (["--tun=a/b"], "'a/b' is not valid: expected a device name"),
        (["--log-format=xml"], "'xml' is not one of 'text', 'json'"),
        (["--ip-masq", "true"], "'true' is not a flag"),
    ],
)
def test_invalid_option_exits_2_and_is_named(
    daemon: FakeDaemon, argv: list[str], says: str
) -> None:
    result = invoke(*argv)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert daemon.configs == []


def test_a_second_store_that_comes_from_a_variable_is_refused(daemon: FakeDaemon) -> None:
    result = invoke("--hosts=/h", FLANNELD_ETCD_ENDPOINTS="http://192.0.2.1:2379")
    assert result.exit_code == 2
    assert "(from UDPTUN_NODE_ETCD_ENDPOINTS or FLANNELD_ETCD_ENDPOINTS)" in result.stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (DeviceError(1, "making udptun0: Operation not permitted"),
         "udptun: error: making udptun0: Operation not permitted\n"),
        (NotInstalled(ModuleNotFoundError("No module named 'grpc'", name="grpc"), "etcd"),
         "udptun: error: No module named 'grpc': pip install 'udptun[etcd]'\n"),
        (ImportError("a file is broken"), "udptun: error: a file is broken\n"),
        (FileNotFoundError(2, "No such file", "/h"), "udptun: error: [Errno 2] No such file: '/h"),
    ],
)
def test_a_failure_is_one_line_and_exit_1(
    daemon: FakeDaemon, error: Exception, says: str
) -> None:
    daemon.error = error
    result = invoke()
    assert result.exit_code == 1
    assert result.stderr.startswith(says)
    assert result.stderr.count("\n") == 1
    assert "Traceback" in invoke("-v=2").stderr


def test_the_password_is_not_shown(daemon: FakeDaemon) -> None:
    assert "secret" not in repr(parsed(daemon, "--etcd-username=u", "--etcd-password=secret"))


def test_the_password_from_a_file(daemon: FakeDaemon, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(" secret \n")
    file.chmod(0o600)
    result = invoke("--etcd-username=u", f"--etcd-password-file={file}")
    assert (result.exit_code, result.stderr) == (0, "")
    assert daemon.configs[-1].source == EtcdConfig(username="u", password=" secret ")


@pytest.mark.parametrize(("mode", "options", "code", "says"), [
    (0o644, [], 0, "has the password of etcd: chmod o="),
    (0o600, ["--etcd-password=secret"], 2, "--etcd-password, not both"),
    (None, [], 2, "a readable text file"),
])
def test_a_bad_file_with_the_password(
    daemon: FakeDaemon, tmp_path: Path, mode: int | None, options: list[str], code: int, says: str
) -> None:
    file = tmp_path / "password"
    if mode is not None:
        file.write_text("secret")
        file.chmod(mode)
    result = invoke("--etcd-username=u", f"--etcd-password-file={file}", *options)
    assert result.exit_code == code
    assert says in result.stderr
    assert str(file) in result.stderr
    assert "secret" not in result.stderr


def test_a_password_in_the_command_line_causes_a_warning(daemon: FakeDaemon) -> None:
    given = invoke("--etcd-username=u", "--etcd-password=secret")
    assert "every user of this host can read the password" in given.stderr
    from_environment = invoke("--etcd-username=u", UDPTUN_NODE_ETCD_PASSWORD="secret")
    assert from_environment.stderr == ""
    for result in (given, from_environment):
        assert result.exit_code == 0
        assert "secret" not in result.stderr


@pytest.mark.parametrize("option", ["--etcd-endpoints", "--kube-api-url"])
@pytest.mark.parametrize("url", ["ftp://u:secret@192.0.2.1", "u:secret@192.0.2.1:2379",
                                 "ftp://u:se@cret@192.0.2.1/x"])
def test_an_error_about_a_url_does_not_show_its_password(
    daemon: FakeDaemon, option: str, url: str
) -> None:
    kube = ["--kube-subnet-mgr", "--node-name=n"] if "kube" in option else []
    result = invoke(*kube, f"{option}={url}")
    assert result.exit_code == 2
    assert "***@192.0.2.1" in result.stderr
    assert "cret" not in result.stderr


@pytest.mark.parametrize("word", ["--version", "-version", "--version=true"])
def test_version(daemon: FakeDaemon, word: str) -> None:
    result = invoke(word)
    assert (result.exit_code, result.stdout) == (0, f"udptun {__version__}\n")
    assert daemon.configs == []


def test_the_log_as_json(daemon: FakeDaemon) -> None:
    import json

    daemon.error = DeviceError(1, "making udptun0")
    result = invoke("--log-format=json", "--ip-blackhole-route", "-v=2")
    entries = [json.loads(line) for line in result.stderr.splitlines()[:-1]]
    assert [(entry["level"], entry["logger"]) for entry in entries] == [
        ("warning", "udptun"), ("error", "udptun"),
    ]
    assert "blackhole" in entries[0]["message"]
    assert "DeviceError" in entries[1]["exception"]
    assert entries[0]["time"].endswith("+00:00")


def test_libraries_of_the_stores_are_not_loaded() -> None:
    script = "import sys, udptun.cli.node; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60
    ).stdout.split()
    assert not {"grpc", "google", "yaml", "aiohttp", "prometheus_client", "pyroute2",
                "uvloop", "asyncio"} & set(loaded)


def test_every_option_is_explained() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "node.md").read_text()
    for param in node.params:
        name = param.opts[0]
        assert re.search(rf"[` ]{name}[` ,]", page), name
