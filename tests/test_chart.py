"""The manifests for Kubernetes: chart and kustomization make the same objects; startup probes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.scripts import script
from udptun._version import __version__
from udptun.control.listen import parse_listen
from udptun.model import Endpoint

ROOT = Path(__file__).resolve().parent.parent
KUSTOMIZATION = ROOT / "deploy" / "kubernetes"
CHART = ROOT / "deploy" / "helm" / "udptun"

rendered = pytest.mark.skipif(
    not shutil.which("helm") or not shutil.which("kubectl"),
    reason="helm or kubectl is missing",
)


def objects(command: list[str]) -> dict[tuple[str, str], Any]:
    """Return what a command prints, by kind and name; the JSON in a ConfigMap is parsed."""
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {}
    for one in filter(None, yaml.safe_load_all(text)):
        if one["kind"] == "ConfigMap":
            one["data"] = {name: json.loads(value) for name, value in one["data"].items()}
        found[one["kind"], one["metadata"]["name"]] = one
    return found


def chart(*options: str) -> dict[tuple[str, str], Any]:
    # A Helm that was built without its Makefile assumes a server of version 1.20.
    return objects(["helm", "template", "udptun", str(CHART), "--namespace", "kube-udptun",
                    "--kube-version=1.25.0", *options])


def test_the_templates_are_written_from_the_manifests() -> None:
    want = script("chart").templates()
    have = {path.name: path.read_text() for path in (CHART / "templates").iterdir()}
    assert have == want, "run: python scripts/chart.py"


def test_the_version_is_the_same_everywhere() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    images = [image for path in KUSTOMIZATION.rglob("kustomization.yaml")
              for image in yaml.safe_load(path.read_text()).get("images", ())]
    assert len(images) == 2  # udptun, and the clean-up
    versions = {about["version"], about["appVersion"], *(image["newTag"] for image in images)}
    assert versions == {__version__}


def test_the_default_network_is_the_same() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    config = yaml.safe_load((KUSTOMIZATION / "config.yaml").read_text())
    assert json.loads(config["data"]["net-conf.json"]) == values["netConf"]


@rendered
def test_both_make_the_same_objects() -> None:
    want = objects(["kubectl", "kustomize", str(KUSTOMIZATION)])
    del want["Namespace", "kube-udptun"]  # Helm creates it
    assert chart() == want


@rendered
def test_the_values_reach_the_objects() -> None:
    made = chart(
        "--set", "image.repository=registry.example/udptun,image.tag=1", "--set",
        "nodeOptions={--iface=eth1},nodeSelector.overlay=udptun,netConf.EnableIPv6=true",
    )
    pod = made["DaemonSet", "udptun"]["spec"]["template"]["spec"]
    containers = [*pod["initContainers"], *pod["containers"]]
    assert {one["image"] for one in containers} == {"registry.example/udptun:1"}
    assert containers[-1]["args"][-1] == "--iface=eth1"
    assert pod["nodeSelector"] == {"kubernetes.io/os": "linux", "overlay": "udptun"}
    assert made["ConfigMap", "udptun"]["data"]["net-conf.json"]["EnableIPv6"] is True


@rendered
def test_the_other_values_change_only_what_they_name(tmp_path: Path) -> None:
    variable = {"name": "KUBERNETES_SERVICE_HOST", "value": "192.0.2.1"}
    update = {"maxSurge": 0, "maxUnavailable": 1}
    limits = {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": "1Gi"}}
    values = tmp_path / "values.yaml"
    values.write_text(json.dumps({
        "cni": {"binDir": "/usr/lib/cni", "confDir": "/etc/cni/other.d"},
        "imagePullSecrets": [{"name": "key"}], "updateStrategy": {"rollingUpdate": update},
        "hostPID": True, "env": [variable], "podAnnotations": {"a/b": "c"},
        "resources": {"forwarder": limits, "node": {"requests": {"cpu": "1"}}}}))
    want = chart()
    daemonset = want["DaemonSet", "udptun"]["spec"]
    pod = daemonset["template"]["spec"]
    forwarder, node = pod["containers"]
    paths = {one["name"]: one["hostPath"] for one in pod["volumes"] if "hostPath" in one}
    paths["cni-bin"]["path"], paths["cni-conf"]["path"] = "/usr/lib/cni", "/etc/cni/other.d"
    daemonset["updateStrategy"]["rollingUpdate"] = update
    daemonset["template"]["metadata"]["annotations"] = {"a/b": "c"}
    pod |= {"imagePullSecrets": [{"name": "key"}], "hostPID": True}
    node["env"].insert(0, variable)
    forwarder["resources"] = limits
    node["resources"]["requests"]["cpu"] = "1"
    assert chart("--values", str(values)) == want


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is missing")
def test_a_component_changes_the_directories_of_the_plugins(tmp_path: Path) -> None:
    """On the nodes only: the containers have them at the same paths."""
    want = objects(["kubectl", "kustomize", str(KUSTOMIZATION)])
    for one in want["DaemonSet", "udptun"]["spec"]["template"]["spec"]["volumes"]:
        if one["name"] == "cni-bin":
            one["hostPath"]["path"] = "/usr/lib/cni"
    made = with_component(tmp_path, "cni-directories")
    for found in (made, want):  # the order of the volumes has no meaning
        found["DaemonSet", "udptun"]["spec"]["template"]["spec"]["volumes"].sort(
            key=lambda one: str(one["name"]))
    assert made == want
    copy = tmp_path / "kubernetes" / "cleanup"
    file = copy / "kustomization.yaml"
    file.write_text(file.read_text().replace("# components:\n#", "components:\n "))
    made = objects(["kubectl", "kustomize", str(copy)])
    pod = made["DaemonSet", "udptun-cleanup"]["spec"]["template"]["spec"]
    assert {"name": "cni-bin", "hostPath": {
        "path": "/usr/lib/cni", "type": "DirectoryOrCreate"}} in pod["volumes"]


class Container:
    """A process with mounts of its own, and the PIDs of the host: as in a pod with `hostPID`."""

    def __init__(self, code: str = "") -> None:
        self._process = subprocess.Popen(
            ["unshare", "--mount", sys.executable, "-c", f"{code}\nprint(flush=True)\ninput()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Container:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(b"\n")

    def starts(self, name: str) -> bool:
        """Run the startup probe of a container of the pod in this one."""
        manifest = yaml.safe_load((KUSTOMIZATION / "daemonset.yaml").read_text())
        probe = next(one["startupProbe"]
                     for one in manifest["spec"]["template"]["spec"]["containers"]
                     if one["name"] == name)
        return not subprocess.call(["nsenter", f"--mount=/proc/{self._process.pid}/ns/mnt", "--",
                                    *probe["exec"]["command"]])


root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a mount namespace")


@root
@pytest.mark.skipif(not os.access("/dev/net/tun", os.R_OK | os.W_OK), reason="no /dev/net/tun")
def test_the_forwarder_has_started_when_it_has_the_tun() -> None:
    """The pod that it replaces must not make the probe succeed, also with the host's PIDs."""
    with Container() as new, Container("tun = open('/dev/net/tun', 'rb+', buffering=0)") as old:
        assert old.starts("forwarder")
        assert not new.starts("forwarder")


