"""Runs the credential plugin of a kubeconfig: a program that prints a token or a certificate.

Owns: the input and output of the program, and the time that it may take. The program gets the
daemon's environment, and no standard input. Asyncio, one loop.

source  the API client.authentication.k8s.io, v1 and v1beta1
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from ...text import os_reason, printable
from ..base import StoreRefused
from .kubeconfig import Plugin

SECONDS = 20.0  # a plugin that runs longer is ended
_MAX_OUTPUT = 1 << 20  # bytes


class _Status(msgspec.Struct, rename="camel"):
    token: str = ""
    client_certificate_data: str = ""
    client_key_data: str = ""
    expiration_timestamp: datetime | None = None


class _Output(msgspec.Struct, rename="camel"):
    api_version: str
    kind: str
    status: _Status


@dataclass(frozen=True, slots=True)
class Issued:
    """The credentials of a plugin.

    expires  time.time() from which the plugin must run again; None: after the server refused the
             credentials
    """

    token: str
    certificate: bytes
    key: bytes
    expires: float | None


async def run(plugin: Plugin) -> Issued:
    """Raises StoreRefused."""
    name = plugin.argv[0]
    env = {**os.environ, **plugin.env, "KUBERNETES_EXEC_INFO": _input(plugin)}
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            *plugin.argv, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe,
            limit=_MAX_OUTPUT)
    except OSError as e:
        hint = f" ({plugin.install_hint})" if plugin.install_hint else ""
        raise StoreRefused(f"the credential plugin {name} does not start: {os_reason(e)}{hint}") \
            from None
    try:
        async with asyncio.timeout(SECONDS):
            stdout, stderr = await process.communicate()
    except TimeoutError:
        raise StoreRefused(f"the credential plugin {name} did not end within {SECONDS:g} s") \
            from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        raise StoreRefused(f"the credential plugin {name} ended with {process.returncode}: "
                           f"{printable(stderr.decode(errors='replace').strip())}")
    return _issued(plugin, stdout)


def _input(plugin: Plugin) -> str:
    spec: dict[str, Any] = {"interactive": False}
    if plugin.cluster is not None:
        spec["cluster"] = {name: _json(value) for name, value in plugin.cluster.items() if value}
    return msgspec.json.encode(
        {"apiVersion": plugin.version, "kind": "ExecCredential", "spec": spec}).decode()


def _json(value: object) -> object:
    if isinstance(value, Path):
        value = value.read_bytes()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _issued(plugin: Plugin, stdout: bytes) -> Issued:
    name = plugin.argv[0]
    try:
        output = msgspec.json.decode(stdout, type=_Output)
    except msgspec.DecodeError as e:  # the text of the error has no secrets
        raise StoreRefused(f"the credential plugin {name} printed no ExecCredential: {e}") from None
    status = output.status
    if (output.api_version, output.kind) != (plugin.version, "ExecCredential"):
        raise StoreRefused(f"the credential plugin {name} printed {output.api_version} "
                           f"{output.kind}: expected {plugin.version} ExecCredential")
    both = bool(status.client_certificate_data), bool(status.client_key_data)
    if any(both) != all(both) or not (status.token or any(both)):
        raise StoreRefused(f"the credential plugin {name} printed neither a token nor a "
                           "certificate with its key")
    expires = status.expiration_timestamp
    return Issued(status.token, status.client_certificate_data.encode(),
                  status.client_key_data.encode(),
                  None if expires is None else expires.timestamp())
