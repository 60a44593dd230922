"""The node daemon's part of ``udptun status``, as text.

Formats the JSON that the daemon's socket returns (docs/node.md). Opens no connection.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from ..spans import size, span

EVENTS_N = 5  # the last events that are shown
MARKS = {"ok": "+", "degraded": "!", "failed": "-"}  # as in /readyz


def node_block(node: dict[str, Any]) -> str:
    lines = [
        ("version", node["version"]),
        ("state", "ready" if node["ready"] else _not_ready(node["waiting"])),
        ("interface", _interface(node)),
        ("backend", node["backend"] or "-"),
        ("mtu", node["mtu"] or "-"),
    ]
    text = [f"node: {' and '.join(node['subnets']) or 'no lease'}"]
    text += [f"  {label}: {value}" for label, value in lines]
    for one in trouble(node):
        text.append(f"  [{MARKS[one.state]}]{one.check}: {one.text}")
        text += [f"      {one.remedy}"] if one.remedy else []
    text += [f"  {line}" for line in _devices(node.get("devices", ()))]
    text += [f"  event: {_event(event)}" for event in node["events"][-EVENTS_N:]]
    return "\n".join(text)


def _devices(devices: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each device: what the kernel has counted, in both directions."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for count in devices:
        found.setdefault((count["path"], count["device"]), {})[count["direction"]] = count
    for (path, device), sides in found.items():
        sent, received = sides["encap"], sides["decap"]
        text = f"transfer by {path}: {size(received['bytes'])} received, {size(sent['bytes'])} sent"
        lost = [f"{name} {n}" for name in ("errors", "dropped")
                if (n := sent[name] + received[name])]
        yield f"{text} ({', '.join([device, *lost])})"


def _event(event: dict[str, Any]) -> str:
    text = event_text(event)
    return f"{age(event['time'])} ago, {event['type']}" + (f", {text}" if text else "")


class Trouble(NamedTuple):
    """A problem of the node: the state and the name of its check, what is wrong, what to do."""

    state: str
    check: str
    text: str
    remedy: str


def trouble(node: Mapping[str, Any]) -> Iterator[Trouble]:
    """Yield the problems of the node. A daemon of an earlier version names only the checks."""
    states = {check["name"]: check["state"] for check in node["checks"]}
    if "problems" not in node:
        for check in node["checks"]:
            if check["state"] != "ok":
                yield Trouble(check["state"], check["name"], " ".join(check["text"]), "")
    for one in node.get("problems", ()):
        lasting = f" (for {age(one['since'])})" if one["since"] else ""
        yield Trouble(states[one["check"]], one["check"], one["text"] + lasting, one["remedy"])


def problems(node: dict[str, Any], omitted: Container[str] = ()) -> Iterator[str]:
    """Yield a line for each thing that is wrong with the node. omitted: names of checks."""
    if not node["ready"]:
        yield f"the node is {_not_ready(node['waiting'])}"
    for one in trouble(node):
        if one.check not in omitted:
            what = "; ".join(filter(None, (one.text, one.remedy)))
            yield f"{one.state}: {one.check}: {what}"


def event_text(event: dict[str, Any]) -> str:
    """Return the text of an event of the node daemon, without its time and type."""
    what = str(event.get("peer") or event.get("check") or event.get("message") or "")
    if event.get("subnet"):
        what += f": {event['subnet']}"
    if event.get("path"):
        what += f" by {event['path']}"
    return what + (f"; {event['reason']}" if event.get("reason") else "")


def _not_ready(waiting: str) -> str:
    return f"not ready: {waiting}" if waiting else "not ready"


def _interface(node: dict[str, Any]) -> str:
    if not node["interface"]:
        return "-"
    return f"{node['interface']}, published as {' and '.join(node['public'])}"


def peer_block(peer: dict[str, Any]) -> str:
    reason = f": {peer['reason']}" if peer["reason"] else ""
    carried = f"{peer['path']} for {age(peer['path_since'])}"
    if peer["path_reason"]:
        carried += f"; {peer['path_reason']}"
    carried += _return(peer)
    text = [
        f"node peer: {peer['key']}", f"  subnet: {peer['subnet']}",
        f"  state: {peer['state']} for {age(peer['since'])}{reason}", f"  carried by: {carried}",
    ]
    return "\n".join([*text, *(f"  path {name}: {_path(path)}"
                               for name, path in peer["paths"].items())])


def _return(peer: dict[str, Any]) -> str:
    """Say when the preferred path will carry the packets again."""
    if peer.get("return_at") is not None:
        return f"; back to {peer['preferred']} in {_until(peer['return_at'])} if it keeps answering"
    if peer.get("return_seconds") is not None:
        return f"; back to {peer['preferred']} when it has answered for " \
            f"{span(peer['return_seconds'])}"
    return ""


def _path(path: dict[str, Any]) -> str:
    parts = [path["state"]]
    if path.get("rtt_us") is not None:
        parts.append(f"round trip {path['rtt_us'] / 1000:.3g} ms")
    if path.get("loss"):
        parts.append(f"loss {path['loss']:.0%}")
    if path.get("largest_size") is not None:
        parts.append(f"largest packet {path['largest_size']}")
    if path.get("last_answer") is not None:
        parts.append(f"last answer {age(path['last_answer'])} ago")
    return ", ".join(parts) + (f": {path['reason']}" if path.get("reason") else "")


def age(moment: str) -> str:
    return span(max(-_seconds_to(moment), 0.0))


def _until(moment: str) -> str:
    return span(max(_seconds_to(moment), 0.0))


def _seconds_to(moment: str) -> float:
    return (datetime.fromisoformat(moment) - datetime.now(UTC)).total_seconds()
