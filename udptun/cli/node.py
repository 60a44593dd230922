"""``udptun node``: parse flanneld's flags and our own flags into a ``NodeConfig``.

Owns the flags, their environment variables, and the check for flags that contradict each other. The
daemon is imported only after the command line is valid.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .._version import __version__
from ..control.listen import parse_listen
from ..errors import FieldError, UdptunError
from ..instance import DEFAULT_INSTANCE, Instance
from ..leases.base import SourceConfig
from ..leases.etcd.config import EtcdConfig
from ..leases.file.config import FileConfig
from ..leases.kube.config import KubeConfig
from ..model import (
    ACCELERATES,
    ADMITS,
    Endpoint,
    IPAddress,
    Mark,
    dscp_text,
    parse_address,
    parse_dscp,
    parse_source_port,
)
from ..node.backends import AUTO, MODES
from ..node.config import FIREWALLS, FORWARDERS, InterfaceOptions, NodeConfig
from . import logs
from .forward import tun_name
from .goflags import Bool, Collected, Duration, GoCommand, Int, Level
from .lazy import Failure, Misuse, failure_of
from .options import Parsed, named_socket, remember

log = logging.getLogger("udptun")

# The defaults are those of flanneld without flags.
ETCD = EtcdConfig()
STOCK = NodeConfig(ETCD)
KUBE = KubeConfig(node_name="any")

SECRETS = ("UDPTUN_NODE_ETCD_PASSWORD", "FLANNELD_ETCD_PASSWORD")

# Flags of newer versions of flanneld that have no effect here, each with the reason.
WITHOUT_EFFECT = {
    "ip_blackhole_route": "no route is created for our own subnet",
    "ip_masq_fully_random_disable": "masquerading always picks source ports at random",
    "vmodule": "-v applies to all modules",
    "log_backtrace_at": "-v=2 shows where errors come from",
}


def flag(*names: str, cls: type[click.Option] = click.Option, **settings: Any) -> Callable[
    [Callable[..., Any]], Callable[..., Any]
]:
    """Make an option with two environment variables. Ours takes precedence over flannel's."""
    longest = max((name for name in names if name.startswith("-")), key=len)
    variable = longest.lstrip("-").replace("-", "_").upper()
    settings.setdefault("envvar", [f"UDPTUN_NODE_{variable}", f"FLANNELD_{variable}"])
    return click.option(*names, cls=cls, **settings)


def boolean(name: str, default: bool, text: str, **settings: Any) -> Callable[
    [Callable[..., Any]], Callable[..., Any]
]:
    return flag(name, type=Bool(), default=str(default).lower(), show_default=True,
                metavar="[=true|false]", help=text, **settings)


def _empty_is_none(parse: Callable[[str], object]) -> Callable[[str], object]:
    return lambda text: parse(text) if text else None


def _file(text: str) -> Path:
    if not text:
        raise FieldError("", text, "the path of a file or directory")
    return Path(text)


def _address(version: int | None = None) -> Callable[[str], IPAddress]:
    def parse(text: str) -> IPAddress:
        address = parse_address("", text)
        if version not in (None, address.version):
            raise FieldError("", text, f"an IPv{version} address")
        return address

    return parse


def _source_port(text: str) -> tuple[int, int] | tuple[()] | None:
    """Return the value of NodeConfig.source_port."""
    return (() if text == "own" else parse_source_port(text)) if text else None


def _metrics(text: str) -> Endpoint:
    return parse_listen("", text)


def _mark(text: str) -> Mark | None:
    return None if text == "off" else Mark.parse(text)


PATH = Parsed("file", _file)
OPTIONAL_PATH = Parsed("file", _empty_is_none(Path))
ADDRESS = Parsed("address", _empty_is_none(_address()))
IPV4 = Parsed("address", _empty_is_none(_address(4)))
IPV6 = Parsed("address", _empty_is_none(_address(6)))


