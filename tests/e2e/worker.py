"""One node of the cluster: containerd, kubelet and kube-proxy in namespaces of their own.

Owns what makes a network namespace of the lab a whole machine for Kubernetes: its own processes
(a PID namespace, so that the end of its first process ends the node, with all containers), its own
mounts (/run, /var/lib, /etc/cni and the directories of CNI plugins) and the programs that run
there. Does not depend on udptun. Main thread only, like the lab.

    worker.run([...])      a command on the node: its network, mounts and processes
    worker.power_off()     everything on the node ends at once, as when the machine loses power
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from udptun.lab import Host, Process, wait_for
from udptun.lab.tools import SEARCH_PATH

from .plane import POD_CIDRS, Plane
from .programs import CNI_PLUGINS

_CGROUPS = Path("/sys/fs/cgroup")
PLUGIN_DIR = "/opt/cni/bin"
OTHER_PLUGIN_DIR = "/usr/lib/cni"  # of containerd in Debian
# The node's own directories; each is empty at the start.
_OWN = ("etc/cni/net.d", "opt/cni/bin", "usr/lib/cni", "var/lib", "var/log/pods",
        "var/log/containers")
# The first process of the node. It mounts the directories, and waits for its children's ends.
_FIRST = """
set -e
mount --make-rprivate /
for name in {own}; do mkdir -p /$name; mount --bind {root}/$name /$name; done
for program in {hidden}; do mount --bind /dev/null $program; done
mount -t tmpfs tmpfs /run
mount --make-rshared /
mkdir -p /run/lock /run/netns
touch {root}/started
while :; do sleep 1000 & wait; done
"""
_CONTAINERD = """
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  tolerate_missing_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "/etc/cni/net.d"
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
"""
_KUBELET = """
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {{enabled: false}}
  x509: {{clientCAFile: "{ca}"}}
