"""The small API server behaves like a real one.

Each test runs with the small server. If a real server is given, each test also runs with it.
"""

import asyncio
import json

import pytest

from tests.leases.kube_api import node
from tests.leases.kube_cluster import SERVERS, flannel, open_cluster

STRATEGIC = "application/strategic-merge-patch+json"


@pytest.fixture(params=SERVERS)
async def cluster(request, tmp_path):
    async with open_cluster(request.param, tmp_path) as cluster:
        yield cluster


async def lines(cluster, n, **params):
    """Return the first n events of a watch."""
    found = []
    params = {"watch": "true", **params}
    headers = {"Authorization": f"Bearer {cluster.token}"}
    async with asyncio.timeout(60):
        async with cluster.http.get(
            f"{cluster.url}/api/v1/nodes", params=params, headers=headers
        ) as response:
            assert response.status == 200
            async for line in response.content:
                found.append(json.loads(line))
                if len(found) == n:
                    return found
    return found


async def version(cluster):
    return (await cluster.call("GET", "/api/v1/nodes")).json()["metadata"]["resourceVersion"]


async def test_an_unknown_token_is_refused(cluster):
    answer = await cluster.call("GET", "/api/v1/nodes", token="no")
    assert answer.status_code == 401
    assert answer.json()["reason"] == "Unauthorized"
    assert answer.json()["kind"] == "Status"


async def test_a_list_has_pages_of_one_version(cluster):
    for name in ("a", "b", "c"):
        await cluster.create(node(name))
    first = (await cluster.call("GET", "/api/v1/nodes", limit="1")).json()
    assert len(first["items"]) == 1
    await cluster.create(node("d"))
    rest = (await cluster.call(
        "GET", "/api/v1/nodes", **{"continue": first["metadata"]["continue"]})).json()
    names = {n["metadata"]["name"] for n in first["items"] + rest["items"]}
    assert {cluster.name(s) for s in "abc"} <= names
    assert cluster.name("d") not in names
    assert rest["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    assert not rest["metadata"].get("continue")
    assert (await cluster.call("GET", "/api/v1/nodes", **{"continue": "x"})).status_code == 400


async def test_a_watch_yields_the_events_after_its_version(cluster):
    await cluster.create(node("before"))
    start = await version(cluster)
    await cluster.create(node("a", "10.244.1.0/24"))
    await cluster.annotate("a", public_ip="192.0.2.1")
    await cluster.delete("a")
    events = await lines(cluster, 3, resourceVersion=start)
    assert [e["type"] for e in events] == ["ADDED", "MODIFIED", "DELETED"]
    assert {e["object"]["metadata"]["name"] for e in events} == {cluster.name("a")}
    versions = [int(e["object"]["metadata"]["resourceVersion"]) for e in events]
    assert versions == sorted(set(versions))


async def test_a_watch_from_the_future_is_silent(cluster):
    future = str(int(await version(cluster)) + 10**6)
    assert await lines(cluster, 1, resourceVersion=future, timeoutSeconds="1") == []


async def test_a_watch_ends_after_its_timeout(cluster):
    start = await version(cluster)
    assert [e for e in await lines(cluster, 9, resourceVersion=start, timeoutSeconds="1")
            if e["object"]["metadata"].get("name", "").startswith(cluster.prefix or " ")] == []


@pytest.mark.parametrize(
    ("path", "code", "reason"),
    [
        ("/api/v1/nodes?watch=true&resourceVersion=x", 500, None),
        ("/api/v1/nodes?resourceVersion=x", 400, "BadRequest"),
        ("/api/v1/nodes?limit=x", 400, "BadRequest"),
        ("/api/v1/nodes?watch=true&timeoutSeconds=x", 400, "BadRequest"),
        ("/api/v1/nodes?fieldSelector=spec.x%3D1", 400, "BadRequest"),
        ("/api/v1/nodes?resourceVersion=999999999", 504, "Timeout"),
        ("/api/v1/nothing", 404, "NotFound"),
    ],
)
async def test_reads_that_are_refused(cluster, path, code, reason):
    answer = await cluster.call("GET", path)
    status = answer.json()
    assert (answer.status_code, status["code"], status.get("reason")) == (code, code, reason)
    assert (status["kind"], status["status"]) == ("Status", "Failure")


async def test_reads_that_are_accepted(cluster):
    await cluster.create(node("a"))
    name = cluster.name("a")
    listing = (await cluster.call("GET", "/api/v1/nodes", limit="-1")).json()
    assert name in {n["metadata"]["name"] for n in listing["items"]}
    status = (await cluster.call("GET", f"/api/v1/nodes/{name}/status")).json()
    assert status["metadata"]["name"] == name
    assert (await cluster.call("GET", "/nothing")).text == "404 page not found\n"


async def test_a_request_without_a_token_is_anonymous(cluster):
    answer = await cluster.call("GET", "/api/v1/nodes", token="")
    assert (answer.status_code, answer.json()["reason"]) == (403, "Forbidden")
    assert 'User "system:anonymous" cannot list resource "nodes"' in answer.json()["message"]


@pytest.mark.parametrize(
    ("name", "pod_cidrs"),
    [("Upper", ()), ("a", ("x",)), ("a", ("10.244.1.0/24", "10.244.2.0/24"))],
)
async def test_nodes_that_are_refused(cluster, name, pod_cidrs):
    new = node(cluster.name(name), *pod_cidrs)
    answer = await cluster.call("POST", "/api/v1/nodes", new)
    assert (answer.status_code, answer.json()["reason"]) == (422, "Invalid"), answer.text


async def test_a_node_exists_once_and_a_deletion_names_it(cluster):
    await cluster.create(node("a"))
    answer = await cluster.call("POST", "/api/v1/nodes", node(cluster.name("a")))
    details = {"name": cluster.name("a"), "kind": "nodes"}
    assert (answer.status_code, answer.json()["reason"]) == (409, "AlreadyExists")
    assert answer.json()["details"] == details
    uid = (await cluster.get("a"))["metadata"]["uid"]
    answer = await cluster.call("DELETE", f"/api/v1/nodes/{cluster.name('a')}")
    assert answer.json()["status"] == "Success"
    assert answer.json()["details"] == {**details, "uid": uid}
    cluster.forget("a")


async def test_a_missing_node(cluster):
    path = f"/api/v1/nodes/{cluster.name('none')}"
    for answer in (
        await cluster.call("GET", path),
        await cluster.call("PATCH", f"{path}/status", {"metadata": {}}, STRATEGIC),
    ):
        assert (answer.status_code, answer.json()["reason"]) == (404, "NotFound")


async def test_the_status_subresource_accepts_annotations_and_conditions_but_no_spec(cluster):
    condition = {"type": "NetworkUnavailable", "status": "False", "reason": "FlannelIsUp"}
    await cluster.create(node("a", "10.244.1.0/24"))
    answer = await cluster.call(
        "PATCH", f"/api/v1/nodes/{cluster.name('a')}/status",
        {"metadata": {"annotations": flannel(public_ip="192.0.2.1")},
         "spec": {"unschedulable": True}, "status": {"conditions": [condition]}}, STRATEGIC,
    )
    assert answer.status_code == 200
    after = await cluster.get("a")
    assert "unschedulable" not in after["spec"]
    assert (await cluster.annotations("a")) == {"public-ip": "192.0.2.1"}
    kinds = {c["type"] for c in after["status"]["conditions"]}
    assert {"Ready", "NetworkUnavailable"} <= kinds  # merged by type, not replaced


async def test_null_removes_an_annotation_and_a_patch_without_effect_is_not_an_event(cluster):
    await cluster.create(node("a", annotations=flannel(public_ip="192.0.2.1", backend_type="")))
    path = f"/api/v1/nodes/{cluster.name('a')}/status"
    body = {"metadata": {"annotations": flannel(public_ip=None)}}
    first = (await cluster.call("PATCH", path, body, STRATEGIC)).json()
    assert (await cluster.annotations("a")) == {"backend-type": ""}
    second = (await cluster.call("PATCH", path, body, STRATEGIC)).json()
    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]