def _state_directory() -> Path | None:
    """Return the state directory that the service manager has set (STATE_DIRECTORY), or None."""
    first = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return Path(first) if first else None


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"udptun {__version__}")
        ctx.exit()


@click.command(cls=GoCommand, context_settings={"help_option_names": ["-h", "--help"]})
@flag("--hosts", type=OPTIONAL_PATH, metavar="FILE",
      help="Use this list of nodes (TOML or JSON) as the source of leases, instead of etcd.")
@flag("--node-name", default="", metavar="NAME",
      help="This node's name.  [default: found by hostname or address; in Kubernetes: NODE_NAME]")
@flag("--etcd-endpoints", default=",".join(ETCD.endpoints), show_default=True,
      metavar="URL,...", help="Members of the etcd cluster.")
@flag("--etcd-prefix", default=ETCD.prefix, show_default=True, metavar="KEY",
      help="Prefix of flannel's keys.")
@flag("--etcd-keyfile", default="", metavar="FILE", help="Key of the client certificate.")
@flag("--etcd-certfile", default="", metavar="FILE", help="Client certificate.")
@flag("--etcd-cafile", default="", metavar="FILE", help="CA that signs etcd's certificates.")
@flag("--etcd-username", default="", metavar="NAME", help="User of etcd.")
@flag("--etcd-password", default="", metavar="TEXT",
      help="Password of the user. Use --etcd-password-file or UDPTUN_NODE_ETCD_PASSWORD instead, "
           "because every user of this host can read a command line.")
@flag("--etcd-password-file", type=OPTIONAL_PATH, metavar="FILE",
      help="File with the password of the user.")
@flag("--subnet-lease-renew-margin", type=Int(), default=int(ETCD.renew_margin_minutes),
      show_default=True, metavar="MINUTES",
      help="Minutes before the lease in etcd expires at which it is renewed, 1 to 1439.")
@boolean("--kube-subnet-mgr", False, "Use Kubernetes as the source of leases, instead of etcd.")
@flag("--kube-api-url", default="", metavar="URL",
      help="URL of the API server; not needed in a pod.")
@flag("--kubeconfig-file", type=OPTIONAL_PATH, metavar="FILE",
      help="Kubeconfig for the API server; not needed in a pod.")
@flag("--kube-annotation-prefix", default=KUBE.annotation_prefix,
      show_default=True, metavar="PREFIX", help="Prefix of the annotations on nodes.")
@flag("--net-config-path", type=PATH, default=KUBE.net_config_path,
      show_default=True, metavar="FILE", help="Configuration of the network, with Kubernetes.")
@boolean("--set-node-network-unavailable", True,
         "Set the node's condition NetworkUnavailable to False once the node is ready.")
@flag("--iface", cls=Collected, metavar="NAME|ADDRESS",
      help="Interface to the other nodes. May be repeated: the first that exists is used.")
@flag("--iface-regex", cls=Collected, metavar="REGEX",
      help="Regular expression for the name or address of the interface, tried after --iface. "
           "May be repeated.")
@flag("--iface-can-reach", type=ADDRESS, metavar="ADDRESS",
      help="Use the interface of the route to this address.")
@flag("--public-ip", type=IPV4, metavar="ADDRESS",
      help="Address at which other nodes reach this node.  [default: the interface's]")
@flag("--public-ipv6", type=IPV6, metavar="ADDRESS", help="The same for IPv6.")
@flag("--address-grace", type=Duration(), default=f"{STOCK.address_grace:g}s",
      show_default=True, metavar="DURATION",
      help="If this host loses the published address: time to wait before another address is "
           "published; for example 10s, 500ms or 1m30s.")
@flag("--backend", type=click.Choice(MODES),
      help=f"{AUTO}: for each peer the best backend that both nodes support.  [default: "
           "Backend.Type of the network's configuration]")
@flag("--advertise", type=click.Choice(["on", "off"]), default="on", show_default=True,
      help="Publish in our lease what this node supports in addition to flannel.")
