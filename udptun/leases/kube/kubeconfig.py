"""Parses kubeconfig files: the API server and the credentials.

Owns: the fields of a kubeconfig that describe one connection, and their rules. As in kubectl, the
current context is used, and a relative path starts at the directory of the file. A field that is
not supported is refused, and the error names it. The fields of other contexts are not checked.
Reads only the kubeconfig itself, not the files that it names. Any thread.

source  the types Config, Cluster, AuthInfo and ExecConfig of client-go's clientcmd/api/v1
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from ...errors import FieldError
from ...text import without_user

Pem = Path | bytes  # certificates or a key: the file, or the content

EXEC_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
PROXY_SCHEMES = ("http://", "https://")
# The characters that a header name may have besides letters and digits. Others are escaped.
_HEADER_SAFE = "!#$&'*+-.^_`|~"


@dataclass(frozen=True, slots=True)
class Plugin:
    """A program that returns credentials.

    cluster  the value of spec.cluster in its input; None: it gets none
    """

    version: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    install_hint: str = ""
    cluster: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Access:
    """One API server, and the sources of our credentials.

    server           URL of the API server
    ca               the CA that signs the server's certificate; None: the CAs of this host
    insecure         True: accept any certificate of the server
    tls_server_name  the name in the server's certificate; "": the host in ``server``
    proxy_url        "": the proxy in the environment, if there is one
    compression      True: the server may compress its answers
    token, token_file  if both are given, the file takes precedence
    impersonation    headers that name the user whom we impersonate
    """

    server: str
    ca: Pem | None = None
    insecure: bool = False
    tls_server_name: str = ""
    proxy_url: str = ""
    compression: bool = True
    certificate: Pem | None = None
    key: Pem | None = None
    token: str = ""
    token_file: Path | None = None
    username: str = ""
    password: str = ""
    plugin: Plugin | None = None
    impersonation: tuple[tuple[str, str], ...] = ()


def parse(text: bytes, path: Path, server: str = "") -> Access:
    """Return the access that the current context describes.

    server  used instead of the server in the file, if it is not empty

    Raises FieldError.
    """
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        why = getattr(e, "problem", None) or type(e).__name__  # str(e) may have a secret in it
        mark = getattr(e, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise FieldError("the kubeconfig", str(path), f"YAML ({why}{where})") from None
    config = _Fields(content, "")
    config.choice("apiVersion", ("", "v1"))
    config.choice("kind", ("", "Config"))
    current = config.text("current-context")
    if not current:
        raise FieldError("current-context", "", "the name of a context")
    contexts, clusters, users = (config.named(kind) for kind in ("context", "cluster", "user"))
    config.end("preferences", "extensions")

    context = _Fields(*_entry(contexts, "current-context", current, "contexts"))
    cluster_name, user_name = context.text("cluster"), context.text("user")
    context.end("namespace", "extensions")
    cluster = _Fields(*_entry(clusters, f"contexts[{current}].cluster", cluster_name, "clusters"))
    user = _Fields({}, "")
    if user_name:
        user = _Fields(*_entry(users, f"contexts[{current}].user", user_name, "users"))
    return _access(cluster, user, path.parent, server)


def _access(cluster: _Fields, user: _Fields, folder: Path, server: str) -> Access:
    url = cluster.text("server")
    server = server or url
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", server):
        raise cluster.error("server", without_user(server), "http://HOST:PORT or https://HOST:PORT")
    proxy_url = cluster.text("proxy-url")
    if proxy_url and not proxy_url.startswith(PROXY_SCHEMES):
        raise cluster.error("proxy-url", without_user(proxy_url), "an http or https proxy")
    ca = cluster.pem("certificate-authority", folder)
    insecure = cluster.flag("insecure-skip-tls-verify")
    if insecure and ca is not None:
        raise cluster.error("insecure-skip-tls-verify", True,
                            "false, because there is a certificate-authority")
    tls_server_name = cluster.text("tls-server-name")
    compression = not cluster.flag("disable-compression")
    extensions = cluster.objects("extensions")
    cluster.end()

    certificate, key = (user.pem(f"client-{kind}", folder) for kind in ("certificate", "key"))
    if (certificate is None) != (key is None):
        missing = "client-key" if key is None else "client-certificate"
        raise user.error(missing, None,
                         "a file, because a client needs both a certificate and its key")
    token, password = user.text("token", secret=True), user.text("password", secret=True)
    token_file, username = user.text("tokenFile"), user.text("username")
    plugin = _plugin(user, folder, {
        "server": server, "tls-server-name": tls_server_name,
        "insecure-skip-tls-verify": insecure, "certificate-authority-data": ca,
        "proxy-url": proxy_url, "disable-compression": not compression,
        "config": next((one.get("extension") for one in extensions
                        if one.get("name") == "client.authentication.k8s.io/exec"), None),
    })
    others = (certificate, token, token_file, username)
    if plugin is not None and any(others):
        raise user.error("exec", plugin.argv[0], "no other credentials beside it")
    if username and (token or token_file):
        raise user.error("username", username, "either a name and a password or a token")
    impersonation = _impersonation(user)
    if user.has("auth-provider"):
        raise user.error("auth-provider", "", "exec instead: Kubernetes has removed this field")
    user.end("extensions")
    return Access(
        server=server, ca=ca, insecure=insecure, tls_server_name=tls_server_name,
        proxy_url=proxy_url, compression=compression, certificate=certificate, key=key,
        token=token, token_file=folder / token_file if token_file else None,
        username=username, password=password, plugin=plugin, impersonation=impersonation,
    )


def _plugin(user: _Fields, folder: Path, cluster: Mapping[str, Any]) -> Plugin | None:
    if not user.has("exec"):
        return None
    fields = user.child("exec")
    version = fields.choice("apiVersion", EXEC_VERSIONS)
    command = fields.text("command")
    if not command:
        raise fields.error("command", "", "a program")
    if "/" in command:  # a name without a slash is searched for in PATH
        command = str(folder / command)
    args = fields.texts("args")
    env = {}
    for one in fields.objects("env"):
        variable = _Fields(one, f"{fields.where}.env")
        env[variable.text("name")] = variable.text("value", secret=True)
        variable.end()
    # No person can answer a question of the plugin.
    usual = "" if version == EXEC_VERSIONS[0] else "IfAvailable"
    mode = fields.text("interactiveMode") or usual
    if mode not in ("Never", "IfAvailable"):
        raise fields.error("interactiveMode", mode, "Never or IfAvailable")
    wants_cluster = fields.flag("provideClusterInfo")
    hint = fields.text("installHint")
    fields.end()
    return Plugin(version, (command, *args), env, hint, cluster if wants_cluster else None)


def _impersonation(user: _Fields) -> tuple[tuple[str, str], ...]:
    name, uid = user.text("as"), user.text("as-uid")
    groups, extra = user.texts("as-groups"), user.mapping("as-user-extra")
    if not name and (uid or groups or extra):
        raise user.error("as", "", "the name of a user, because as-uid, as-groups or "
                         "as-user-extra is given")
    headers = [("Impersonate-User", name)] if name else []
    headers += [("Impersonate-Uid", uid)] if uid else []
    headers += [("Impersonate-Group", group) for group in groups]
    for key in extra:
        values = _Fields(extra, f"{user.where}.as-user-extra").texts(key)
        header = f"Impersonate-Extra-{quote(key.lower(), safe=_HEADER_SAFE)}"
        headers += [(header, value) for value in values]
    return tuple(headers)


class _Fields:
    """The fields of one object. Each method takes one field out; ``end`` refuses the others.

    where  the path of the object, for messages
    """

    def __init__(self, value: object, where: str) -> None:
        self.where = where
        if not isinstance(value, dict):
            raise FieldError(where or "the kubeconfig", value, "an object")
        self._fields = {name: one for name, one in value.items() if one is not None}

    def error(self, name: str, value: object, expected: str) -> FieldError:
        return FieldError(f"{self.where}.{name}".lstrip("."), value, expected)

    def has(self, name: str) -> bool:
        return name in self._fields

    def end(self, *without_effect: str) -> None:
        """Refuse all fields that were not taken out.

        without_effect  fields that do not concern a connection
        """
        for name in self._fields:
            if name not in without_effect:
                raise self.error(name, "<given>", "a field that udptun knows")

    def text(self, name: str, *, secret: bool = False) -> str:
        value = self._fields.pop(name, "")
        if not isinstance(value, str) or "\n" in value.strip():
            shown = f"<{type(value).__name__}>" if secret else value
            raise self.error(name, shown, "a text of one line, in quotes if it looks like a number")
        return value.strip()

    def choice(self, name: str, values: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in values:
            raise self.error(name, value, " or ".join(filter(None, values)))
        return value

    def flag(self, name: str) -> bool:
        value = self._fields.pop(name, False)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def texts(self, name: str) -> list[str]:
        value = self._fields.pop(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.error(name, value, "a list of texts")
        return value

    def objects(self, name: str) -> list[dict[str, Any]]:
        value = self._fields.pop(name, [])
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise self.error(name, value, "a list of objects")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self._fields.pop(name, {})
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise self.error(name, value, "an object")
        return value

    def child(self, name: str) -> _Fields:
        return _Fields(self._fields.pop(name), f"{self.where}.{name}")

    def pem(self, name: str, folder: Path) -> Pem | None:
        """Return the field NAME-data or the file in the field NAME. As in kubectl, data takes
        precedence."""
        file, data = self.text(name), self.text(f"{name}-data", secret=True)
        if not data:
            return folder / file if file else None
        try:
            return base64.b64decode(data, validate=True)
        except binascii.Error:
            raise self.error(f"{name}-data", "<text>", "base64") from None

    def named(self, kind: str) -> dict[str, tuple[object, str]]:
        """Return the entries of a list such as ``clusters``: {name: (content, place)}."""
        entries: dict[str, tuple[object, str]] = {}
        for one in self.objects(f"{kind}s"):
            name = one.get("name")
            if not isinstance(name, str) or name in entries:
                raise self.error(f"{kind}s", name, "entries with different names")
            entries[name] = one.get(kind) or {}, f"{kind}s[{name}]"
        return entries


def _entry(
    entries: Mapping[str, tuple[object, str]], field: str, name: str, kind: str
) -> tuple[object, str]:
    if name not in entries:
        known = ", ".join(entries) or "there are none"
        raise FieldError(field, name, f"a name in {kind} ({known})")
    return entries[name]
