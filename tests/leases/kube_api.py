"""A small Kubernetes API server over HTTP: nodes, pods, and the errors of the real server.

Owns: the part of the API that a node agent uses: tokens and client certificates, RBAC from a
ClusterRole, lists in pages, watches with bookmarks, 410, strategic-merge patches of the status
subresource, validation. Like etcd, the server has one history of versions, and can compact the
history. Does not depend on udptun. Runs in the asyncio loop of the test.
"""

import asyncio
import base64
import contextlib
import copy
import ipaddress
import itertools
import json
import re
import ssl
import time
import uuid
from bisect import bisect_right
from datetime import UTC, datetime
from operator import itemgetter

from aiohttp import web

ADMIN = "admin-token"
MAX_ANNOTATIONS = 256 * 1024  # bytes, all keys and values of an object
_PATCHES = (
    "application/json-patch+json", "application/merge-patch+json",
    "application/strategic-merge-patch+json", "application/apply-patch+yaml",
)
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?")


class Refusal(Exception):
    """An error response of the server. The body is a Status object."""

    def __init__(self, code, reason, message, **details):
        self.status = {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, **({"reason": reason} if reason else {}), "code": code,
        }
        if details := {name: value for name, value in details.items() if value}:
            self.status["details"] = details
        super().__init__(message)


def not_found(kind, name):
    return Refusal(404, "NotFound", f'{kind} "{name}" not found', name=name, kind=kind)


def invalid(kind, name, field, value, why):
    return Refusal(
        422, "Invalid", f'{kind} "{name}" is invalid: {field}: Invalid value: {value!r}: {why}',
        name=name, kind=kind,
        causes=[{"reason": "FieldValueInvalid", "message": why, "field": field}],
    )


def internal(message):
    """Return the answer to some bad input: the real server has no better status for it."""
    return Refusal(500, "", message)


def bad_request(message):
    return Refusal(400, "BadRequest", message)


def expired(message="The provided continue parameter is too old to display a consistent list "
                    "result. You can start a new list without the continue parameter."):
    return Refusal(410, "Expired", message)


def node(name, *pod_cidrs, annotations=None, conditions=(), **status):
    """Return a Node object like the ones that a kubelet and the node controller create."""
    spec = {"podCIDR": pod_cidrs[0], "podCIDRs": list(pod_cidrs)} if pod_cidrs else {}
    return {
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name},
                     **({"annotations": annotations} if annotations else {})},
        "spec": spec,
        "status": {"conditions": [
            {"type": "Ready", "status": "True", "reason": "KubeletReady"}, *conditions], **status},
    }