authorization: {{mode: Webhook}}
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
failCgroupV1: false
failSwapOn: false
evictionHard: {{memory.available: "0%", nodefs.available: "0%", imagefs.available: "0%"}}
imageGCHighThresholdPercent: 100
localStorageCapacityIsolation: false
makeIPTablesUtilChains: false
nodeStatusUpdateFrequency: 4s
oomScoreAdj: 0
clusterDNS: ["10.96.0.10"]  # nobody answers there; without it, kubelet warns about each pod
resolvConf: ""
syncFrequency: 5s
"""


class Worker:
    """A node.

    python  False: the node has neither Python nor CNI plugins, as some distributions
    """

    def __init__(
        self, host: Host, plane: Plane, images: Sequence[Path], python: bool = True
    ) -> None:
        self.host, self.plane, self.images, self.python = host, plane, list(images), python
        self.name = host.name
        self.root = host.lab.folder / f"root-{self.name}"
        for name in _OWN:
            (self.root / name).mkdir(parents=True)
        self._plugin_dir = PLUGIN_DIR
        if python:
            self._copy_plugins(PLUGIN_DIR)
        self._first: Process | None = None
        self.containerd: Process
        self.kubelet: Process

    def _copy_plugins(self, folder: str) -> None:
        """Copy Debian's plugins. A distribution or another DaemonSet usually brings them."""
        for plugin in ("bridge", "host-local", "loopback", "portmap"):
            shutil.copy(CNI_PLUGINS / plugin, f"{self.root}{folder}")

    def use_other_plugin_dir(self) -> None:
        """Start containerd with the other directory of CNI plugins, in which are Debian's."""
        self._copy_plugins(OTHER_PLUGIN_DIR)
        self._plugin_dir = OTHER_PLUGIN_DIR
        self.containerd.stop()
        self._start_containerd()

    def start(self) -> None:
        """Start the node's first process, containerd, kubelet and kube-proxy."""
        (self.root / "started").unlink(missing_ok=True)
        script = _FIRST.format(own=" ".join(_OWN), root=self.root,
                               hidden=" ".join(() if self.python else _pythons()))
        # ip(8) has mounted another /sys, without cgroups. nsenter returns to the machine's mounts.
        self._first = self.host.start([
            "nsenter", f"--mount=/proc/{os.getpid()}/ns/mnt",
            "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
            "sh", "-c", script,
        ], name="first")
        wait_for((self.root / "started").exists, f"the first process of {self.name}")
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        self._inside = int(children.read_text().split()[0])
        self._start_containerd()
        self._start_kubelet()
        self._start_kube_proxy()

    def power_off(self) -> None:
        """End all processes of the node at once."""
        if self._first is not None:
            self._first.kill()
            self._first = None

    def _enter(self, argv: Sequence[str]) -> list[str]:
        return ["nsenter", f"--target={self._inside}", "--mount", "--pid", "--", *argv]

    def run(
        self, argv: Sequence[str], *, check: bool = True, seconds: float = 60,
        text: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the node."""
        return self.host.run(self._enter(argv), check=check, seconds=seconds, text=text)

    def pod_pids(self, pod: str, namespace: str = "default") -> dict[str, int]:
        """Return the process of each container of a pod, as seen on the node, by name."""
        found = self._containerd(
            "containers", "ls", "-q", f'labels."io.kubernetes.pod.name"=={pod},'
            f'labels."io.kubernetes.pod.namespace"=={namespace}').split()
        tasks = dict(line.split()[:2] for line in self._containerd("tasks", "ls").splitlines()[1:])
        pids = {}
        for container in found:
            labels = json.loads(self._containerd("containers", "info", container))["Labels"]
            if container in tasks:
                name = labels.get("io.kubernetes.container.name", "sandbox")
                pids[name] = int(tasks[container])
        return pids

    def start_in_pod(self, pod: str, argv: Sequence[str]) -> Process:
        """Start a program of the machine in a pod's network. The API server is not needed."""
        pid = self.pod_pids(pod)["sandbox"]
        return self.host.start(self._enter(["nsenter", f"--net=/proc/{pid}/ns/net", *argv]),
                               name=f"{argv[0]}-{pod}")

    def run_image(self, image: str, argv: Sequence[str], plugin_dir: str = PLUGIN_DIR) -> None:
        """Run a command of an image with the host's network and directories, as the README says.

        plugin_dir  the host's directory that the command has as PLUGIN_DIR
        """
        self.run(self._in_image(image, "clean", argv, (), plugin_dir))

    def start_image(self, image: str, name: str, argv: Sequence[str], folder: Path) -> Process:
        """Start a command of an image in the same way. ``folder`` is one more directory."""
        return self.host.start(self._enter(self._in_image(image, name, argv, [str(folder)])),
                               name=name)

    def _in_image(
        self, image: str, name: str, argv: Sequence[str], more: Sequence[str],
        plugin_dir: str = PLUGIN_DIR,
    ) -> list[str]:
        options = ["--rm", "--privileged", "--net-host"]
        mounts = {folder: folder for folder in ("/run", "/var/lib", "/etc/cni/net.d", *more)}
        for there, source in (mounts | {PLUGIN_DIR: plugin_dir}).items():
            options += ["--mount", f"type=bind,src={source},dst={there},options=rbind:rw"]
        return ["ctr", "-n", "k8s.io", "run", *options, image, name, *argv]

    def kill(self, pid: int) -> None:
        """Kill a process of the node with SIGKILL. ``pid`` is as seen on the node."""
        self.run(["kill", "-9", str(pid)])

    def _containerd(self, *argv: str) -> str:
        return self.run(["ctr", "-n", "k8s.io", *argv]).stdout

    def _start_containerd(self) -> None:
        config = self.root / "containerd.toml"
        config.write_text(_CONTAINERD.replace("{plugins}", self._plugin_dir))
        self.containerd = self.host.start(
            self._enter(["containerd", "--config", str(config)]), name="containerd")
        wait_for(lambda: self.run(["ctr", "version"], check=False).returncode == 0,
                 f"containerd on {self.name}")
        for image in self.images:
            self.load(image)

    def load(self, image: Path) -> None:
        """Load an image from its archive."""
        self.run(["ctr", "-n", "k8s.io", "images", "import", str(image)], seconds=600)

    def _start_kubelet(self) -> None:
        config = self.root / "kubelet.yaml"
        config.write_text(_KUBELET.format(ca=self.plane.authority.cafile))
        kubeconfig = self.plane.kubeconfig(f"system:node:{self.name}", "system:nodes")
        self.kubelet = self.host.start(self._enter([
            str(self.plane.programs / "kubelet"), f"--config={config}",
            f"--kubeconfig={kubeconfig}", f"--hostname-override={self.name}",
            f"--node-ip={self.host.v4},{self.host.v6}", "--root-dir=/var/lib/kubelet",
        ]), name="kubelet")

    def _start_kube_proxy(self) -> None:
        kubeconfig = self.plane.kubeconfig("system:kube-proxy")
        self.proxy = self.host.start(self._enter([
            str(self.plane.programs / "kube-proxy"), f"--kubeconfig={kubeconfig}",
            f"--hostname-override={self.name}", "--proxy-mode=nftables",
            f"--cluster-cidr={POD_CIDRS}", "--conntrack-max-per-core=0",
            "--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s",
        ]), name="kube-proxy")

    def restart_kubelet(self) -> None:
        self.kubelet.stop()
        self._start_kubelet()


def _pythons() -> list[str]:
    """Return the files of all Pythons that are programs of this machine."""
    folders = [*os.environ["PATH"].split(":"), *SEARCH_PATH.split(":"), f"{sys.base_prefix}/bin"]
    return sorted({str(path.resolve()) for folder in folders
                   for path in Path(folder).glob("python*") if path.exists()})


def remove_cgroups() -> None:
    """Remove the cgroups of containers that have ended. containerd leaves those of killed nodes."""
    for root in [*_CGROUPS.glob("k8s.io"), *_CGROUPS.glob("*/k8s.io")]:
        for folder in sorted(root.rglob("*/"), key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):  # in use
                folder.rmdir()
        with contextlib.suppress(OSError):
            root.rmdir()
