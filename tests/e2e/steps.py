"""The steps: what a cluster with udptun must do, and what must not disturb it.

Each step is one function with a docstring, which is its text in the table. A step raises LabError
with the reason if it fails, and returns a line with what it measured. The steps run in the order of
this file; ``install`` comes first, and ``uninstall`` last.
"""

import re
import socket
import sys
import time
from collections.abc import Callable

from udptun.lab import LabError, wait_for

from .cluster import NAMESPACE, Cluster, Pod, lost

Step = Callable[[Cluster], str]
STEPS: dict[str, Step] = {}

_WEB = "mkdir -p /www; dd if=/dev/zero of=/www/mega bs=1M count=4 2>/dev/null; "\
       "hostname > /www/name; exec httpd -f -p 80 -h /www"
_LISTING = "ip -o link; ip route; ip -6 route; nft list ruleset; "\
           "find /run/udptun /run/flannel; find /var/lib/udptun /etc/cni/net.d /opt/cni -mindepth 1"
_PORT = 8088  # the pods' port on each node
_MEGA = 4 * 2**20


def _step(function: Step) -> Step:
    STEPS[function.__name__.replace("_", "-")] = function
    return function


def _check(condition: object, what: str) -> None:
    if not condition:
        raise LabError(what)


def _pods(cluster: Cluster) -> list[Pod]:
    return cluster.pods("web")


def _udptun_pod(cluster: Cluster, node: str) -> str:
    """Return the name of udptun's pod on a node."""
    for pod in cluster.plane.get("pods", "-n", NAMESPACE)["items"]:
        if pod["spec"]["nodeName"] == node and "deletionTimestamp" not in pod["metadata"]:
            return str(pod["metadata"]["name"])
    raise LabError(f"no pod of udptun on {node}")


def _reach_again(cluster: Cluster) -> None:
    """Wait until the pods reach each other, while some of them are still being replaced."""
    cluster.wait(lambda: not cluster.unreachable(_pods(cluster)), "all pods to reach each other")


def _restarts(cluster: Cluster, node: str, container: str) -> int:
    pod = cluster.plane.get("pod", _udptun_pod(cluster, node), "-n", NAMESPACE)
    return sum(status["restartCount"] for status in pod["status"]["containerStatuses"]
               if status["name"] == container)


@_step
def install(cluster: Cluster) -> str:
    """kubectl apply -k deploy/kubernetes; all nodes become ready"""
    began = time.monotonic()
    cluster.install()
    seconds = time.monotonic() - began
    web = {"ports": [{"containerPort": 80, "hostPort": _PORT}],
           "command": ["/bin/sh", "-c", _WEB]}
    cluster.run_everywhere("web", **web)
    _pods(cluster)
    return f"ready after {seconds:.0f} s"


@_step
def pods(cluster: Cluster) -> str:
    """pods on all nodes reach each other in both families"""
    found = _pods(cluster)
    for pod in found:
        _check(pod.v4 and pod.v6, f"{pod.name} has not an address of each family")
    cluster.all_reach(found)
    return f"{len(found)} pods, {len(found) * (len(found) - 1) * 2} directions"


@_step
def transfer(cluster: Cluster) -> str:
    """a pod downloads 4 MiB from a pod of another node, in both families"""
    a, b, *_ = _pods(cluster)
    for address in (b.v4, f"[{b.v6}]"):
        size = cluster.shell(a, f"wget -q -O - http://{address}/mega | wc -c").strip()
        _check(int(size) == _MEGA, f"{size} bytes of {_MEGA} from {address}")
    return "4 MiB over IPv4 and IPv6"


@_step
def host_port(cluster: Cluster) -> str:
    """a pod's port on its node answers to the other nodes"""
    found = _pods(cluster)
    for pod in found:
        other = next(p for p in found if p is not pod)
        target = f"http://{cluster.worker(pod.node).host.v4}:{_PORT}/name"
        script = f"import urllib.request as r; print(r.urlopen({target!r}, timeout=9).read())"
        answer = cluster.worker(other.node).run([sys.executable, "-c", script]).stdout
        _check(pod.name in answer, f"{target} answered {answer!r}")
    return f"port {_PORT} of {len(found)} nodes"