@pytest.mark.parametrize(
    ("body", "kind", "code", "reason"),
    [
        ({"metadata": {"annotations": {"x": 1}}}, STRATEGIC, 422, "Invalid"),
        ({"metadata": {"annotations": {"not a key": "1"}}}, STRATEGIC, 422, "Invalid"),
        ({"metadata": {"annotations": {"x": "1" * 300_000}}}, STRATEGIC, 422, "Invalid"),
        ({"metadata": {"uid": "other"}}, STRATEGIC, 422, "Invalid"),
        ({"metadata": {"name": "other"}}, STRATEGIC, 400, "BadRequest"),
        ({"metadata": {"resourceVersion": "1"}}, STRATEGIC, 409, "Conflict"),
        ({"metadata": {"resourceVersion": "x"}}, STRATEGIC, 500, None),
        ({"status": {"conditions": [{"status": "True"}]}}, STRATEGIC, 500, None),
        ([1], STRATEGIC, 400, "BadRequest"),
        ({"metadata": {}}, "application/json", 415, "UnsupportedMediaType"),
    ],
)
async def test_patches_that_are_refused(cluster, body, kind, code, reason):
    await cluster.create(node("a"))
    answer = await cluster.call("PATCH", f"/api/v1/nodes/{cluster.name('a')}/status", body, kind)
    assert answer.status_code == code, answer.text
    assert (answer.json()["code"], answer.json().get("reason")) == (code, reason)


async def test_a_pod_cidr_cannot_change(cluster):
    await cluster.create(node("a", "10.244.1.0/24"))
    body = {"spec": {"podCIDR": "10.244.2.0/24", "podCIDRs": ["10.244.2.0/24"]}}
    answer = await cluster.call("PATCH", f"/api/v1/nodes/{cluster.name('a')}", body, STRATEGIC)
    assert answer.status_code in (403, 422)
    assert (await cluster.get("a"))["spec"]["podCIDR"] == "10.244.1.0/24"