class KubeApi:
    """The server. Use: ``async with KubeApi() as api``.

    It listens on ``address``. The port stays the same after a stop and a new start.
    """

    def __init__(self, tls=None, port=0, address="127.0.0.1"):
        self._tls = tls
        self.address = address
        self.port = port
        self._versions = itertools.count(1000)
        self.version = next(self._versions)
        self.compacted = self.version  # requests for an older version get 410
        self.nodes, self.pods = {}, {}
        self.history = []  # (version, type, object, object before)
        self.users = {ADMIN: ("admin", None)}  # token -> (user, rules; None: no restriction)
        self.requests = []  # (method, path with query, user) of every request
        self.headers = []  # of every request
        self.bookmark_seconds = 60.0
        self.gone_as_event = True  # a watch's 410: True: an ERROR event; False: the status
        # For each of the next requests of users with rules: a Refusal; None: accept the request.
        self.refuse_next = []
        self.answering = asyncio.Event()  # while it is cleared, requests get no response
        self.answering.set()
        self.on_page = None  # called after each page of a list, except the last page
        self._changed = asyncio.Condition()
        self._watches = {}  # task -> request
        self._runner = None

    # The server

    @property
    def url(self):
        return f"{'https' if self._tls else 'http'}://{self.address}:{self.port}"

    async def start(self):
        app = web.Application(middlewares=[self._every])
        app.router.add_get("/api/v1/nodes", self._list_or_watch)
        app.router.add_post("/api/v1/nodes", self._create)
        app.router.add_get("/api/v1/nodes/{name}", self._get)
        app.router.add_patch("/api/v1/nodes/{name}", self._patch)
        app.router.add_get("/api/v1/nodes/{name}/status", self._get)
        app.router.add_patch("/api/v1/nodes/{name}/status", self._patch_status)
        app.router.add_delete("/api/v1/nodes/{name}", self._delete)
        app.router.add_get("/api/v1/namespaces/{namespace}/pods/{name}", self._pod)
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(
            self._runner, self.address, self.port, ssl_context=self._tls, reuse_address=True
        )
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self):
        """Close all connections at once, like a server that is killed."""
        await self.cut_watches()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self):
        await self.start()
        return self

    async def __aexit__(self, *_):
        self.answering.set()
        await self.stop()

    async def cut_watches(self):
        """Break the connections of all watches."""
        for task, request in list(self._watches.items()):
            if request.transport is not None:
                request.transport.abort()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await task

    @property
    def watches_n(self):
        return len(self._watches)

    # Changes in the cluster

    def allow(self, token, user, rules):
        """Add a token of a user. The user has the permissions in ``rules``, as in a ClusterRole."""
        self.users[token] = (user, rules)

    def expire(self, token):
        del self.users[token]

    def compact(self):
        """Delete the history. Watches that already run still get all events."""
        self.compacted = self.version

    async def put(self, new):
        """Create or replace a node. The node gets a new version if it differs from the old one."""
        name = new["metadata"]["name"]
        old = self.nodes.get(name)
        meta = {
            "uid": str(uuid.uuid4()), "creationTimestamp": now(), **(old or {}).get("metadata", {}),
            **copy.deepcopy(new["metadata"]),
        }
        meta.pop("resourceVersion", None)
        new = {**copy.deepcopy(new), "metadata": meta}
        if old is not None and _unversioned(old) == new:
            return old  # the real server does not write an unchanged object
        self.version = next(self._versions)
        meta["resourceVersion"] = str(self.version)
        self.nodes[name] = new
        self.history.append((self.version, "ADDED" if old is None else "MODIFIED", new, old))
        await self._notify()
        return new

    async def annotate(self, name, **changes):
        """Change annotations. The arguments are the last parts of their names; None deletes.

        Example: annotate("n1", public_ip="...").
        """
        changed = copy.deepcopy(self.nodes[name])
        there = changed["metadata"].setdefault("annotations", {})
        for last, value in changes.items():
            key = "flannel.alpha.coreos.com/" + last.replace("_", "-")
            if value is None:
                there.pop(key, None)
            else:
                there[key] = value
        await self.put(changed)

    async def delete(self, name):
        old = self.nodes.pop(name)
        self.version = next(self._versions)
        gone = copy.deepcopy(old)
        gone["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, "DELETED", gone, old))
        await self._notify()

    async def set_back(self, version):
        """Forget all later changes, as after etcd was restored from a backup."""
        self.nodes = self._at(version)
        self.history = [entry for entry in self.history if entry[0] <= version]
        self.version, self._versions = version, itertools.count(version + 1)
        await self._notify()

    async def pass_over(self, n=1):
        """Increase the version by ``n``. Changes of objects that are not nodes do this too."""
        for _ in range(n):
            self.version = next(self._versions)
        await self._notify()

    async def _notify(self):
        async with self._changed:
            self._changed.notify_all()

    # All requests

    @web.middleware
    async def _every(self, request, handler):
        self.headers.append(request.headers)
        try:
            user, rules = self._user(request)
            self.requests.append((request.method, str(request.rel_url), user))
            await self.answering.wait()
            if rules is not None and self.refuse_next and (refusal := self.refuse_next.pop(0)):
                raise refusal
            self._authorize(request, user, rules)
            return await handler(request)
        except Refusal as e:
            return web.json_response(e.status, status=e.status["code"])
        except web.HTTPNotFound:
            if request.path.startswith("/api/v1/"):
                refusal = Refusal(
                    404, "NotFound", "the server could not find the requested resource")
                return web.json_response(refusal.status, status=404)
            return web.Response(status=404, text="404 page not found\n")
        except web.HTTPMethodNotAllowed:
            refusal = Refusal(405, "MethodNotAllowed", "the server does not allow this method on "
                              "the requested resource")
            return web.json_response(refusal.status, status=405)

    def _user(self, request):
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme == "Bearer" and token in self.users:
            return self.users[token]
        if scheme == "Basic" and base64.b64decode(token).decode() in self.users:
            return self.users[base64.b64decode(token).decode()]
        peer = request.transport.get_extra_info("peercert")
        if peer and ssl.cert_time_to_seconds(peer["notAfter"]) < time.time():
            # also on a connection that was opened before
            raise Refusal(401, "Unauthorized", "Unauthorized")
        if peer:  # system:masters, as in kubeadm's admin certificate
            return dict(entry[0] for entry in peer["subject"])["commonName"], None
        if not scheme:
            return "system:anonymous", ()
        self.requests.append((request.method, str(request.rel_url), None))
        raise Refusal(401, "Unauthorized", "Unauthorized")

    def _authorize(self, request, user, rules):
        if rules is None:
            return
        info = request.match_info
        status = "/status" if request.path.endswith("/status") else ""
        resource = ("pods" if "/pods/" in request.path else "nodes") + status
        verb = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}.get(request.method)
        if verb is None:
            watching = request.query.get("watch") in ("1", "true")
            verb = "get" if "name" in info else "watch" if watching else "list"
        for rule in rules:
            if ("" in rule["apiGroups"] and resource in rule["resources"]
                    and verb in rule["verbs"]):
                return
        field, _, selected = request.query.get("fieldSelector", "").partition("=")
        of = info.get("name") or (selected if field == "metadata.name" else "")
        name = f' "{of}"' if of else ""
        where = (f'in the namespace "{info["namespace"]}"' if "namespace" in info
                 else "at the cluster scope")
        if not request.path.startswith("/api/"):
            raise Refusal(403, "Forbidden", f'forbidden: User "{user}" cannot {verb} path '
                          f'"{request.path}"')
        raise Refusal(
            403, "Forbidden",
            f'{resource}{name} is forbidden: User "{user}" cannot {verb} resource "{resource}" in '
            f'API group "" {where}', name=of, kind=resource,
        )

    # Read

    async def _get(self, request):
        name = request.match_info["name"]
        if name not in self.nodes:
            raise not_found("nodes", name)
        return web.json_response(self.nodes[name])

    async def _pod(self, request):
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        if (namespace, name) not in self.pods:
            raise not_found("pods", name)
        where = self.pods[namespace, name]
        return web.json_response({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": namespace, "name": name},
            "spec": {"nodeName": where} if where else {},
        })

    async def _list_or_watch(self, request):
        if request.query.get("watch") in ("1", "true"):
            return await self._watch(request)
        return await self._list(request)

    async def _list(self, request):
        selected = _selector(request)
        limit, token = _number(request, "limit", 0), request.query.get("continue", "")
        if token:
            if request.query.get("resourceVersion"):
                raise bad_request("specifying resource version is not allowed when using continue")
            try:
                version, after = json.loads(base64.urlsafe_b64decode(token))
            except ValueError:
                raise bad_request("continue key is not valid") from None
            if version < self.compacted:
                raise expired()
        else:
            version, after = self.version, ""
            self._known(request.query.get("resourceVersion", ""), bad_request)
        there = self._at(version)
        names = [name for name in sorted(there) if name > after and selected(name)]
        page = names[:limit] if limit > 0 else names
        metadata = {"resourceVersion": str(version)}
        if len(page) < len(names):
            token = json.dumps([version, page[-1]]).encode()
            metadata["continue"] = base64.urlsafe_b64encode(token).decode()
            metadata["remainingItemCount"] = len(names) - len(page)
            if self.on_page is not None:
                await self.on_page()
        items = [{k: v for k, v in there[name].items() if k not in ("apiVersion", "kind")}
                 for name in page]
        return web.json_response(
            {"kind": "NodeList", "apiVersion": "v1", "metadata": metadata, "items": items})

    def _at(self, version):
        """Return all nodes at a version. The later changes are undone, the last one first."""
        there = dict(self.nodes)
        for when, _, new, old in reversed(self.history):
            if when <= version:
                break
            name = new["metadata"]["name"]
            if old is None:
                del there[name]
            else:
                there[name] = old
        return there

    def _known(self, text, refusal=internal, future=False):
        """Parse a resourceVersion. Refuse a version that this server cannot have issued.

        refusal  makes the refusal of a text that is not a number
        future   True: accept also a later version
        """
        if text in ("", "0"):
            return 0
        if not text.isdigit():
            raise refusal(f'resourceVersion: Invalid value: "{text}": strconv.ParseUint: parsing '
                          f'"{text}": invalid syntax')
        if int(text) > self.version and not future:
            raise Refusal(
                504, "Timeout", f"Timeout: Too large resource version: {text}, current: "
                f"{self.version}", retryAfterSeconds=1,
                causes=[{"reason": "ResourceVersionTooLarge",
                         "message": "Too large resource version"}],
            )
        return int(text)

    async def _watch(self, request):
        selected = _selector(request)
        # The real server accepts a version of the future, and sends nothing.
        start = self._known(request.query.get("resourceVersion", ""), future=True)
        seconds = _number(request, "timeoutSeconds", 1800)
        bookmarks = request.query.get("allowWatchBookmarks") in ("1", "true")
        gone = expired(f"too old resource version: {start} ({self.compacted})")
        too_old = start and start < self.compacted
        if too_old and not self.gone_as_event:
            raise gone
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        self._watches[asyncio.current_task()] = request
        try:
            if too_old:
                await _line(response, "ERROR", gone.status)
                return response
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(seconds):
                    await self._stream(response, start, selected, bookmarks)
            return response
        finally:
            del self._watches[asyncio.current_task()]

    async def _stream(self, response, start, selected, bookmarks):
        if not start:  # send the present state as ADDED events
            start = self.version
            for name in sorted(self.nodes):
                if selected(name):
                    await _line(response, "ADDED", self.nodes[name])
        loop = asyncio.get_running_loop()
        due = loop.time() + self.bookmark_seconds
        while True:
            await self.answering.wait()
            fresh = self.history[bisect_right(self.history, start, key=itemgetter(0)):]
            start = max(start, self.version)
            for _, kind, new, _ in fresh:
                if selected(new["metadata"]["name"]):
                    await _line(response, kind, new)
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        await self._changed.wait_for(lambda at=start: self.version > at)
            if loop.time() >= due:
                due = loop.time() + self.bookmark_seconds
                if bookmarks and start == self.version:
                    await _line(response, "BOOKMARK", {
                        "kind": "Node", "apiVersion": "v1",
                        "metadata": {"resourceVersion": str(start), "creationTimestamp": None},
                        "spec": {}, "status": {"daemonEndpoints": {"kubeletEndpoint": {"Port": 0}}},
                    })

    # Write

    async def _create(self, request):
        new = await _body(request)
        name = new.get("metadata", {}).get("name", "")
        if name in self.nodes:
            raise Refusal(409, "AlreadyExists", f'nodes "{name}" already exists', name=name,
                          kind="nodes")
        _validate(new, None)
        return web.json_response(await self.put(new), status=201)

    async def _delete(self, request):
        name = request.match_info["name"]
        if name not in self.nodes:
            raise not_found("nodes", name)
        details = {"name": name, "kind": "nodes", "uid": self.nodes[name]["metadata"]["uid"]}
        await self.delete(name)
        return web.json_response({"kind": "Status", "apiVersion": "v1", "metadata": {},
                                  "status": "Success", "details": details})

    async def _patch(self, request):
        return await self._patched(request, "status")

    async def _patch_status(self, request):
        return await self._patched(request, "spec")

    async def _patched(self, request, untouched):
        """Apply a patch.

        untouched  the part of the object that this request cannot change
        """
        name = request.match_info["name"]
        kind = request.content_type
        if kind not in _PATCHES:
            raise Refusal(
                415, "UnsupportedMediaType", "the body of the request was in an unknown format - "
                f"accepted media types include: {', '.join(_PATCHES)}")
        patch = await _body(request)
        old = self.nodes.get(name)
        if old is None:
            raise not_found("nodes", name)
        metadata = patch.get("metadata", {})
        if metadata.get("name", name) != name:
            raise bad_request(f"the name of the object ({metadata['name']}) does not match the "
                              f"name on the URL ({name})")
        wanted = metadata.get("resourceVersion")
        if wanted is not None and not wanted.isdigit():
            raise internal(f'strconv.ParseUint: parsing "{wanted}": invalid syntax')
        if wanted is not None and wanted != old["metadata"]["resourceVersion"]:
            raise Refusal(
                409, "Conflict", f'Operation cannot be fulfilled on nodes "{name}": the object has '
                "been modified; please apply your changes to the latest version and try again",
                name=name, kind="nodes")
        new = _merge(old, patch, strategic=kind.endswith("/strategic-merge-patch+json"))
        new[untouched] = old.get(untouched, {})
        for fixed in ("uid", "creationTimestamp"):
            if new["metadata"].get(fixed) != old["metadata"].get(fixed):
                raise invalid("Node", name, f"metadata.{fixed}", new["metadata"].get(fixed),
                              "field is immutable")
        _validate(new, old)
        return web.json_response(await self.put(new))