@_step
def masquerade(cluster: Cluster) -> str:
    """outside the cluster, a pod's packets have its node's address"""
    outside = cluster.plane.host
    pod = _pods(cluster)[0]
    with outside.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((str(outside.v4), 9999))
        listener.listen()
        listener.settimeout(60)
        cluster.shell(pod, f"timeout 5 wget -q http://{outside.v4}:9999/ || true")
        connection, (source, _) = listener.accept()
        connection.close()
    wanted = str(cluster.worker(pod.node).host.v4)
    _check(source == wanted, f"source {source}; expected {wanted}")
    return f"{pod.v4} is {source} outside"


@_step
def service(cluster: Cluster) -> str:
    """a Service, by the real kube-proxy, reaches pods on all nodes"""
    found = _pods(cluster)
    cluster.plane.apply({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]},
    })
    address = cluster.plane.get("service", "web")["spec"]["clusterIP"]
    seen: set[str] = set()

    def all_seen() -> bool:
        script = "for i in 1 2 3 4 5 6; do "\
                 f"timeout 5 wget -q -O - http://{address}/name || true; done"
        seen.update(cluster.shell(found[0], script).split())
        return {pod.name for pod in found} <= seen

    wait_for(all_seen, f"answers of all pods through {address}", 120)
    return f"{address} leads to {len(seen)} pods"


@_step
def fallback(cluster: Cluster) -> str:
    """the network drops VXLAN between all nodes: pods reach each other by UDP"""
    for worker in cluster.workers:
        worker.host.nft("add table inet e2e; "
                        "add chain inet e2e in { type filter hook prerouting priority -300; }; "
                        "add rule inet e2e in udp dport 8472 drop")
    return _path(cluster, "udptun0")


def _path(cluster: Cluster, device: str) -> str:
    """Wait until all nodes send by ``device`` to the pods of others, and these answer."""
    found = _pods(cluster)
    began = time.monotonic()

    def by_device() -> bool:
        return all(
            f" dev {device} " in cluster.worker(a.node).run(["ip", "route", "get", b.v4]).stdout
            for a in found for b in found if a is not b)

    wait_for(by_device, f"all nodes to send by {device}", 120)
    seconds = time.monotonic() - began
    cluster.all_reach(found)
    return f"all by {device} after {seconds:.0f} s"


@_step
def kill_daemon(cluster: Cluster) -> str:
    """kill -9 of the node daemon loses no packet"""
    return _kill(cluster, "node", allowed=0)


@_step
def kill_forwarder(cluster: Cluster) -> str:
    """kill -9 of the forwarder: pods reach each other again"""
    return _kill(cluster, "forwarder", allowed=None)


def _kill(cluster: Cluster, container: str, allowed: int | None) -> str:
    """Kill a container's process under a ping. ``allowed``: lost packets, None: any number."""
    a, b, *_ = _pods(cluster)
    worker = cluster.worker(a.node)
    before = _restarts(cluster, a.node, container)
    pid = worker.pod_pids(_udptun_pod(cluster, a.node), NAMESPACE)[container]
    ping = cluster.steady_ping(a, b.v4, 200)
    worker.kill(pid)
    cluster.wait(lambda: _restarts(cluster, a.node, container) > before,
                 f"kubelet to restart {container}")
    cluster.wait_installed()
    sent, missing = lost(ping)
    _check(allowed is None or missing <= allowed, f"{missing} of {sent} packets lost")
    cluster.all_reach(_pods(cluster))
    return f"{missing} of {sent} packets lost"


@_step
def api_outage(cluster: Cluster) -> str:
    """kill -9 of the API server loses no packet; the nodes become ready again"""
    return _outage(cluster, "kube-apiserver", cluster.plane.start_api_server)


@_step
def etcd_outage(cluster: Cluster) -> str:
    """kill -9 of etcd loses no packet; the nodes become ready again"""
    return _outage(cluster, "etcd", cluster.plane.start_etcd)


def _outage(cluster: Cluster, name: str, start: Callable[[], None]) -> str:
    a, b, *_ = _pods(cluster)
    ping = cluster.steady_ping(a, b.v4, 200)
    cluster.plane.kill(name)
    sent, missing = lost(ping)
    start()
    cluster.wait_installed()
    _check(missing == 0, f"{missing} of {sent} packets lost")
    cluster.all_reach(_pods(cluster))
    return f"{missing} of {sent} packets lost in {sent / 10:.0f} s"


