"""The whole cluster: a control plane and three nodes on one Ethernet segment.

Owns the bring-up, udptun's installation, and questions about pods. Does not depend on what the
steps do with it. Main thread only, like the lab.
"""

import json
import os
import re
import shutil
import signal
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from udptun.lab import Lab, LabError, Process, wait_for

from .others import Others
from .plane import POD_V4, POD_V6, Plane
from .programs import CACHE, Tell, Waiting, busybox_image, helm, programs
from .second import PODS as SECOND_PODS
from .second import Second
from .worker import Worker

MANIFESTS = Path(__file__).parents[2] / "deploy/kubernetes"
CHART = MANIFESTS.parent / "helm/udptun"
NAMESPACE = "kube-udptun"
CLEANUP = "kube-udptun-cleanup"
SLOW_SECONDS = 240.0  # for what takes seconds on an idle machine
_SLEEP = ("/bin/sleep", "2147483647")  # 2^31 - 1 s: the longest time that busybox accepts


@dataclass(frozen=True)
class Pod:
    """One running pod. ``v4`` and ``v6`` are its addresses."""

    name: str
    node: str
    v4: str
    v6: str


class Cluster:
    def __init__(self, lab: Lab, image: Path, tell: Tell) -> None:
        self.lab, self.tell, self.image_name = lab, tell, image_name(image)
        binaries = programs(CACHE, tell)
        images = [busybox_image(CACHE, name, _SLEEP) for name in ("pause", "box")]
        hosts = [lab.host(name) for name in ("plane", "node1", "node2", "node3")]
        other = lab.host("plane2")
        self.segment = lab.segment(*hosts, other)
        for host in hosts:
            host.forwarding()
        self.plane = Plane(hosts[0], binaries)
        for host in hosts[1:]:
            # A packet to a service address needs a route before kube-proxy rewrites its address.
            host.ip(f"route add default via {hosts[0].v4}", f"route add default via {hosts[0].v6}")
        self.workers = [Worker(host, self.plane, [*images, image], python=host is not hosts[-1])
                        for host in hosts[1:]]
        self.others = Others(self.workers)
        self.second = Second(Plane(other, binaries, SECOND_PODS), self.workers, self.image_name)

    def start(self) -> None:
        with Waiting("starting etcd and the API server", self.tell):
            self.plane.start()
        for worker in self.workers:
            with Waiting(f"starting {worker.name}", self.tell):
                worker.start()
        wait_for(lambda: len(self.plane.get("nodes")["items"]) == len(self.workers),
                 "all nodes to register", SLOW_SECONDS)

    # ---- udptun --------------------------------------------------------------------------------

    def install(self) -> None:
        """Apply deploy/kubernetes with the image's name, and wait until udptun runs."""
        self.plane.kubectl("apply", "-k", str(self.manifests()))
        self.wait_installed()

    def manifests(self) -> Path:
        """Return a copy of deploy/kubernetes that names the image which the nodes have loaded."""
        folder = self.lab.folder / "manifests"
        if not folder.exists():
            shutil.copytree(MANIFESTS, folder)
            for kustomization in folder.rglob("kustomization.yaml"):
                if "newTag" not in kustomization.read_text():
                    continue  # a component, which has no image
                _replace(kustomization, "newTag: .*",
                         f"newTag: {self.image_name.rpartition(':')[2]}")
            _replace(folder / "config.yaml", '"Network": .*',
                     f'"Network": "{POD_V4}", "EnableIPv6": true, "IPv6Network": "{POD_V6}",')
        return folder

    def clean_up(self) -> None:
        """Remove udptun from all nodes, with deploy/kubernetes/cleanup, as the README says."""
        folder = str(self.manifests() / "cleanup")
        self.plane.kubectl("apply", "-k", folder)
        self.plane.kubectl("-n", CLEANUP, "rollout", "status", "daemonset/udptun-cleanup",
                           f"--timeout={SLOW_SECONDS:g}s", seconds=SLOW_SECONDS + 10)
        self.plane.kubectl("delete", "-k", folder, seconds=120)

    def wait_installed(self) -> None:
        self.wait(self.installed, "udptun to be ready on all nodes")
        self.wait(self.nodes_ready, "all nodes to be ready")

    def helm(self, *argv: str) -> None:
        """Run Helm as administrator."""
        kubeconfig = self.plane.kubeconfig("admin", "system:masters")
        folder = self.lab.folder / "helm"
        self.plane.host.run([str(helm(CACHE, self.tell)), *argv], seconds=120, env={
            "KUBECONFIG": str(kubeconfig), "HELM_CACHE_HOME": str(folder),
            "HELM_CONFIG_HOME": str(folder), "HELM_DATA_HOME": str(folder)})

    def installed(self) -> bool:
        return self.complete("udptun", NAMESPACE)

    def complete(self, name: str, namespace: str) -> bool:
        """Return whether a DaemonSet has a ready pod of its present version on each node."""
        status = self.plane.get("daemonset", name, "-n", namespace)["status"]
        wanted = len(self.workers)
        return bool(status["desiredNumberScheduled"] == wanted == status.get("numberReady")
                    == status.get("updatedNumberScheduled"))

    def nodes_ready(self) -> bool:
        found = [self.conditions(worker.name) for worker in self.workers]
        return all(conditions.get("Ready") == "True"
                   and conditions.get("NetworkUnavailable", "False") == "False"
                   for conditions in found)

    def conditions(self, node: str) -> dict[str, str]:
        """Return the status of each condition of a node."""
        found = self.plane.get("node", node)["status"].get("conditions", [])
        return {condition["type"]: condition["status"] for condition in found}

    def evidence(self) -> str:
        """Return what helps to find out why a step failed."""
        parts = []
        for argv in (["get", "nodes,pods", "-A", "-o", "wide"],
                     ["logs", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=udptun",
                      "--all-containers", "--prefix", "--tail=40"],
                     ["get", "events", "-A", "--field-selector=type=Warning"]):
            try:
                parts.append(self.plane.kubectl(*argv)[-12000:])
            except LabError as error:
                parts.append(str(error))
        return "\n".join(parts)

    # ---- pods ----------------------------------------------------------------------------------

    def run_everywhere(self, name: str, **spec: Any) -> None:
        """Start one pod on each node, as a DaemonSet with a label ``app: NAME``."""
        labels = {"app": name}
        container = {"name": name, "image": "localhost/box:1", "imagePullPolicy": "Never", **spec}
        self.plane.apply({
            "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": name},
            "spec": {"selector": {"matchLabels": labels}, "template": {
                "metadata": {"labels": labels},
                "spec": {"terminationGracePeriodSeconds": 0, "containers": [container],
                         "tolerations": [{"operator": "Exists"}]}}},
        })

    def pods(self, name: str) -> list[Pod]:
        """Wait until each node has a ready pod of ``run_everywhere``; return the pods."""
        return self.wait(lambda: self._pods(name), f"a pod {name} on each node")

    def _pods(self, name: str) -> list[Pod]:
        found = []
        for pod in self.plane.get("pods", "-l", f"app={name}")["items"]:
            status = pod["status"]
            ready = any(condition["type"] == "Ready" and condition["status"] == "True"
                        for condition in status.get("conditions", []))
            if ready and "deletionTimestamp" not in pod["metadata"]:
                addresses = {":" in entry["ip"]: entry["ip"] for entry in status["podIPs"]}
                found.append(Pod(pod["metadata"]["name"], pod["spec"]["nodeName"],
                                 addresses.get(False, ""), addresses.get(True, "")))
        return found if len({pod.node for pod in found}) == len(self.workers) else []

    def shell(self, pod: Pod, script: str, seconds: float = 120) -> str:
        return self.plane.kubectl("exec", pod.name, "--", "/bin/sh", "-c", script, seconds=seconds)

    def unreachable(self, pods: Sequence[Pod]) -> list[str]:
        """Ping from each pod to each pod in both families; return the pairs that failed."""
        failed = []
        for pod in pods:
            targets = [address for other in pods if other is not pod
                       for address in (other.v4, other.v6) if address]
            # One packet may be lost to ARP or while a pod starts.
            script = " ".join(f"ping -c2 -W2 {target} >/dev/null || echo {target};"
                              for target in targets)
            failed += [f"{pod.node} to {line}" for line in self.shell(pod, script).split()]
        return failed

    def all_reach(self, pods: Sequence[Pod]) -> None:
        """Raise LabError unless all pods reach each other soon."""
        wait_for(lambda: not self.unreachable(pods), "all pods to reach each other", 60)

    def steady_ping(self, pod: Pod, target: str, count: int) -> Process:
        """Start ``count`` pings, ten a second, from inside a pod; see ``lost``."""
        worker = self.worker(pod.node)
        return worker.start_in_pod(pod.name, ["busybox", "ping", "-q", "-i", "0.1", "-W", "1",
                                              "-c", str(count), target])

    def worker(self, name: str) -> Worker:
        return next(worker for worker in self.workers if worker.name == name)

    def wait(self, predicate: Callable[[], Any], what: str) -> Any:
        """As ``wait_for``, with a longer deadline. While the API server is away, it asks again."""

        def asked() -> Any:
            try:
                return predicate()
            except (LabError, json.JSONDecodeError, KeyError):
                return None

        return wait_for(asked, what, SLOW_SECONDS)


