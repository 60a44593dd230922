"""What the steps share: the table of steps, and the pods of the test.

Each step is one function with a docstring, which is its text in the table. A step raises LabError
with the reason if it fails, and returns a line with what it measured. The steps run in the order in
which they are defined. Main thread only.
"""

import re
from collections.abc import Callable, Iterable

from udptun.lab import LabError

from .cluster import NAMESPACE, Cluster, Pod
from .worker import OTHER_PLUGIN_DIR, PLUGIN_DIR, Worker

Step = Callable[[Cluster], str]
STEPS: dict[str, Step] = {}
NEEDS: dict[str, str] = {}  # a step that runs only after another one has passed: its name
PORT = 8088  # the pods' port on each node

_WEB = "mkdir -p /www; dd if=/dev/zero of=/www/mega bs=1M count=4 2>/dev/null; "\
       "hostname > /www/name; exec httpd -f -p 80 -h /www"
# The directories themselves are mounts of the worker.
_LISTING = "ip -o link; ip route; ip -6 route; nft list ruleset; "\
           "find /run/udptun /run/flannel /run/blue /var/lib/udptun /var/lib/blue; "\
           f"find /etc/cni/net.d {PLUGIN_DIR} {OTHER_PLUGIN_DIR} -mindepth 1"


def step(needs: str = "install") -> Callable[[Step], Step]:
    """Add a step to the table. ``needs``: the step that must pass first; "": none."""

    def add(function: Step) -> Step:
        name = function.__name__.replace("_", "-")
        STEPS[name], NEEDS[name] = function, needs
        return function

    return add


def with_needed(names: Iterable[str]) -> list[str]:
    """Return these steps and the ones that they need, in the order of the table."""
    wanted = set(names)
    while more := {NEEDS[name] for name in wanted} - wanted - {""}:
        wanted |= more
    return [name for name in STEPS if name in wanted]


def check(condition: object, what: str) -> None:
    if not condition:
        raise LabError(what)


def start_pods(cluster: Cluster) -> None:
    """Start the pods that the steps use: a small web server on each node."""
    cluster.run_everywhere("web", ports=[{"containerPort": 80, "hostPort": PORT}],
                           command=["/bin/sh", "-c", _WEB])
    pods_of(cluster)


def pods_of(cluster: Cluster) -> list[Pod]:
    return cluster.pods("web")


def stop_pods(cluster: Cluster) -> None:
    """Remove the pods while the CNI plugin is still there. Otherwise their interfaces stay."""
    cluster.plane.kubectl("delete", "daemonset", "web", "--cascade=foreground", seconds=120)


def udptun_pod(cluster: Cluster, node: str) -> str:
    """Return the name of udptun's pod on a node."""
    for pod in cluster.plane.get("pods", "-n", NAMESPACE)["items"]:
        if pod["spec"]["nodeName"] == node and "deletionTimestamp" not in pod["metadata"]:
            return str(pod["metadata"]["name"])
    raise LabError(f"no pod of udptun on {node}")


def reach_again(cluster: Cluster) -> None:
    """Wait until the pods reach each other, while some of them are still being replaced."""
    cluster.wait(lambda: not cluster.unreachable(pods_of(cluster)), "all pods to reach each other")


def left_over(workers: Iterable[Worker], pattern: str = "udptun|flannel") -> list[str]:
    """Return what on the nodes has such a name: devices, routes, rules and files."""
    return [f"{worker.name}: {line.strip()}" for worker in workers
            for line in worker.run(["sh", "-c", _LISTING], check=False).stdout.splitlines()
            if re.search(pattern, line)]