def now():
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _unversioned(obj):
    metadata = {k: v for k, v in obj["metadata"].items() if k != "resourceVersion"}
    return {**obj, "metadata": metadata}


async def _line(response, kind, obj):
    await response.write(json.dumps({"type": kind, "object": obj}).encode() + b"\n")


async def _body(request):
    try:
        body = await request.json()
    except ValueError as e:
        raise bad_request(f"error decoding: {e}") from e
    if not isinstance(body, dict):
        raise bad_request("json: cannot unmarshal into Go value of type map[string]interface {}")
    return body


def _number(request, name, default):
    text = request.query.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"-?\d+", text):
        raise bad_request(f'strconv.ParseInt: parsing "{text}": invalid syntax')
    return int(text)


def _selector(request):
    text = request.query.get("fieldSelector", "")
    if not text:
        return lambda name: True
    field, _, wanted = text.partition("=")
    if field not in ("metadata.name", "spec.unschedulable"):
        raise bad_request(f"field label not supported: {field}")
    return lambda name: name == wanted.lstrip("=")


def _merge(old, patch, strategic, path=""):
    """Merge ``patch`` into ``old`` as in RFC 7386.

    strategic  True: conditions are merged by their type
    """
    merged = copy.deepcopy(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        where = f"{path}.{key}"
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            merged[key] = _merge(merged.get(key), value, strategic, where)
        elif strategic and where == ".status.conditions":
            by_type = {c["type"]: c for c in merged.get(key, [])}
            for condition in value:
                if "type" not in condition:
                    raise internal(f"map: {condition} does not contain declared merge key: type")
            fresh = [c for c in value if c["type"] not in by_type]  # the real server's order
            for condition in value:
                by_type[condition["type"]] = {**by_type.get(condition["type"], {}), **condition}
            new = {c["type"] for c in fresh}
            merged[key] = fresh + [c for kind, c in by_type.items() if kind not in new]
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _validate(new, old):
    """Refuse what the real server refuses. It accepts any status of a condition."""
    name, spec = new["metadata"]["name"], new.get("spec", {})

    def forbidden(field, reason, why):
        return Refusal(
            422, "Invalid", f'Node "{name}" is invalid: {field}: {reason}: {why}', name=name,
            kind="Node", causes=[{"reason": f"FieldValue{reason.title().replace(' ', '')}",
                                  "message": why, "field": field}])

    if not _NAME.fullmatch(name):
        raise invalid("Node", name, "metadata.name", name, "a lowercase RFC 1123 subdomain must "
                      "consist of lower case alphanumeric characters, '-' or '.'")
    annotations = new["metadata"].get("annotations", {})
    for key, value in annotations.items():
        if not isinstance(value, str):
            raise invalid("", "", "patch", annotations, "cannot convert int64 to string")
        if not _KEY.fullmatch(key):
            raise invalid("Node", name, "metadata.annotations", key, "name part must be valid")
    if sum(len(k) + len(v) for k, v in annotations.items()) > MAX_ANNOTATIONS:
        raise forbidden("metadata.annotations", "Too long", "may not be more than 262144 bytes")
    _validate_cidrs(name, spec.get("podCIDRs", []))
    before = (old or {}).get("spec", {}).get("podCIDR")
    if before and spec.get("podCIDR") != before:
        raise forbidden("spec.podCIDRs", "Forbidden",
                        "node updates may not change podCIDR except from \"\" to valid")


def _validate_cidrs(name, cidrs):
    versions = []
    for i, text in enumerate(cidrs):
        try:
            versions.append(ipaddress.ip_network(text, strict=False).version)
        except ValueError:
            raise invalid("Node", name, f"spec.podCIDRs[{i}]", text, "must be a valid CIDR value, "
                          "(e.g. 10.9.8.0/24 or 2001:db8::/64)") from None
    if len(versions) > len(set(versions)):
        raise invalid("Node", name, "spec.podCIDRs", cidrs,
                      "may specify no more than one CIDR for each IP family")


def server_tls(certificate, key, client_authority=None):
    """Return the TLS context of the server.

    client_authority  the CA whose client certificates are accepted; None: no client certificates
    """
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    if client_authority is not None:
        tls.load_verify_locations(client_authority)
        tls.verify_mode = ssl.CERT_OPTIONAL
    return tls
