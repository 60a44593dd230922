"""The configuration of a Kubernetes source, validated. Does not import aiohttp.

Does not read the environment. The command line passes NODE_NAME, POD_NAME and POD_NAMESPACE.
Frozen dataclass; any thread.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ...errors import FieldError
from ...text import without_user

ANNOTATION_PREFIX = "flannel.alpha.coreos.com/"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

# flannel's rule: a DNS name, a slash, and optionally a name prefix that ends with a hyphen.
_PREFIX = re.compile(r"(?:[a-z0-9_-]+\.)+[a-z0-9_-]+/(?:[a-z0-9_-]+-)?")


@dataclass(frozen=True, slots=True)
class KubeConfig:
    """The API server, and the name of our node. Times are in seconds.

    node_name                     the name of our Node object; "": use the node that our pod runs on
    pod_name, pod_namespace       our pod; required if node_name is ""
    api_url                       http://HOST:PORT or https://HOST:PORT; "": use the address in the
                                  kubeconfig or of the service account
    kubeconfig_file               the kubeconfig; None: use the pod's service account. ~ is expanded
    annotation_prefix             the prefix of flannel's annotations. It is completed as in
                                  flannel: "example.org" means "example.org/"
    net_config_path               path of flannel's net-conf.json
    set_node_network_unavailable  True: publish the condition NetworkUnavailable=False
    service_account               directory with token, ca.crt and namespace
    request_timeout               a request fails if it has no response within this time
    watch_timeout                 timeoutSeconds of a watch request: the server ends the watch after
                                  this time
    watch_silence                 after this time without an event or a bookmark, ask whether the
                                  server still answers, and watch again. In a quiet cluster, this is
                                  normal: the server may send no bookmark for minutes
    resync                        our node is read at this interval, even without an event
    retry_min, retry_max          the back-off while the API server is down. The values are small,
                                  so that changes are seen soon after the server is up again
    page                          number of nodes in one page of a listing
    """

    kind: ClassVar[str] = "kubernetes"
    no_node_data: ClassVar[str] = ""

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
                "NODE_NAME", self.node_name, "a node's name, or POD_NAME and POD_NAMESPACE"
            )
        if self.api_url and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", self.api_url):
            raise FieldError("kube-api-url", without_user(self.api_url),
                             "http://HOST:PORT or https://HOST:PORT")
        if self.kubeconfig_file is not None:
            object.__setattr__(self, "kubeconfig_file", _expanded(self.kubeconfig_file))
        object.__setattr__(self, "annotation_prefix", _complete(self.annotation_prefix))

    @property
    def store_id(self) -> str:
        return f"kubernetes {self.node_name}".strip()

    @property
    def files(self) -> tuple[Path, ...]:
        access = self.kubeconfig_file or self.service_account / "token"
        return (access, self.net_config_path)


def _expanded(path: Path) -> Path:
    """Replace a leading ~ or ~USER by the home directory."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise FieldError(
            "kubeconfig-file", str(path), "a path in the home directory of a known user") from None


def _complete(prefix: str) -> str:
    """Add the final "/" to DOMAIN, or the final "-" to DOMAIN/NAME, as flannel does."""
    whole = prefix if "/" in prefix else f"{prefix}/"
    if not whole.endswith(("/", "-")):
        whole += "-"
    if not _PREFIX.fullmatch(whole):
        raise FieldError(
            "kube-annotation-prefix", prefix,
            "a DNS name in lower case such as example.org, optionally followed by /NAME",
        )
    return whole
