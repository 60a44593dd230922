"""deploy/kubernetes: the manifests' commands, permissions and mounts are right and consistent."""

import json
import shutil
import subprocess

import click
import pytest
import yaml

from tests.leases.kube_cluster import DEPLOY, deployed_rules
from udptun.cli import cli
from udptun.cni.install import checked_conflist
from udptun.leases.file.config import FileConfig
from udptun.leases.kube.config import SERVICE_ACCOUNT
from udptun.leases.netconf import NetConfig
from udptun.node.config import NodeConfig


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def pod():
    (daemon_set,) = documents("daemonset.yaml")
    return daemon_set["spec"]["template"]["spec"]


def container(name):
    every = (*pod()["initContainers"], *pod()["containers"])
    return next(c for c in every if c["name"] == name)


def test_the_permissions_are_those_of_flannel():
    found = {(r, verb) for rule in deployed_rules() for r in rule["resources"]
             for verb in rule["verbs"]}
    assert found == {
        ("pods", "get"), ("nodes", "get"), ("nodes", "list"), ("nodes", "watch"),
        ("nodes/status", "patch"),
    }


def test_the_pod_uses_the_service_account():
    account, role, binding = documents("rbac.yaml")
    (namespace,) = documents("namespace.yaml")
    assert pod()["serviceAccountName"] == account["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", **account["metadata"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    for name in ("rbac.yaml", "config.yaml", "daemonset.yaml"):
        for document in documents(name):
            if not document["kind"].startswith("Cluster"):
                assert document["metadata"]["namespace"] == namespace["metadata"]["name"]


@pytest.mark.parametrize(("name", "capabilities"), [
    ("node", ["NET_ADMIN", "NET_RAW"]), ("forwarder", ["NET_ADMIN"]),
    ("cni", ["DAC_OVERRIDE"]),
])
def test_no_container_is_privileged(name, capabilities):
    assert container(name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], "add": capabilities},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def test_only_the_daemon_gets_the_token_of_the_service_account():
    assert pod()["automountServiceAccountToken"] is False
    volumes = {v["name"]: v for v in pod()["volumes"]}
    files, found = set(), set()
    for source in volumes["api-access"]["projected"]["sources"]:
        ((_, fields),) = source.items()
        files |= {item["path"] for item in fields.get("items", [fields])}
    for part in (*pod()["initContainers"], *pod()["containers"]):
        found |= {(part["name"], m["mountPath"]) for m in part["volumeMounts"]
                  if m["name"] == "api-access"}
    assert found == {("node", str(SERVICE_ACCOUNT))}
    assert files == {"token", "ca.crt", "namespace"}


def test_mounts_and_shared_volumes():
    volumes = {v["name"]: v for v in pod()["volumes"]}
    mounts = {}
    for part in (*pod()["initContainers"], *pod()["containers"]):
        mounts[part["name"]] = {m["mountPath"]: m["name"] for m in part["volumeMounts"]}
        assert set(mounts[part["name"]].values()) <= set(volumes)
    for path in ("/run/udptun", "/var/lib/udptun"):
        assert mounts["node"][path] == mounts["forwarder"][path]
        assert volumes[mounts["node"][path]]["hostPath"]["path"] == path
    assert volumes[mounts["forwarder"]["/dev/net/tun"]]["hostPath"]["type"] == "CharDevice"
    assert mounts["node"]["/run/flannel"] == "run-flannel"


def test_the_daemons_command_line_is_valid(monkeypatch):
    name, *args = container("node")["args"]
    (variable,) = container("node")["env"]
    monkeypatch.setenv(variable["name"], "n1")
    with click.Context(cli, info_name="udptun") as parent:
        params = cli.get_command(parent, name).make_context(name, args, parent=parent).params
    assert (params["kube_subnet_mgr"], params["forwarder"]) == (True, "external")
    for probe in ("readinessProbe", "livenessProbe"):
        where = container("node")[probe]["httpGet"]
        there = str(params["healthz_ip"]), params["healthz_port"]
        assert (where["host"], where["port"]) == there


def test_the_forwarder_waits_for_the_file_that_the_daemon_writes():
    file = NodeConfig(FileConfig(DEPLOY)).forward_file
    assert container("forwarder")["args"] == [
        "forward", "--wait-for", str(file), "--take-over", "--linger"]


def test_a_new_pod_starts_next_to_the_old_one_and_takes_over():
    """Both are on the host's network, so with a port the new pod could not be scheduled."""
    (daemon_set,) = documents("daemonset.yaml")
    assert daemon_set["spec"]["updateStrategy"]["rollingUpdate"] == {
        "maxSurge": 1, "maxUnavailable": 0}
    assert "--take-over" in container("node")["args"]
    assert pod()["hostNetwork"]
    assert not any("ports" in part for part in (*pod()["initContainers"], *pod()["containers"]))


def test_the_cni_container_installs_the_configuration_that_it_mounts(tmp_path):
    """All images are ours, and the command works with the mounted files."""
    every = (*pod()["initContainers"], *pod()["containers"])
    assert {part["image"] for part in every} == {"udptun"}
    cni, name, *args = container("cni")["args"]
    mounts = {m["mountPath"]: m["name"] for m in container("cni")["volumeMounts"]}
    group = cli.get_command(click.Context(cli), cni)
    (config,) = documents("config.yaml")
    for file, text in config["data"].items():
        (tmp_path / file).write_text(text)
    conflist = args[args.index("--conflist") + 1]
    directory, _, file = conflist.rpartition("/")
    assert mounts[directory] == "config"
    args[args.index(conflist)] = str(tmp_path / file)
    params = group.get_command(click.Context(cli), name).make_context(name, args).params
    assert {str(params["bin_dir"]), str(params["conf_dir"])} <= set(mounts)
    assert checked_conflist(params["conflist"])


def test_the_configuration_is_valid():
    (config,) = documents("config.yaml")
    network = NetConfig.parse(config["data"]["net-conf.json"], check_subnets=False)
    assert network.network is not None
    cni = json.loads(config["data"]["cni-conf.json"])
    assert [p["type"] for p in cni["plugins"]] == ["udptun", "portmap"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
def test_kustomize_builds_the_manifests_and_sets_the_image():
    built = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY)], capture_output=True, text=True, check=True)
    kinds = {d["kind"] for d in yaml.safe_load_all(built.stdout)}
    assert kinds == {"Namespace", "ServiceAccount", "ClusterRole", "ClusterRoleBinding",
                     "ConfigMap", "DaemonSet"}
    assert "image: udptun\n" not in built.stdout