@flag("--subnet-file", type=PATH, default=STOCK.subnet_file, show_default=True,
      metavar="FILE", help="File with subnet and MTU, for the CNI plugin.")
@boolean("--ip-masq", False, "Masquerade packets that leave the overlay.")
@boolean("--iptables-forward-rules", True, "Accept forwarded packets from and to the overlay.")
@flag("--firewall", type=click.Choice(FIREWALLS),
      help="auto: nftables rules, and accept rules in iptables if its rules drop our packets; "
           "nftables: only nftables; iptables: only iptables.  [default: nftables if the "
           "network's configuration has EnableNFTables, else auto]")
@boolean("--keep-flannel", False,
         "Do not remove the VXLAN device and the firewall rules that a former flannel has left. "
         "With --cleanup: do not remove the VXLAN device and the subnet file, because a flanneld "
         "that runs now uses them.")
@flag("--iptables-resync", type=Int(1), default=STOCK.iptables_resync,
      show_default=True, metavar="SECONDS",
      help="Time between checks of the firewall rules; missing ones are added again.")
@flag("--source-port", type=Parsed("own|any|p|p-q", _source_port), metavar="own|any|P|P-Q",
      help="Source ports that other nodes accept from this node, in addition to its UDP port.  "
           "[default: any if --public-ip is an address of a NAT, else own]")
@flag("--admit", type=click.Choice(ADMITS), default=STOCK.admit, show_default=True,
      help="Which packets from other nodes to accept. any: packets to every destination; own: only "
           "packets to this node's subnets.")
@flag("--mark", type=Parsed("value/mask", _mark), default=str(STOCK.mark), show_default=True,
      metavar="VALUE/MASK|off",
      help="Mark of the forwarder's datagrams. Firewall rules drop datagrams without this mark to "
           "the forwarders of other nodes.")
@flag("--dscp", type=Parsed("inherit|n", lambda text: parse_dscp(text, "")),
      default=dscp_text(STOCK.dscp), show_default=True,
      help="DSCP of the forwarder's datagrams: a number from 0 to 63, or inherit: that of the "
           "packet.")
@flag("--accelerate", type=click.Choice(ACCELERATES), default=STOCK.accelerate, show_default=True,
      help="auto: let the kernel carry packets to and from the nodes that have this option too, if "
           "it can; off: the forwarder carries all packets.")
@flag("--tun", type=Parsed("name", tun_name), default=STOCK.tun, show_default=True,
      help="Name of the forwarder's TUN device.")
@flag("--control", type=OPTIONAL_PATH, metavar="PATH",
      help="The forwarder's control socket.  [default: that of udptun --socket]")
@flag("--forwarder", type=click.Choice(FORWARDERS), default=STOCK.forwarder,
      show_default=True,
      help="spawn: start a forwarder if none answers; external: another program starts it.")
@flag("--forwarder-standby", type=Bool(), metavar="[=true|false]",
      help="Keep a loaded process, which forwards at once if the forwarder dies. It needs 20 MiB. "
           "With --forwarder external, it forwards until another forwarder takes over.  "
           "[default: true with --forwarder spawn, else false]")
@flag("--forward-file", type=OPTIONAL_PATH, metavar="FILE",
      help="File for the forwarder's options, for its --wait-for.  [default: forward.json in the "
           "directory of the control socket]")
@flag("--state-dir", type=PATH, default=_state_directory, metavar="DIR",
      help="Directory for state that restarts need.  [default: $STATE_DIRECTORY or "
           f"{STOCK.state_dir}]")
@flag("--instance", type=Parsed("name", Instance), default=DEFAULT_INSTANCE, show_default=True,
      envvar=["UDPTUN_NODE_INSTANCE", "UDPTUN_INSTANCE"], metavar="NAME", callback=remember,
      help="Names the devices, files, sockets and nftables tables of this node, so that several "
           "overlays can run on one host. Other defaults shown here are those of the instance "
           f"{DEFAULT_INSTANCE}.")
