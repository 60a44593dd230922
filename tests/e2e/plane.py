"""The control plane: etcd, kube-apiserver, kube-controller-manager and kube-scheduler on one host.

Owns the certificates, kubeconfigs and command lines, and ``kubectl``. Does not depend on the nodes
or on udptun. Main thread only, like the lab.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.leases.authority import Authority
from udptun.lab import Host, LabError, Process, wait_for

POD_V4, POD_V6 = "10.244.0.0/16", "fd00:10:244::/56"
POD_CIDRS = f"{POD_V4},{POD_V6}"
SERVICE_CIDRS = "10.96.0.0/16,fd00:10:96::/112"
SERVICE_ADDRESS = "10.96.0.1"
_ADMIN = "admin"
_KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters:
- name: e2e
  cluster: {{server: "{server}", certificate-authority: "{ca}"}}
users:
- name: user
  user: {{client-certificate: "{certificate}", client-key: "{key}"}}
contexts:
- name: e2e
  context: {{cluster: e2e, user: user}}
current-context: e2e
"""


class Plane:
    """A control plane on ``host``.

    programs  the directory of Kubernetes' programs
    pods      the pods' networks
    """

    def __init__(self, host: Host, programs: Path, pods: str = POD_CIDRS) -> None:
        self.host, self.programs, self.pods = host, programs, pods
        self.folder = host.lab.folder / host.name
        self.folder.mkdir()
        self.server = f"https://{host.v4}:6443"
        self.authority = Authority(self.folder)
        self.renew_serving_certificate()
        self._accounts = self.authority.issue("service-accounts")
        self.processes: dict[str, Process] = {}

    def start(self) -> None:
        self.start_etcd()
        self.start_api_server()
        kubeconfig = self.kubeconfig("system:kube-controller-manager")
        self._start("kube-controller-manager", [
            f"--kubeconfig={kubeconfig}", "--allocate-node-cidrs=true",
            f"--cluster-cidr={self.pods}", f"--service-cluster-ip-range={SERVICE_CIDRS}",
            f"--service-account-private-key-file={self._accounts[1]}",
            f"--root-ca-file={self.authority.cafile}", "--use-service-account-credentials=true",
            "--leader-elect=false", "--node-monitor-grace-period=20s",
        ])
        kubeconfig = self.kubeconfig("system:kube-scheduler")
        self._start("kube-scheduler", [f"--kubeconfig={kubeconfig}", "--leader-elect=false"])

    def start_etcd(self) -> None:
        url, peers = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
        self.processes["etcd"] = self.host.start([
            "etcd", "--name", "e2e", "--data-dir", str(self.folder / "etcd"),
            "--listen-client-urls", url, "--advertise-client-urls", url,
            "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers,
            "--initial-cluster", f"e2e={peers}", "--unsafe-no-fsync",
        ])

    def start_api_server(self) -> None:
        certificate, key = self._serving
        client, client_key = self.certificate(_ADMIN, "system:masters")
        self._start("kube-apiserver", [
            "--etcd-servers=http://127.0.0.1:2379", "--secure-port=6443",
            f"--advertise-address={self.host.v4}",
            f"--tls-cert-file={certificate}", f"--tls-private-key-file={key}",
            f"--client-ca-file={self.authority.cafile}",
            f"--kubelet-client-certificate={client}", f"--kubelet-client-key={client_key}",
            f"--service-account-key-file={self._accounts[0]}",
            f"--service-account-signing-key-file={self._accounts[1]}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--authorization-mode=Node,RBAC", f"--service-cluster-ip-range={SERVICE_CIDRS}",
            "--allow-privileged=true", "--kubelet-preferred-address-types=InternalIP",
        ])
        wait_for(lambda: self._answers("/readyz"), "the API server", 120)

    def renew_serving_certificate(self) -> None:
        """Issue the API server's certificate again, with a new key. kube-apiserver reads it."""
        names = f"subjectAltName=IP:{self.host.v4},IP:127.0.0.1,IP:{SERVICE_ADDRESS},DNS:kubernetes"
        self._serving = self.authority.issue("kube-apiserver", names)

    def kill(self, name: str) -> None:
        self.processes[name].kill()

    def _start(self, name: str, options: Sequence[str]) -> None:
        self.processes[name] = self.host.start([str(self.programs / name), *options], name=name)

    def _answers(self, path: str) -> bool:
        return self._kubectl(["get", "--raw", path]).returncode == 0

    # ---- credentials ---------------------------------------------------------------------------

    def certificate(self, name: str, group: str = "") -> tuple[Path, Path]:
        """Issue a client certificate for a user of a group."""
        subject = f"/O={group}/CN={name}" if group else f"/CN={name}"
        return self.authority.issue(name, "extendedKeyUsage=clientAuth", subject)

    def kubeconfig(self, user: str, group: str = "") -> Path:
        """Write a kubeconfig for a user; return its path."""
        path = self.folder / f"{user.replace(':', '-')}.kubeconfig"
        if not path.exists():
            certificate, key = self.certificate(user, group)
            path.write_text(_KUBECONFIG.format(
                server=self.server, ca=self.authority.cafile, certificate=certificate, key=key))
        return path

    # ---- kubectl -------------------------------------------------------------------------------

    def _kubectl(
        self, argv: Sequence[str], text: str | None = None, seconds: float = 60
    ) -> subprocess.CompletedProcess[str]:
        kubeconfig = self.kubeconfig(_ADMIN, "system:masters")
        return self.host.run([str(self.programs / "kubectl"), f"--kubeconfig={kubeconfig}", *argv],
                             check=False, text=text, seconds=seconds)

    def kubectl(self, *argv: str, text: str | None = None, seconds: float = 60) -> str:
        """Run kubectl as administrator; return its output. Raises LabError if it fails."""
        done = self._kubectl(argv, text, seconds)
        if done.returncode:
            raise LabError(f"kubectl {' '.join(argv)} failed: {done.stderr.strip()}")
        return done.stdout

    def get(self, *argv: str) -> Any:
        """Return the objects that ``kubectl get ARGV`` finds."""
        return json.loads(self.kubectl("get", *argv, "-o", "json"))

    def apply(self, *objects: Any) -> None:
        self.kubectl("apply", "-f", "-", text=json.dumps(
            {"apiVersion": "v1", "kind": "List", "items": list(objects)}))