@_step
def certificates(cluster: Cluster) -> str:
    """the API server gets a new certificate: no packet is lost, no container restarts"""
    a, b, *_ = _pods(cluster)
    before = {worker.name: _restarts(cluster, worker.name, "node") for worker in cluster.workers}
    ping = cluster.steady_ping(a, b.v4, 200)
    cluster.plane.renew_serving_certificate()
    cluster.plane.kill("kube-apiserver")
    cluster.plane.start_api_server()
    cluster.wait_installed()
    sent, missing = lost(ping)
    _check(missing == 0, f"{missing} of {sent} packets lost")
    for worker in cluster.workers:
        restarts = _restarts(cluster, worker.name, "node") - before[worker.name]
        _check(restarts == 0, f"{restarts} restarts of the node daemon on {worker.name}")
    return f"{missing} of {sent} packets lost"


@_step
def node_again(cluster: Cluster) -> str:
    """a Node object that is deleted and created again: its pods are reached again"""
    worker = cluster.workers[-1]
    before = cluster.plane.get("node", worker.name)["spec"]["podCIDR"]
    cluster.plane.kubectl("delete", "node", worker.name)
    worker.restart_kubelet()
    cluster.wait(lambda: cluster.plane.get("node", worker.name)["spec"]["podCIDR"],
                 f"a podCIDR for {worker.name}")
    after = cluster.plane.get("node", worker.name)["spec"]["podCIDR"]
    cluster.wait_installed()
    # Pods of the old podCIDR are replaced, as the daemon's log says.
    cluster.plane.kubectl("delete", "pods", "-l", "app=web", "--wait=false")
    _reach_again(cluster)
    return f"podCIDR {before}, then {after}"


@_step
def upgrade(cluster: Cluster) -> str:
    """kubectl rollout restart: the DaemonSet is replaced node by node"""
    a, b, *_ = _pods(cluster)
    ping = cluster.steady_ping(a, b.v4, 900)
    cluster.plane.kubectl("rollout", "restart", "daemonset/udptun", "-n", NAMESPACE)
    cluster.plane.kubectl("rollout", "status", "daemonset/udptun", "-n", NAMESPACE,
                          "--timeout=240s", seconds=300)
    cluster.wait_installed()
    sent, missing = lost(ping)
    cluster.all_reach(_pods(cluster))
    return f"{missing} of {sent} packets lost"


@_step
def vxlan_again(cluster: Cluster) -> str:
    """the network passes VXLAN again: pods reach each other by VXLAN"""
    for worker in cluster.workers:
        worker.run(["nft", "delete", "table", "inet", "e2e"], check=False)
    return _path(cluster, "flannel.1")


@_step
def power_off(cluster: Cluster) -> str:
    """a node loses power and starts again: its pods come back"""
    worker = cluster.workers[1]
    worker.power_off()
    cluster.wait(lambda: cluster.conditions(worker.name).get("Ready") != "True",
                 f"{worker.name} to be not ready")
    worker.start()
    cluster.wait_installed()
    _reach_again(cluster)
    return f"{worker.name} is back"


@_step
def uninstall(cluster: Cluster) -> str:
    """kubectl delete -k and the documented clean-up leave nothing on the nodes"""
    cluster.plane.kubectl("delete", "daemonset", "web")
    cluster.plane.kubectl("delete", "service", "web", "--ignore-not-found")
    cluster.plane.kubectl("delete", "-k", str(cluster.manifests()), seconds=300)
    left = []
    for worker in cluster.workers:
        for words in ("cni uninstall",
                      f"node --kube-subnet-mgr --node-name {worker.name} --cleanup"):
            worker.run_image(cluster.image_name, ["udptun", *words.split()])
        listing = worker.run(["sh", "-c", _LISTING], check=False).stdout
        left += [f"{worker.name}: {line.strip()}" for line in listing.splitlines()
                 if re.search(r"udptun|flannel", line)]
    _check(not left, "left over: " + "; ".join(left))
    return "nothing is left"
