"""A cluster for the tests of the Kubernetes source, with the small API server or a real one.

Owns: an administrator's requests over HTTP, and the files of a node agent.
"""

import json
import ssl
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.leases import kube_real
from tests.leases.kube_api import ADMIN, KubeApi, node
from udptun.leases.kube.config import KubeConfig
from udptun.leases.kube.source import KubeSource

PREFIX = "flannel.alpha.coreos.com/"
DEPLOY = Path(__file__).resolve().parents[2] / "deploy/kubernetes"
NET_CONF = {"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}
DUAL_STACK = {**NET_CONF, "EnableIPv6": True, "IPv6Network": "fd00:10::/56"}
SERVERS = ["small", kube_real.REAL]


def deployed_rules():
    """Return the rules of the node daemon's role in deploy/."""
    documents = yaml.safe_load_all((DEPLOY / "rbac.yaml").read_text())
    return next(d["rules"] for d in documents if d["kind"] == "ClusterRole")


def flannel(**last_parts):
    """Return flannel's annotations. The arguments are the last parts of their names.

    Example: flannel(public_ip="192.0.2.1").
    """
    return {PREFIX + key.replace("_", "-"): value for key, value in last_parts.items()}


def member(name, address, *pod_cidrs, **more):
    """Return a node with the annotations of flannel's UDP backend."""
    published = {"kube_subnet_manager": "true", "backend_type": "", "backend_data": "null",
            "public_ip": address, **more}
    return node(name, *pod_cidrs, annotations=flannel(**published))


@dataclass
class Answer:
    """An HTTP response."""

    status_code: int
    headers: Any
    text: str

    def json(self):
        return json.loads(self.text)


class Cluster:
    """An administrator of an API server.

    The names of the nodes that it creates have a prefix. These nodes are deleted at the end.
    """

    def __init__(self, url, token, directory, small=None):
        self.url, self.token, self.directory, self.small = url, token, directory, small
        self.prefix = "" if small else f"udptun-test-{uuid.uuid4().hex[:8]}-"
        self.http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=_any_certificate()))
        self._made, self._sources = set(), []

    def name(self, short):
        return self.prefix + short

    async def call(self, method, path, body=None, kind="application/json", token=None, **params):
        """Send a request. ``token`` is "" for a request without one, None for the administrator's.
        """
        headers = {} if body is None else {"Content-Type": kind}
        token = self.token if token is None else token
        if token:
            headers["Authorization"] = f"Bearer {token}"
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        async with self.http.request(
            method, self.url + path, data=data, headers=headers, params=params
        ) as answer:
            return Answer(answer.status, answer.headers, await answer.text())

    async def create(self, new):
        new = json.loads(json.dumps(new))
        short = new["metadata"]["name"]
        new["metadata"]["name"] = self.name(short)
        answer = await self.call("POST", "/api/v1/nodes", new)
        assert answer.status_code == 201, answer.text
        self._made.add(short)

    async def annotate(self, short, **last_parts):
        path = f"/api/v1/nodes/{self.name(short)}"
        body = {"metadata": {"annotations": flannel(**last_parts)}}
        answer = await self.call("PATCH", path, body, "application/merge-patch+json")
        assert answer.status_code == 200, answer.text

    async def delete(self, short):
        answer = await self.call("DELETE", f"/api/v1/nodes/{self.name(short)}")
        assert answer.status_code == 200, answer.text
        self.forget(short)

    def forget(self, short):
        """Do not delete this node at the end: the test has deleted it."""
        self._made.discard(short)

    async def get(self, short):
        return (await self.call("GET", f"/api/v1/nodes/{self.name(short)}")).json()

    async def annotations(self, short):
        """Return flannel's annotations. The keys are the last parts of their names."""
        there = (await self.get(short))["metadata"].get("annotations", {})
        return {k.removeprefix(PREFIX): v for k, v in there.items() if k.startswith(PREFIX)}

    async def condition(self, short):
        conditions = (await self.get(short))["status"].get("conditions", [])
        return next((c for c in conditions if c["type"] == "NetworkUnavailable"), None)

    def config(self, me="n1", net_conf=None, token=None, **options):
        """Return the configuration of a node agent. The agent has its own kubeconfig."""
        (self.directory / "net-conf.json").write_text(json.dumps(net_conf or NET_CONF))
        (self.directory / "token").write_text(token or self.token)
        kubeconfig = {
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{"name": "it", "cluster": {
                "server": self.url, "insecure-skip-tls-verify": True}}],
            "users": [{"name": "me", "user": {"tokenFile": "token"}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "me"}}],
        }
        (self.directory / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
        options = {"node_name": self.name(me), "retry_min": 0.01, "retry_max": 0.05,
                   "kubeconfig_file": self.directory / "kubeconfig", **options}
        return KubeConfig(net_config_path=self.directory / "net-conf.json", **options)

    def source(self, *args, **options):
        source = KubeSource(self.config(*args, **options))
        self._sources.append(source)
        return source

    async def aclose(self):
        for source in self._sources:
            await source.aclose()
        for short in list(self._made) if self.small is None else ():
            await self.delete(short)
        await self.http.close()


def _any_certificate():
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    return tls


@asynccontextmanager
async def open_cluster(which, directory, **options):
    if which == "real":
        cluster = Cluster(*kube_real.shared(), directory)
        try:
            yield cluster
        finally:
            await cluster.aclose()
        return
    async with KubeApi(**options) as api:
        api.allow("agent", "system:serviceaccount:kube-udptun:udptun", deployed_rules())
        cluster = Cluster(api.url, ADMIN, directory, api)
        try:
            yield cluster
        finally:
            await cluster.aclose()
