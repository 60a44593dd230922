"""What a Kubernetes source is told. Frozen; what cannot work is refused here, by field.

A leaf of its package, without lightkube: the command line reads it in every mode. It reads no
environment: who makes one passes NODE_NAME, POD_NAME and POD_NAMESPACE.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ...errors import FieldError

ANNOTATION_PREFIX = "flannel.alpha.coreos.com/"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

# Flannel's own rule: a DNS name, one slash, and perhaps the beginning of a name, up to a hyphen.
_PREFIX = re.compile(r"(?:[a-z0-9_-]+\.)+[a-z0-9_-]+/(?:[a-z0-9_-]+-)?")


@dataclass(frozen=True, slots=True)
class KubeConfig:
    """How to find the API server, and which node we are. Times in seconds.

    node_name                     this Node object's name; "": it is asked of our pod,
    pod_name, pod_namespace       which must both be given then
    api_url                       https://HOST:PORT; "": from the kubeconfig or service account
    kubeconfig_file               None: the service account of the pod
    annotation_prefix             completed as flannel does: "example.org" means "example.org/"
    net_config_path               flannel's net-conf.json
    set_node_network_unavailable  publish the condition NetworkUnavailable=False
    service_account               directory with token, ca.crt and namespace
    request_timeout               a request that is not answered for so long has failed
    watch_timeout                 the server is asked to end each watch after so long
    watch_silence                 a watch without even a bookmark for so long is dead; the server
                                  sends one in about a minute
    resync                        our node is looked at so often, also if nothing is said of it
    retry_min, retry_max          pauses between attempts while the API server is down; a short
                                  one brings the truth soon after it is back
    page                          nodes a listing asks for at once
    """

    kind: ClassVar[str] = "kubernetes"
    no_vxlan: ClassVar[str] = ""

    node_name: str = ""
    pod_name: str = ""
    pod_namespace: str = ""
    api_url: str = ""
    kubeconfig_file: Path | None = None
    annotation_prefix: str = ANNOTATION_PREFIX
    net_config_path: Path = Path("/etc/kube-flannel/net-conf.json")
    set_node_network_unavailable: bool = True
    service_account: Path = SERVICE_ACCOUNT
    request_timeout: float = 5.0
    watch_timeout: int = 300
    watch_silence: float = 90.0
    resync: float = 300.0
    retry_min: float = 0.1
    retry_max: float = 1.0
    page: int = 250

    def __post_init__(self) -> None:
        if not self.node_name and not (self.pod_name and self.pod_namespace):
            raise FieldError(
                "NODE_NAME", self.node_name, "a node's name, or else POD_NAME and POD_NAMESPACE"
            )
        if self.api_url and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", self.api_url):
            raise FieldError("kube-api-url", self.api_url, "http://HOST:PORT or https://HOST:PORT")
        object.__setattr__(self, "annotation_prefix", _complete(self.annotation_prefix))

    @property
    def store_id(self) -> str:
        return f"kubernetes {self.node_name}".strip()


def _complete(prefix: str) -> str:
    """flannel's newAnnotations: a slash after the name, a hyphen after what follows the slash."""
    whole = prefix if "/" in prefix else f"{prefix}/"
    if not whole.endswith(("/", "-")):
        whole += "-"
    if not _PREFIX.fullmatch(whole):
        raise FieldError(
            "kube-annotation-prefix", prefix,
            "a DNS name in lower case, such as example.org, and perhaps /NAME after it",
        )
    return whole
