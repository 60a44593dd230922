"""The first steps: what a cluster with udptun must do, and what must not disturb it.

udptun is installed with kustomize. ``install`` comes first, and ``uninstall`` last.
"""

import socket
import sys
import time
from collections.abc import Callable
from functools import partial

from udptun.lab import LabError, wait_for

from .cluster import NAMESPACE, Cluster, Steady, lost
from .step import (
    PORT,
    check,
    left_over,
    pods_of,
    reach_again,
    start_pods,
    step,
    stop_pods,
    udptun_pod,
)

_MEGA = 4 * 2**20


def _restarts(cluster: Cluster, node: str, container: str) -> int:
    pod = cluster.plane.get("pod", udptun_pod(cluster, node), "-n", NAMESPACE)
    return sum(status["restartCount"] for status in pod["status"]["containerStatuses"]
               if status["name"] == container)


def _is_ready(cluster: Cluster, node: str, container: str) -> bool:
    """Return whether the container has started and is ready. The status of the DaemonSet may still
    be that from before a restart."""
    pod = cluster.plane.get("pod", udptun_pod(cluster, node), "-n", NAMESPACE)
    return any(status["name"] == container and status["started"] and status["ready"]
               for status in pod["status"]["containerStatuses"])


@step(needs="")
def install(cluster: Cluster) -> str:
    """kubectl apply -k deploy/kubernetes; all nodes become ready"""
    cluster.others.create()
    began = time.monotonic()
    cluster.install()
    seconds = time.monotonic() - began
    start_pods(cluster)
    return f"ready after {seconds:.0f} s"


@step()
def pods(cluster: Cluster) -> str:
    """pods on all nodes reach each other in both families"""
    found = pods_of(cluster)
    for pod in found:
        check(pod.v4 and pod.v6, f"{pod.name} has not an address of each family")
    cluster.all_reach(found)
    return f"{len(found)} pods, {len(found) * (len(found) - 1) * 2} directions"


@step()
def diagnosis(cluster: Cluster) -> str:
    """status, doctor and report in the containers of a healthy node: doctor finds nothing"""
    for worker in cluster.workers:
        pod = cluster.plane.kubectl(
            "-n", NAMESPACE, "get", "pods", "-l", "app.kubernetes.io/name=udptun", "-o", "name",
            "--field-selector", f"spec.nodeName={worker.name}").strip()

        def run(container: str, command: str, pod: str = pod) -> str:
            return cluster.plane.kubectl("-n", NAMESPACE, "exec", pod, "-c", container, "--", "sh",
                                         "-c", command)

        shown = run("node", "udptun status")
        for other in cluster.workers:
            check(other is worker or other.name in shown, f"{other.name} is not in {shown}")
        for container in ("node", "forwarder"):
            _finds_nothing(cluster, partial(run, container, "udptun doctor || true"))
        parts = run("node", "udptun report -o - 2>/dev/null | tar -tz").splitlines()
        check(any(part.endswith("/doctor.json") for part in parts), f"the report has {parts}")
    return f"nothing found on {len(cluster.workers)} nodes"


def _finds_nothing(cluster: Cluster, doctor: Callable[[], str]) -> None:
    """Wait until doctor finds nothing: on a loaded machine, it may find late answers."""
    found = ""

    def healthy() -> bool:
        nonlocal found
        found = doctor()
        return "nothing found" in found

    try:
        cluster.wait(healthy, "doctor to find nothing")
    except LabError as error:
        raise LabError(f"{error}: {found}") from None


@step()
def no_python(cluster: Cluster) -> str:
    """a node without Python and without CNI plugins: ours have attached a pod there"""
    worker = next(worker for worker in cluster.workers if not worker.python)
    done = worker.run(["sh", "-c", "python3 --version"], check=False)
    check(done.returncode == 127, f"{worker.name} has Python: {done.stdout}")
    types = worker.run(["cat", "/etc/cni/net.d/10-udptun.conflist"]).stdout
    check('"type": "udptun"' in types, f"the conflist of {worker.name} is not ours: {types}")
    pod = next(pod for pod in pods_of(cluster) if pod.node == worker.name)
    return f"{pod.v4} on {worker.name}"


@step()
def beside(cluster: Cluster) -> str:
    """another overlay, and what kube-ovn, Calico and Cilium have, is as it was"""
    return f"{cluster.others.check()} settings of 2 nodes"


