"""The small API server answers as a real one: the same requests, sent to both, are compared.

Compared are the status, the content type, the reason, and the shape of the body: names of fields
and types of values. A Status object must have the same fields. A Node of the real server has more
fields. Texts for people may differ.
"""

import json

import pytest

from tests.leases import kube_real
from tests.leases.kube_api import node
from tests.leases.kube_cluster import flannel, open_cluster

STRATEGIC = "application/strategic-merge-patch+json"
MERGE = "application/merge-patch+json"
JSON = "application/json"
NODES = "/api/v1/nodes"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {which: tmp_path_factory.mktemp(which) for which in ("small", "real")}


@pytest.fixture(params=[kube_real.REAL])
async def both(folders):
    """Return the small and the real server. Each has the nodes "a" and "b"."""
    async with open_cluster("small", folders["small"]) as small, \
            open_cluster("real", folders["real"]) as real:
        for cluster in (small, real):
            await cluster.create(node("a", "10.244.1.0/24", annotations=flannel(
                public_ip="192.0.2.1")))
            await cluster.create(node("b"))
        yield small, real


def placed(cluster, value):
    """Put the names of the cluster's nodes into a request."""
    text = value if isinstance(value, str) else json.dumps(value)
    for short in ("a", "b", "none"):
        text = text.replace(f"<{short}>", cluster.name(short))
    return text if isinstance(value, str) else json.loads(text)


async def sent(cluster, method, path, body, kind, token):
    if not isinstance(body, bytes | None):
        body = placed(cluster, body)
    answer = await cluster.call(method, placed(cluster, path), body, kind, token)
    kind = answer.headers.get("Content-Type", "").partition(";")[0]
    if kind != JSON:
        return answer.status_code, kind, answer.text
    return answer.status_code, kind, answer.json()


def shape(value):
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items()}
    if isinstance(value, list):
        return [shape(one) for one in value]
    return type(value).__name__


def missing(small, real, where="body"):
    """Return the fields of the small server's answer that the real one's does not have alike."""
    if isinstance(small, dict) and isinstance(real, dict):
        return [one for name, value in small.items() for one in (
            missing(value, real[name], f"{where}.{name}") if name in real
            else [f"{where}.{name}"])]
    if isinstance(small, list) and isinstance(real, list):
        return missing(small[0], real[0], f"{where}[0]") if small and real else []
    return [] if type(small) is type(real) else [f"{where}: {small!r} and {real!r}"]


def check(small, real):
    assert small[:2] == real[:2], (small, real)
    ours, theirs = small[2], real[2]
    if not isinstance(ours, dict):
        assert ours == theirs
    elif ours["kind"] == "Status":
        assert ours.get("reason") == theirs.get("reason")
        assert ours["status"] == theirs["status"]
        fields = [{name: shape(one) for name, one in body.items() if name != "details"}
                  for body in (ours, theirs)]
        assert fields[0] == fields[1]
        details = [body.get("details", {}).keys() for body in (ours, theirs)]
        assert details[0] == details[1]
    else:
        assert missing(ours, theirs) == []


@pytest.mark.parametrize("path", [
    NODES, f"{NODES}?limit=1", f"{NODES}?limit=-1", f"{NODES}?limit=x", f"{NODES}?continue=x",
    f"{NODES}?resourceVersion=0", f"{NODES}?resourceVersion=x",
    f"{NODES}?resourceVersion=999999999", f"{NODES}?fieldSelector=metadata.name%3D<a>",
    f"{NODES}?fieldSelector=spec.x%3D1", f"{NODES}?watch=true&resourceVersion=x",
    f"{NODES}?watch=true&timeoutSeconds=x", f"{NODES}/<a>", f"{NODES}/<a>/status",
    f"{NODES}/<none>", f"{NODES}/<none>/status", "/api/v1/namespaces/default/pods/none",
    "/api/v1/nothing", "/nothing",
])
@pytest.mark.parametrize("token", [None, "", "unknown"], ids=["admin", "anonymous", "unknown"])
async def test_reads(both, path, token):
    check(*[await sent(cluster, "GET", path, None, JSON, token) for cluster in both])


@pytest.mark.parametrize(("body", "kind"), [
    ({"metadata": {}}, STRATEGIC),
    ({"metadata": {"annotations": {"x": "1"}}}, STRATEGIC),
    ({"metadata": {"annotations": {"x": None}}}, STRATEGIC),
    ({"metadata": {"annotations": {"x": "1"}}}, MERGE),
    ({"metadata": {"annotations": {"x": 1}}}, STRATEGIC),
    ({"metadata": {"annotations": {"x": True}}}, STRATEGIC),
    ({"metadata": {"annotations": {"not a key": "1"}}}, STRATEGIC),
    ({"metadata": {"annotations": {"x": "1" * 300_000}}}, STRATEGIC),
    ({"metadata": {"uid": "other"}}, STRATEGIC),
    ({"metadata": {"name": "other"}}, STRATEGIC),
    ({"metadata": {"resourceVersion": "1"}}, STRATEGIC),
    ({"metadata": {"resourceVersion": "x"}}, STRATEGIC),
    ({"status": {"conditions": [{"type": "A", "status": "False", "reason": "B"}]}}, STRATEGIC),
    ({"status": {"conditions": [{"status": "True"}]}}, STRATEGIC),
    ({"status": {"conditions": [{"type": "A", "status": "Perhaps"}]}}, STRATEGIC),
    ([1], STRATEGIC), (b"{", STRATEGIC), ({"metadata": {}}, JSON),
])
@pytest.mark.parametrize("subresource", ["", "/status"])
async def test_patches(both, subresource, body, kind):
    check(*[await sent(cluster, "PATCH", f"{NODES}/<a>{subresource}", body, kind, None)
            for cluster in both])


@pytest.mark.parametrize(("method", "path", "body"), [
    ("PATCH", f"{NODES}/<none>/status", {"metadata": {}}),
    ("PATCH", f"{NODES}/<b>", {"spec": {"podCIDR": "10.244.7.0/24",
                                        "podCIDRs": ["10.244.7.0/24"]}}),
    ("PATCH", f"{NODES}/<b>", {"spec": {"podCIDR": "x", "podCIDRs": ["x"]}}),
    ("PATCH", f"{NODES}/<a>", {"spec": {"podCIDR": "10.244.7.0/24",
                                        "podCIDRs": ["10.244.7.0/24"]}}),
    ("POST", NODES, {"metadata": {"name": "<a>"}}),
    ("POST", NODES, {"metadata": {"name": "Upper"}}),
    ("POST", NODES, {"metadata": {"name": "<none>"},
                     "spec": {"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24",
                                                                     "10.0.1.0/24"]}}),
    ("DELETE", f"{NODES}/<none>", None),
    ("DELETE", f"{NODES}/<b>", None),
    ("PUT", "/api/v1/namespaces/default/pods/none/nothing", {}),
])
async def test_writes(both, method, path, body):
    kind = STRATEGIC if method == "PATCH" else JSON
    answers = [await sent(cluster, method, path, body, kind, None) for cluster in both]
    if method == "DELETE" and "<b>" in path:
        for cluster in both:
            cluster.forget("b")
    check(*answers)