@flag("--healthz-ip", type=ADDRESS, default=STOCK.healthz_ip, show_default=True, metavar="ADDRESS",
      help="Address to serve /healthz, /livez, /readyz and /metrics on.")
@flag("--healthz-port", type=Int(0), default=STOCK.healthz_port, show_default=True,
      metavar="PORT",
      help="Port to serve them on; 0: off.")
@flag("--metrics", type=Parsed("[address:]port", _empty_is_none(_metrics)),
      metavar="[ADDRESS:]PORT",
      help="Serve the metrics of the daemon and of its forwarder over HTTP at this address and TCP "
           "port, for Prometheus. Without ADDRESS: only for this host.  [default: off]")
@flag("--metrics-peers", type=Int(0), default=STOCK.metrics_peers, show_default=True, metavar="N",
      help="Give up to N peers metrics of their own, and sum up the others.")
@boolean("--take-over", False,
         "Let the running daemon of this instance hand over the node, and continue its work. If "
         "there is none, start as usual.")
@boolean("--cleanup", False,
         "Stop the forwarder, remove everything that the daemon created, and exit.",
         envvar=None, allow_from_autoenv=False)
@flag("-v", "--v", "verbose", cls=Level, type=Int(0), default=0, metavar="N",
      help="Log more; -v=2 adds tracebacks.")
@flag("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True,
      help="Format of the log, on stderr.")
@boolean("--ip-blackhole-route", False, "", hidden=True)
@boolean("--ip-masq-fully-random-disable", False, "", hidden=True)
@flag("--vmodule", default="", hidden=True)
@flag("--log_backtrace_at", default="", hidden=True)
@boolean("--version", False, "Show the version and exit.", envvar=None, allow_from_autoenv=False,
         is_eager=True, expose_value=False, callback=_print_version)
@click.pass_context
def node(ctx: click.Context, /, verbose: int, log_format: str, **values: Any) -> None:
    """Make this machine a node of an overlay network, and keep it one.

    Accepts flanneld's flags in Go's spelling (-x, --x, --x=value) and its environment variables.
    For --iface these are UDPTUN_NODE_IFACE, else FLANNELD_IFACE. The command line takes precedence.

    SIGTERM or Ctrl-C ends the daemon only: the forwarder and everything else stays. A second one
    ends it at once. SIGHUP reads the list of nodes again and checks the whole host.
    """
    logs.start(verbose, log_format)
    try:
        config = _config(ctx, values, log_format)
    except FieldError as exc:
        dashes = "--" if exc.field.replace("-", "_") in values else ""
        raise Misuse(f"{dashes}{exc}", ctx) from exc
    for variable in SECRETS:  # the programs that we start inherit the environment
        os.environ.pop(variable, None)
    for name, why in WITHOUT_EFFECT.items():
        if values[name]:
            log.warning("--%s has no effect: %s", name.replace("_", "-"), why)
    try:
        _run(config)
    except (UdptunError, OSError, ImportError) as exc:
        if verbose >= 2:
            log.error("stopped by an error", exc_info=exc)
        if isinstance(exc, ImportError):
            raise Failure(str(exc)) from exc
        raise failure_of(exc) from exc