@step()
def transfer(cluster: Cluster) -> str:
    """a pod downloads 4 MiB from a pod of another node, in both families"""
    a, b, *_ = pods_of(cluster)
    for address in (b.v4, f"[{b.v6}]"):
        size = cluster.shell(a, f"wget -q -O - http://{address}/mega | wc -c").strip()
        check(int(size) == _MEGA, f"{size} bytes of {_MEGA} from {address}")
    return "4 MiB over IPv4 and IPv6"


@step()
def host_port(cluster: Cluster) -> str:
    """a pod's port on its node answers to the other nodes"""
    found = pods_of(cluster)
    for pod in found:
        other = next(p for p in found if p is not pod)
        target = f"http://{cluster.worker(pod.node).host.v4}:{PORT}/name"
        script = f"import urllib.request as r; print(r.urlopen({target!r}, timeout=9).read())"
        answer = cluster.worker(other.node).host.run([sys.executable, "-c", script]).stdout
        check(pod.name in answer, f"{target} answered {answer!r}")
    return f"port {PORT} of {len(found)} nodes"


@step()
def masquerade(cluster: Cluster) -> str:
    """outside the cluster, a pod's packets have its node's address"""
    outside = cluster.plane.host
    pod = pods_of(cluster)[0]
    with outside.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((str(outside.v4), 9999))
        listener.listen()
        listener.settimeout(60)
        cluster.shell(pod, f"timeout 5 wget -q http://{outside.v4}:9999/ || true")
        connection, (source, _) = listener.accept()
        connection.close()
    wanted = str(cluster.worker(pod.node).host.v4)
    check(source == wanted, f"source {source}; expected {wanted}")
    return f"{pod.v4} is {source} outside"


@step()
def service(cluster: Cluster) -> str:
    """a Service, by the real kube-proxy, reaches pods on all nodes"""
    found = pods_of(cluster)
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


@step()
def fallback(cluster: Cluster) -> str:
    """the network drops VXLAN between all nodes: pods reach each other by UDP"""
    for worker in cluster.workers:
        worker.host.nft("add table inet e2e; "
                        "add chain inet e2e in { type filter hook prerouting priority -300; }; "
                        "add rule inet e2e in udp dport 8472 drop")
    return _path(cluster, "udptun0")


def _path(cluster: Cluster, device: str) -> str:
    """Wait until all nodes send by ``device`` to the pods of others, and these answer."""
    found = pods_of(cluster)
    began = time.monotonic()

    def by_device() -> bool:
        return all(
            f" dev {device} " in cluster.worker(a.node).run(["ip", "route", "get", b.v4]).stdout
            for a in found for b in found if a is not b)

    wait_for(by_device, f"all nodes to send by {device}", 120)
    seconds = time.monotonic() - began
    cluster.all_reach(found)
    return f"all by {device} after {seconds:.0f} s"


@step()
def kill_daemon(cluster: Cluster) -> str:
    """kill -9 of the node daemon loses no packet"""
    return _kill(cluster, "node", allowed=0)


@step()
def kill_forwarder(cluster: Cluster) -> str:
    """kill -9 of the forwarder: pods reach each other again"""
    return _kill(cluster, "forwarder", allowed=None)


def _kill(cluster: Cluster, container: str, allowed: int | None) -> str:
    """Kill a container's process under a ping. ``allowed``: lost packets, None: any number."""
    a, b, *_ = pods_of(cluster)
    worker = cluster.worker(a.node)
    before = _restarts(cluster, a.node, container)
    pid = worker.pod_pids(udptun_pod(cluster, a.node), NAMESPACE)[container]
    ping = cluster.steady_ping(a, b.v4, 200)
    worker.kill(pid)
    cluster.wait(lambda: _restarts(cluster, a.node, container) > before,
                 f"kubelet to restart {container}")
    cluster.wait(lambda: _is_ready(cluster, a.node, container), f"{container} to be ready again")
    cluster.wait_installed()
    sent, missing = lost(ping)
    check(allowed is None or missing <= allowed, f"{missing} of {sent} packets lost")
    cluster.all_reach(pods_of(cluster))
    return f"{missing} of {sent} packets lost"


@step()
def api_outage(cluster: Cluster) -> str:
    """kill -9 of the API server loses no packet; the nodes become ready again"""
    return _outage(cluster, "kube-apiserver", cluster.plane.start_api_server)


