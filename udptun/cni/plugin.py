"""The commands of the plugin, and the program that runs one of them.

Owns: what each command does and in which order, the delegate's configuration, and what is printed:
the result or the error on standard output, remarks on standard error.
"""

from __future__ import annotations

import json
import os
import sys

from ..text import printable
from . import node
from .addresses import leased
from .delegate import Delegate
from .failure import (
    BAD_CONTENT,
    INTERNAL,
    IO_FAILURE,
    NOT_AVAILABLE,
    TRY_AGAIN,
    UNKNOWN_CONTAINER,
    CniError,
)
from .request import ATTACHMENTS, MAX_INPUT, Request, command_of, parse_config
from .saved import ANY_INTERFACE, Saved
from .versions import NEWEST, OLDEST, SUPPORTED, is_at_most

TYPE_CHECKING = False  # see udptun/cni/__init__.py
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any, BinaryIO

DEFAULT_IFNAME = "eth0"


def main() -> None:
    """Run the command that the environment names, and end the process."""
    sys.exit(run(os.environ, sys.stdin.buffer, sys.stdout.buffer))


def run(environ: Mapping[str, str], source: BinaryIO, sink: BinaryIO) -> int:
    """Run one command. Return the exit code of the process.

    source  has the network configuration
    sink    gets the result or the error, as JSON
    """
    version, text = NEWEST, b""
    try:
        command = command_of(environ)
        text = source.read(MAX_INPUT + 1)
        answer = _answer_version(text) if command == "VERSION" else execute(Request(environ, text))
        code = 0
    except CniError as error:
        version = _version(text)
        answer, code = error.to_json(version), 1
    except OSError as error:
        answer, code = CniError(IO_FAILURE, str(error)).to_json(_version(text)), 1
    except Exception as error:
        import traceback

        traceback.print_exc()
        failure = CniError(INTERNAL, f"{type(error).__name__}: {printable(str(error))}")
        answer, code = failure.to_json(_version(text)), 1
    if answer is not None:
        sink.write(json.dumps(answer).encode() + b"\n")
        sink.flush()
    return code


def execute(request: Request) -> dict[str, Any] | None:
    """Run a command other than VERSION. Return what it prints. Raises CniError, OSError."""
    return _COMMANDS[request.command](request)


def _version(text: bytes) -> str:
    """Return the version for an error about this configuration."""
    try:
        version = parse_config(text).get("cniVersion", OLDEST)
    except CniError:
        return NEWEST
    return version if version in SUPPORTED else NEWEST


def _answer_version(text: bytes) -> dict[str, Any]:
    version = _version(text) if text.strip() else NEWEST
    if text.strip():
        parse_config(text)
    return {"cniVersion": version, "supportedVersions": list(SUPPORTED)}


def _say(text: str) -> None:
    print(f"udptun cni: {text}", file=sys.stderr)


# The commands


def _add(request: Request) -> dict[str, Any] | None:
    wait = request.wait
    delegate = _delegate(request, request.delegate["type"])  # its errors come before the wait
    overlay = node.wait_for(
        request.files, wait,
        lambda reason: _say(f"waiting up to {wait:g} s until this node is ready: {reason}"))
    config = {**delegate_config(request, overlay), "cniVersion": delegate.version}
    # before the delegate runs: DEL must find what was created, also if the delegate fails
    Saved(request).write(request.container_id, request.ifname, config)
    result = delegate.call("ADD", config)
    if result is None:
        raise CniError(BAD_CONTENT, f"{delegate.name} ADD printed no result")
    return result


def _del(request: Request) -> None:
    """Succeeds if there is nothing to remove, so it can be repeated."""
    saved = Saved(request)
    config = saved.read(request.container_id, request.ifname)
    if config is not None:
        _remove(request, saved, config, request.container_id, request.ifname)


def _check(request: Request) -> None:
    config = Saved(request).read(request.container_id, request.ifname)
    if not config:
        raise CniError(UNKNOWN_CONTAINER, f"the container {request.container_id} has no interface "
                       f"{request.ifname} in the network {request.name}")
    delegate = _delegate(request, _type_of(config))
    if delegate.has("CHECK"):
        delegate.call("CHECK", _with_gateways(_with_previous(config, request)))


def _status(request: Request) -> None:
    try:
        overlay = node.check(request.files)
        config = delegate_config(request, overlay)
        for name in (config["type"], config["ipam"]["type"]):
            plugin = _delegate(request, name)
            if plugin.has("STATUS"):
                plugin.call("STATUS", config)
    except CniError as error:
        if error.code in (IO_FAILURE, TRY_AGAIN):  # the plugin is not there, or does not start
            raise CniError(NOT_AVAILABLE, error.message, error.details) from None
        raise