@dataclass(frozen=True)
class Loss:
    """What a ping has measured. ``longest``: the longest time without an answer, in seconds."""

    sent: int
    lost: int
    longest: float

    def __str__(self) -> str:
        gap = f", the longest outage was {self.longest:.1f} s" if self.lost else ""
        return f"{self.lost} of {self.sent} packets lost{gap}"


class Steady:
    """A ping from inside a pod, ten a second, until ``stop``."""

    def __init__(self, cluster: Cluster, pod: Pod, target: str) -> None:
        worker = cluster.worker(pod.node)
        self._ping = worker.start_in_pod(pod.name, ["busybox", "ping", "-i", "0.1", target])

    def stop(self) -> Loss:
        os.killpg(self._ping.pid, signal.SIGINT)  # ping then prints its statistics
        wait_for(lambda: "packets transmitted" in self._ping.text(), "the statistics of a ping")
        text = self._ping.text()
        sent = int(re.findall(r"(\d+) packets transmitted", text)[0])
        # The last packet may have been sent just before the end.
        seen = sorted({int(number) for number in re.findall(r"seq=(\d+)", text)} | {-1, sent - 1})
        gaps = [after - before - 1 for before, after in pairwise(seen)]
        return Loss(sent, sum(gaps), max(gaps) / 10)


def _replace(path: Path, pattern: str, text: str) -> None:
    """Replace the one occurrence of ``pattern`` in a file."""
    content, count = re.subn(pattern, text, path.read_text())
    if count != 1:
        raise LabError(f"{path.name}: expected {pattern!r} once, found it {count} times")
    path.write_text(content)


def image_name(archive: Path) -> str:
    """Return the name of the image in an OCI archive, with its tag."""
    with tarfile.open(archive) as tar:
        index = tar.extractfile("index.json")
        assert index is not None
        annotations = json.load(index)["manifests"][0]["annotations"]
    return str(annotations["org.opencontainers.image.ref.name"])


def lost(ping: Process) -> tuple[int, int]:
    """Wait for a ping of ``Cluster.steady_ping``. Return how many it sent, and how many it lost."""
    ping.wait(120)
    words = next(line for line in ping.text().splitlines() if "packets transmitted" in line).split()
    sent, received = int(words[0]), int(words[3])
    return sent, sent - received