@step()
def etcd_outage(cluster: Cluster) -> str:
    """kill -9 of etcd loses no packet; the nodes become ready again"""
    return _outage(cluster, "etcd", cluster.plane.start_etcd)


def _outage(cluster: Cluster, name: str, start: Callable[[], None]) -> str:
    a, b, *_ = pods_of(cluster)
    ping = cluster.steady_ping(a, b.v4, 200)
    cluster.plane.kill(name)
    sent, missing = lost(ping)
    start()
    cluster.wait_installed()
    check(missing == 0, f"{missing} of {sent} packets lost")
    cluster.all_reach(pods_of(cluster))
    return f"{missing} of {sent} packets lost in {sent / 10:.0f} s"


@step()
def certificates(cluster: Cluster) -> str:
    """the API server gets a new certificate: no packet is lost, no container restarts"""
    a, b, *_ = pods_of(cluster)
    before = {worker.name: _restarts(cluster, worker.name, "node") for worker in cluster.workers}
    ping = cluster.steady_ping(a, b.v4, 200)
    cluster.plane.renew_serving_certificate()
    cluster.plane.kill("kube-apiserver")
    cluster.plane.start_api_server()
    cluster.wait_installed()
    sent, missing = lost(ping)
    check(missing == 0, f"{missing} of {sent} packets lost")
    for worker in cluster.workers:
        restarts = _restarts(cluster, worker.name, "node") - before[worker.name]
        check(restarts == 0, f"{restarts} restarts of the node daemon on {worker.name}")
    return f"{missing} of {sent} packets lost"


@step()
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
    reach_again(cluster)
    return f"podCIDR {before}, then {after}"


@step()
def upgrade(cluster: Cluster) -> str:
    """kubectl rollout restart, twice: each pod is replaced, and no packet is lost"""
    a, b, *_ = pods_of(cluster)
    ping = Steady(cluster, a, b.v4)
    for _ in range(2):  # the second time, the TUN is from a container that has ended
        cluster.plane.kubectl("rollout", "restart", "daemonset/udptun", "-n", NAMESPACE)
        cluster.plane.kubectl("rollout", "status", "daemonset/udptun", "-n", NAMESPACE,
                              "--timeout=240s", seconds=300)
        cluster.wait_installed()
    loss = ping.stop()
    check(loss.lost == 0, str(loss))
    cluster.all_reach(pods_of(cluster))
    return str(loss)


@step()
def vxlan_again(cluster: Cluster) -> str:
    """the network passes VXLAN again: pods reach each other by VXLAN"""
    for worker in cluster.workers:
        worker.run(["nft", "delete", "table", "inet", "e2e"], check=False)
    return _path(cluster, "flannel.1")


@step()
def power_off(cluster: Cluster) -> str:
    """a node loses power and starts again: its pods come back"""
    worker = cluster.workers[1]
    worker.power_off()
    cluster.wait(lambda: cluster.conditions(worker.name).get("Ready") != "True",
                 f"{worker.name} to be not ready")
    worker.start()
    cluster.wait_installed()
    reach_again(cluster)
    return f"{worker.name} is back"


@step()
def two_clusters(cluster: Cluster) -> str:
    """a second cluster on the same hosts, as an instance: both work, its removal leaves nothing"""
    cluster.second.start()
    pairs = cluster.second.reach()
    cluster.all_reach(pods_of(cluster))
    cluster.second.stop()
    left = left_over(cluster.workers, "blue")
    check(not left, "left over: " + "; ".join(left))
    cluster.all_reach(pods_of(cluster))
    return f"{pairs} directions in the second cluster"


@step()
def uninstall(cluster: Cluster) -> str:
    """kubectl delete -k and the clean-up DaemonSet leave nothing on the nodes"""
    cluster.plane.kubectl("delete", "service", "web", "--ignore-not-found")
    stop_pods(cluster)
    cluster.plane.kubectl("delete", "-k", str(cluster.manifests()), seconds=300)
    cluster.clean_up()
    names = ("backend-data", "backend-v6-data", "backend-type", "public-ip", "public-ipv6",
             "kube-subnet-manager")
    cluster.plane.kubectl("annotate", "nodes", "--all",
                          *(f"flannel.alpha.coreos.com/{name}-" for name in names))
    left = left_over(cluster.workers)
    check(not left, "left over: " + "; ".join(left))
    others = cluster.others.check()
    return f"nothing is left; {others} settings of other networks"