@root
def test_the_daemon_has_started_when_it_has_its_lock() -> None:
    with Container() as new, Container("""
import subprocess
from udptun.instance import Instance
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
lock = Instance().lock("node")
lock.acquire()
""") as old:
        assert old.starts("node")
        assert not new.starts("node")


@rendered
def test_both_make_the_same_objects_for_metrics(tmp_path: Path) -> None:
    want = with_component(tmp_path, "monitoring")
    del want["Namespace", "kube-udptun"]
    assert chart("--set", "metrics.port=9586,metrics.podMonitor=true") == want


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is missing")
def test_metrics_are_served_only_with_the_component(tmp_path: Path) -> None:
    without = objects(["kubectl", "kustomize", str(KUSTOMIZATION)])
    made = with_component(tmp_path, "monitoring")
    assert made.keys() - without.keys() == {("PodMonitor", "udptun")}
    node, plain = (
        found["DaemonSet", "udptun"]["spec"]["template"]["spec"]["containers"][1]
        for found in (made, without))
    assert set(node["args"]) - set(plain["args"]) == {"--metrics=[$(POD_IP)]:9586"}
    assert "POD_IP" in {one["name"] for one in node["env"]}
    assert "ports" not in node  # with ports, a new pod could not start next to the old one
    assert parse_listen("", "[192.0.2.1]:9586") == Endpoint.parse("192.0.2.1:9586")


def containers(found: dict[tuple[str, str], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the containers of the forwarder and of the node daemon."""
    forwarder, node = found["DaemonSet", "udptun"]["spec"]["template"]["spec"]["containers"]
    return forwarder, node


@rendered
def test_both_make_the_same_objects_for_the_express_path(tmp_path: Path) -> None:
    want = with_component(tmp_path, "accelerate")
    del want["Namespace", "kube-udptun"]
    assert chart("--set", "accelerate=auto") == want
    assert chart("--set", "accelerate=off") == chart("--set", "accelerate=false") == chart()


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is missing")
def test_only_the_component_gives_the_capability_of_the_express_path(tmp_path: Path) -> None:
    plain = containers(objects(["kubectl", "kustomize", str(KUSTOMIZATION)]))
    made = containers(with_component(tmp_path, "accelerate"))
    added = [{name: one["securityContext"]["capabilities"]["add"] for name, one in
              zip(("forwarder", "node"), pod, strict=True)} for pod in (plain, made)]
    assert added == [{"forwarder": ["NET_ADMIN"], "node": ["NET_ADMIN", "NET_RAW"]},
                     {"forwarder": ["NET_ADMIN", "BPF"], "node": ["NET_ADMIN", "NET_RAW"]}]
    assert made[1]["args"] == [*plain[1]["args"], "--accelerate=auto"]
    assert made[0]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is missing")
def test_all_components_work_together(tmp_path: Path) -> None:
    forwarder, node = containers(with_component(tmp_path, "monitoring", "accelerate"))
    assert "BPF" in forwarder["securityContext"]["capabilities"]["add"]
    assert {"--accelerate=auto", "--metrics=[$(POD_IP)]:9586"} <= set(node["args"])


def with_component(folder: Path, *names: str) -> dict[tuple[str, str], Any]:
    """Return the objects of a kustomization in which the components are turned on."""
    copy = folder / "kubernetes"
    shutil.copytree(KUSTOMIZATION, copy)
    file = copy / "kustomization.yaml"
    text = file.read_text()
    for line in ("components:", *(f"  - {name}" for name in names)):
        assert f"# {line}\n" in text
        text = text.replace(f"# {line}\n", f"{line}\n")
    file.write_text(text)
    return objects(["kubectl", "kustomize", str(copy)])
