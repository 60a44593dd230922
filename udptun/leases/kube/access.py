"""Selects the API server and the credentials, in flannel's order of precedence.

Owns: the order, and the files of a service account. Opens no connection. Any thread.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ...errors import FieldError
from ...text import without_user
from .config import KubeConfig
from .kubeconfig import Access, parse


def source_of(config: KubeConfig) -> str:
    """Return where the access comes from, for messages."""
    return str(config.kubeconfig_file or without_user(config.api_url) or config.service_account)


def find_access(config: KubeConfig) -> Access:
    """Return the first of these that is given:

    1. kubeconfig_file. If api_url is also given, it replaces the server in the file.
    2. api_url. In a pod, an https api_url is used with the credentials of the pod's service
       account. flannel sends no credentials in this case. Only an API server without authentication
       accepts such requests.
    3. The service account.

    Raises FieldError, OSError.
    """
    path, account = config.kubeconfig_file, config.service_account
    if path is not None:
        return parse(path.read_bytes(), path, config.api_url)
    if config.api_url:
        if config.api_url.startswith("https:") and (account / "token").exists():
            return _service_account(config.api_url, account)
        return Access(config.api_url)
    (account / "token").stat()  # without a service account, this is the clearest error
    return _service_account(_service(), account)


def _service_account(server: str, account: Path) -> Access:
    return replace(Access(server), ca=account / "ca.crt", token_file=account / "token")


def _service() -> str:
    """Return the API server's address, which the kubelet gives to each pod."""
    host, port = (os.environ.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
    if not host or not port:
        raise FieldError("KUBERNETES_SERVICE_HOST", host, "the variables of a pod, or a kubeconfig")
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