def _config(ctx: click.Context, values: dict[str, Any], log_format: str) -> NodeConfig:
    unchanged = ("instance", "address_grace", "backend", "ip_masq", "iptables_forward_rules",
                 "firewall", "keep_flannel", "iptables_resync", "source_port", "admit", "mark",
                 "dscp", "accelerate",
                 "forwarder", "forwarder_standby", "forward_file", "state_dir", "healthz_port",
                 "metrics", "metrics_peers", "take_over", "cleanup")
    given: dict[str, Any] = {  # NodeConfig takes all other names from the instance
        name: values[name] for name in ("tun", "subnet_file")
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if control := values["control"] or named_socket(ctx):
        given["control"] = control
    return NodeConfig(
        source=_source(ctx, values),
        interface=InterfaceOptions(
            # Ignore empty values: a template may write them.
            names=tuple(filter(None, values["iface"])),
            regexes=tuple(filter(None, values["iface_regex"])),
            can_reach=values["iface_can_reach"],
            public_ip=values["public_ip"],
            public_ipv6=values["public_ipv6"],
        ),
        advertise=values["advertise"] == "on",
        healthz_ip=values["healthz_ip"] or STOCK.healthz_ip,
        log_format=log_format,
        **{name: values[name] for name in unchanged},
        **given,
    )


def _source(ctx: click.Context, values: dict[str, Any]) -> SourceConfig:
    if values["hosts"] is not None:
        _refuse_another_store(ctx, values)
        return FileConfig(values["hosts"], values["node_name"])
    return _kube(values) if values["kube_subnet_mgr"] else _etcd(ctx, values)


def _refuse_another_store(ctx: click.Context, values: dict[str, Any]) -> None:
    """Refuse flags of another source together with --hosts. With --kube-subnet-mgr the flags of
    etcd are ignored, as in flanneld."""
    sources = {name: ctx.get_parameter_source(name) for name in values
               if name.startswith("etcd_") or (name == "kube_subnet_mgr" and values[name])}
    for name, source in sources.items():
        if source is ParameterSource.DEFAULT:
            continue
        given = f"--{name.replace('_', '-')}"
        if source is ParameterSource.ENVIRONMENT:
            given += f" (from UDPTUN_NODE_{name.upper()} or FLANNELD_{name.upper()})"
        raise Misuse(
            f"--hosts and {given} select two different stores of leases: give only one.", ctx)


def _password(ctx: click.Context, values: dict[str, Any]) -> str:
    """Return the password of the etcd user."""
    password: str = values["etcd_password"]
    if password and ctx.get_parameter_source("etcd_password") is ParameterSource.COMMANDLINE:
        log.warning("every user of this host can read the password in the command line: use"
                    " --etcd-password-file")
    file: Path | None = values["etcd_password_file"]
    if file is None:
        return password
    if password:
        raise FieldError("etcd-password-file", str(file), "a file, or --etcd-password, not both")
    try:
        if file.stat().st_mode & 0o007:
            log.warning("every user of this host can use %s, which has the password of etcd: chmod"
                        " o= %s", file, file)
        return file.read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise FieldError("etcd-password-file", str(file), f"a readable text file ({exc})") from None


def _etcd(ctx: click.Context, values: dict[str, Any]) -> EtcdConfig:
    return EtcdConfig(
        endpoints=tuple(filter(None, map(str.strip, values["etcd_endpoints"].split(",")))),
        prefix=values["etcd_prefix"],
        keyfile=values["etcd_keyfile"],
        certfile=values["etcd_certfile"],
        cafile=values["etcd_cafile"],
        username=values["etcd_username"],
        password=_password(ctx, values),
        renew_margin_minutes=values["subnet_lease_renew_margin"],
    )


def _kube(values: dict[str, Any]) -> KubeConfig:
    return KubeConfig(
        node_name=values["node_name"] or os.environ.get("NODE_NAME", ""),
        pod_name=os.environ.get("POD_NAME", ""),
        pod_namespace=os.environ.get("POD_NAMESPACE", ""),
        api_url=values["kube_api_url"],
        kubeconfig_file=values["kubeconfig_file"],
        annotation_prefix=values["kube_annotation_prefix"] or KUBE.annotation_prefix,
        net_config_path=values["net_config_path"],
        set_node_network_unavailable=values["set_node_network_unavailable"],
    )


def _run(config: NodeConfig) -> None:
    import asyncio

    from ..node.daemon import run
    from ..node.needs import needs_of
    from ..privileges import keep_only, lift_memory_limit

    lift_memory_limit()  # for the forwarder, while this process has all its capabilities
    keep_only(needs_of(config))  # before another thread exists
    asyncio.run(run(config))
