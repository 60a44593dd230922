"""The second steps: from kube-flannel to udptun and back, node by node, while pods run.

flannel is installed from its own manifests, udptun from the Helm chart. The commands are those of
the section "Move from kube-flannel" in docs/flannel.md. Runs after the cluster of ``steps.py`` was
removed. The container runtime has other directories than there, those of Debian.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import yaml

from . import programs, steps  # noqa: F401 - the steps of ``steps`` come first in the table
from .cluster import CHART, NAMESPACE, Cluster, Steady
from .plane import POD_V4, POD_V6
from .step import check, left_over, pods_of, reach_again, start_pods, step
from .worker import OTHER_PLUGIN_DIR, PLUGIN_DIR, Worker

_FLANNEL = "kube-flannel"
_DAEMONSET = "kube-flannel-ds"
_LABEL = "pod-network"  # of a node: "flannel" or "udptun"
_NET_CONF = {"Network": POD_V4, "EnableIPv6": True, "IPv6Network": POD_V6, "EnableNFTables": True,
             "Backend": {"Type": "vxlan"}}


def _manifests(text: str) -> list[Any]:
    """Return flannel's manifests with our image of flannel, and with the cluster's network."""
    found = [one for one in yaml.safe_load_all(text) if one]
    for one in found:
        if one["kind"] == "ConfigMap":
            # nftables, because the machine may lack the kernel module br_netfilter
            one["data"]["net-conf.json"] = json.dumps(_NET_CONF)
            config = one["data"]["cni-conf.json"]
            one["data"]["cni-conf.json"] = config.replace('"1.0.0"', '"0.3.1"')
        if one["kind"] == "DaemonSet":
            pod = one["spec"]["template"]["spec"]
            for volume in pod["volumes"]:
                if volume.get("hostPath", {}).get("path") == PLUGIN_DIR:
                    volume["hostPath"]["path"] = OTHER_PLUGIN_DIR
            for container in pod["initContainers"] + pod["containers"]:
                container.update(image="localhost/flannel:1", imagePullPolicy="Never")
    return found


@step(needs="")
def flannel(cluster: Cluster) -> str:
    """kube-flannel from its own manifests: pods on all nodes reach each other"""
    folder = programs.flannel(programs.CACHE, cluster.tell)
    image = programs.flannel_image(programs.CACHE, folder)
    for worker in cluster.workers:
        worker.load(image)
        worker.use_other_plugin_dir()
    began = time.monotonic()
    cluster.plane.apply(*_manifests((folder / "kube-flannel.yml").read_text()))
    cluster.wait(lambda: cluster.complete(_DAEMONSET, _FLANNEL), "flannel on all nodes")
    cluster.wait(cluster.nodes_ready, "all nodes to be ready")
    start_pods(cluster)
    cluster.all_reach(pods_of(cluster))
    return f"flannel {programs.FLANNEL} after {time.monotonic() - began:.0f} s"


@step(needs="flannel")
def from_flannel(cluster: Cluster) -> str:
    """each node changes from flannel to udptun of the Helm chart; its pods stay"""
    plane = cluster.plane
    plane.kubectl("label", "nodes", "--all", f"{_LABEL}=flannel")
    plane.kubectl("-n", _FLANNEL, "patch", "daemonset", _DAEMONSET, "--type=merge", "-p",
                  json.dumps({"spec": {"template": {"spec": {
                      "nodeSelector": {_LABEL: "flannel"}}}}}))
    plane.kubectl("-n", _FLANNEL, "rollout", "status", f"daemonset/{_DAEMONSET}",
                  "--timeout=240s", seconds=250)
    cluster.helm("install", "udptun", str(CHART), "--namespace", NAMESPACE, "--create-namespace",
                 "--set", f"image.tag={cluster.image_name.rpartition(':')[2]}",
                 "--set", f"nodeSelector.{_LABEL}=udptun",
                 "--set", f"cni.binDir={OTHER_PLUGIN_DIR}", "--set-json",
                 f"netConf={json.dumps(_NET_CONF)}")
    plane.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=privileged")

    def moved(worker: Worker) -> None:
        plane.kubectl("label", "node", worker.name, f"{_LABEL}=udptun", "--overwrite")
        cluster.wait(lambda: _runs_on(cluster, NAMESPACE, worker), f"udptun on {worker.name}")
        plane.kubectl("-n", NAMESPACE, "get", "pods", "-o", "wide")

    outage = _node_by_node(cluster, moved)
    _new_pods(cluster)
    return outage


@step(needs="from-flannel")
def to_flannel(cluster: Cluster) -> str:
    """each node changes back from udptun to flannel; its pods stay"""
    def moved(worker: Worker) -> None:
        cluster.plane.kubectl("label", "node", worker.name, f"{_LABEL}=flannel", "--overwrite")
        cluster.wait(lambda: _runs_on(cluster, _FLANNEL, worker), f"flannel on {worker.name}")
        cluster.wait(lambda: not _pods_on(cluster, NAMESPACE, worker), "the end of udptun's pod")
        worker.run_image(cluster.image_name, [
            "udptun", "node", "--kube-subnet-mgr", f"--node-name={worker.name}", "--cleanup",
            "--keep-flannel"])
        worker.run_image(cluster.image_name, ["udptun", "cni", "uninstall"], OTHER_PLUGIN_DIR)

    outage = _node_by_node(cluster, moved)
    cluster.helm("uninstall", "udptun", "--namespace", NAMESPACE)
    cluster.plane.kubectl("delete", "namespace", NAMESPACE, seconds=120)
    left = left_over(cluster.workers, "udptun")
    check(not left, "left over: " + "; ".join(left))
    _new_pods(cluster)
    return outage


def _new_pods(cluster: Cluster) -> None:
    """Replace all pods: one CNI plugin removes what the other one has attached."""
    cluster.plane.kubectl("delete", "pods", "-l", "app=web", "--wait=false")
    reach_again(cluster)


def _pods_on(cluster: Cluster, namespace: str, worker: Worker) -> list[Any]:
    return list(cluster.plane.get("pods", "-n", namespace,
                                  f"--field-selector=spec.nodeName={worker.name}")["items"])


def _runs_on(cluster: Cluster, namespace: str, worker: Worker) -> bool:
    """Return whether the node has one pod of this namespace, and it is ready."""
    found = _pods_on(cluster, namespace, worker)
    return len(found) == 1 and any(
        one["type"] == "Ready" and one["status"] == "True"
        for one in found[0]["status"].get("conditions", []))


def _node_by_node(cluster: Cluster, move: Callable[[Worker], None]) -> str:
    """Move each node while pods of all nodes ping each other. The pods stay. Return the outage."""
    a, b, c = before = pods_of(cluster)
    pings = {f"{one.node} to {other.node}, IPv{version}": Steady(cluster, one, address)
             for one, other in ((a, b), (b, c), (c, a))
             for version, address in ((4, other.v4), (6, other.v6)) if address}
    for worker in cluster.workers:
        move(worker)
    cluster.all_reach(pods_of(cluster))
    results = {name: ping.stop() for name, ping in pings.items()}
    now = pods_of(cluster)
    check(now == before, f"the pods are not the same: {before}, then {now}")
    worst = max(results, key=lambda name: results[name].longest)
    sent = sum(one.sent for one in results.values())
    missing = sum(one.lost for one in results.values())
    return (f"{missing} of {sent} packets lost; longest outage {results[worst].longest:.1f} s"
            f" ({worst})")