def _gc(request: Request) -> None:
    """Remove the attachments that the runtime does not have. Try all, then raise the first error.
    """
    valid = request.attachments
    saved, failure = Saved(request), None
    for container_id, ifname in _stale(request, saved, valid):
        try:
            config = saved.read(container_id, ifname)
            _remove(request, saved, config or {}, container_id, ifname or DEFAULT_IFNAME)
        except (CniError, OSError) as error:
            _say(f"GC: the interface {ifname} of {container_id} is not removed: {error}")
            failure = failure or error
    delegate = _delegate(request, request.delegate["type"])
    if delegate.has("GC"):
        config = _present_config(request)
        if config is not None:
            config[ATTACHMENTS] = [
                {"containerID": one, "ifname": ifname} for one, ifname in sorted(valid)]
            delegate.call("GC", config, CNI_CONTAINERID="", CNI_IFNAME="", CNI_NETNS="")
    if failure is not None:
        raise failure


_COMMANDS = {"ADD": _add, "DEL": _del, "CHECK": _check, "STATUS": _status, "GC": _gc}


# Parts of commands


def delegate_config(request: Request, overlay: node.Overlay) -> dict[str, Any]:
    """Return the configuration for the delegate. It is the one of flannel's plugin."""
    config: dict[str, Any] = request.delegate
    if request.runtime_config:
        config["runtimeConfig"] = request.runtime_config
    config["name"] = request.name
    config.setdefault("ipMasq", not overlay.ip_masq)
    config.setdefault("mtu", overlay.mtu)
    if config["type"] == "bridge":
        config.setdefault("isGateway", True)
    config["cniVersion"] = request.version
    ipam = request.ipam
    ipam["ranges"] = [[{"subnet": str(subnet)}] for subnet in overlay.subnets]
    ipam["routes"] = [
        *(ipam.get("routes") or ()), *({"dst": str(network)} for network in overlay.networks)]
    config["ipam"] = ipam
    return config


def _delegate(request: Request, name: str) -> Delegate:
    return Delegate(name, request.path, request.environ, request.version)


def _type_of(config: Mapping[str, Any]) -> str:
    value = config.get("type")
    if not isinstance(value, str):
        raise CniError(BAD_CONTENT, "the saved configuration of the delegate has no type")
    return value


def _with_previous(config: Mapping[str, Any], request: Request) -> dict[str, Any]:
    if request.previous_result and is_at_most("0.4.0", request.version):
        return {**config, "prevResult": request.previous_result}
    return {**config}


def _with_gateways(config: dict[str, Any]) -> dict[str, Any]:
    """Add the gateway to each route of the previous result that has none.

    ADD reports such a route without its gateway, and CHECK of bridge then does not find it.
    """
    previous = config.get("prevResult", {})
    gateways = {":" in str(one["gateway"]): one["gateway"] for one in _objects(previous, "ips")
                if one.get("gateway")}
    routes = []
    for route in _objects(previous, "routes"):
        gateway = gateways.get(":" in str(route.get("dst")))
        routes.append(route if route.get("gw") or gateway is None else {**route, "gw": gateway})
    return {**config, "prevResult": {**previous, "routes": routes}} if routes else config


def _objects(result: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    entries = result.get(name)
    return [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []


def _remove(
    request: Request, saved: Saved, config: Mapping[str, Any], container_id: str, ifname: str
) -> None:
    """Let the delegate remove an attachment, then forget it. Raises CniError, OSError.

    config  the saved configuration; {} if there is none that can be read
    """
    if not config:
        config = _present_config(request) or {}
    if config:
        netns = request.environ.get("CNI_NETNS", "") if request.command == "DEL" else ""
        if request.command == "DEL":
            config = _with_previous(config, request)
        _delegate(request, _type_of(config)).call(
            "DEL", config, CNI_CONTAINERID=container_id, CNI_IFNAME=ifname, CNI_NETNS=netns)
    saved.remove(container_id, ifname)


def _present_config(request: Request) -> dict[str, Any] | None:
    """Return the configuration that ADD would use now, or None if the node has no subnet."""
    try:
        return delegate_config(request, node.from_file(request.files[0]))
    except node.NotReady as error:
        _say(f"{request.command}: {error}")
        return None


def _stale(
    request: Request, saved: Saved, valid: Iterable[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Return the attachments with a saved configuration or with an address, and without owner."""
    owners = {container_id for container_id, _ in valid}
    held = leased(request.name, request.ipam)
    found = {one for one in held if one not in valid}
    for container_id, ifname in saved.attachments():
        if ifname == ANY_INTERFACE:
            has_address = any(container_id == holder for holder, _ in held)
            if container_id not in owners and not has_address:
                found.add((container_id, DEFAULT_IFNAME))
        elif (container_id, ifname) not in valid:
            found.add((container_id, ifname))
    return sorted(found)
