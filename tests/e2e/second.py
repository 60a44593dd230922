"""A second cluster on the same hosts: another instance of udptun with another API server.

Owns the second control plane, and for each of two nodes a Node object, the daemon of the instance
``blue`` in a container, and one pod. The pod is a network namespace that udptun's CNI plugin
attaches. No second kubelet runs, because two kubelets cannot share a host. Main thread only.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from udptun.lab import LabError, Process, wait_for

from .plane import Plane
from .worker import Worker

PODS = "10.245.0.0/16,fd00:10:245::/56"
INSTANCE = "blue"
_POD = "blue-pod"  # a network namespace of the node
_PORT = 8386
_CONFIG = {
    "cniVersion": "1.0.0", "name": "blue", "type": "udptun", "instance": INSTANCE,
    "delegate": {"bridge": "cni-blue", "isDefaultGateway": True},
}


class Second:
    def __init__(self, plane: Plane, workers: Sequence[Worker], image: str) -> None:
        self._plane, self._workers, self._image = plane, workers[:2], image
        self._daemons: list[Process] = []
        v4, v6 = PODS.split(",")
        self._network = plane.folder / "net-conf.json"
        self._network.write_text(json.dumps({
            "Network": v4, "EnableIPv6": True, "IPv6Network": v6,
            "Backend": {"Type": "udp", "Port": _PORT}}))

    def start(self) -> None:
        """Start the cluster, and attach one pod on each node."""
        self._plane.start()
        self._plane.apply(*({"apiVersion": "v1", "kind": "Node", "metadata": {"name": one.name}}
                            for one in self._workers))
        for worker in self._workers:
            self._daemons.append(worker.start_image(
                self._image, INSTANCE, ["udptun", "node", *self._options(worker)],
                self._plane.folder))
        for worker in self._workers:
            wait_for(lambda worker=worker: "10.245." in self._subnets(worker),
                     f"the instance {INSTANCE} on {worker.name}", 120)
            worker.run(["ip", "netns", "add", _POD])
            self._plugin(worker, "ADD")

    def _options(self, worker: Worker) -> list[str]:
        kubeconfig: Path = self._plane.kubeconfig("admin", "system:masters")
        return [f"--instance={INSTANCE}", "--kube-subnet-mgr", f"--kubeconfig-file={kubeconfig}",
                f"--node-name={worker.name}", f"--net-config-path={self._network}", "--ip-masq"]

    def _subnets(self, worker: Worker) -> str:
        return worker.run(["cat", f"/run/{INSTANCE}/subnet.env"], check=False).stdout

    def _plugin(self, worker: Worker, command: str) -> Any:
        done = worker.run([
            "env", f"CNI_COMMAND={command}", "CNI_CONTAINERID=blue1", "CNI_IFNAME=eth0",
            f"CNI_NETNS=/run/netns/{_POD}", "CNI_PATH=/opt/cni/bin", "/opt/cni/bin/udptun",
        ], text=json.dumps(_CONFIG), check=False)
        if done.returncode:
            raise LabError(f"{command} on {worker.name}: {done.stdout} {done.stderr}")
        return json.loads(done.stdout) if done.stdout else None

    def reach(self) -> int:
        """Ping from each pod to the other one, in both families. Return the number of pairs."""
        addresses = {worker.name: self._addresses(worker) for worker in self._workers}
        pairs = [(worker, address) for worker in self._workers
                 for name, found in addresses.items() if name != worker.name for address in found]
        for worker, address in pairs:
            wait_for(lambda worker=worker, address=address: worker.run(
                ["ip", "netns", "exec", _POD, "ping", "-c1", "-W2", address],
                check=False).returncode == 0, f"{address} to answer {worker.name}")
        return len(pairs)

    def _addresses(self, worker: Worker) -> list[str]:
        found = json.loads(worker.run(
            ["ip", "-n", _POD, "-j", "address", "show", "dev", "eth0", "scope", "global"]).stdout)
        # ip(8) prints an empty object for an address of another scope
        return [one["local"] for one in found[0]["addr_info"] if one]

    def stop(self) -> None:
        """Remove the pods and the instance from the nodes, and end the control plane."""
        for worker, daemon in zip(self._workers, self._daemons, strict=True):
            self._plugin(worker, "DEL")
            worker.run(["ip", "netns", "del", _POD])
            worker.run(["ip", "link", "del", "cni-blue"])
            worker.run(["ctr", "-n", "k8s.io", "tasks", "kill", INSTANCE])
            daemon.wait()
            worker.run_image(self._image, ["udptun", "node", *self._options(worker), "--cleanup"])
        for name in self._plane.processes:
            self._plane.kill(name)
