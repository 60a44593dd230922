"""Address and credentials of the API server: builds one HTTP client from a KubeConfig.

Owns: the choice of the credentials, in flannel's order of precedence. lightkube reads kubeconfig
files and service accounts, handles TLS, and reads the token file again when the server has rejected
the token. Asyncio, one loop.
"""

from __future__ import annotations

import httpx2
from lightkube.config import kubeconfig
from lightkube.config.client_adapter import AsyncClient, ConnectionParams
from lightkube.config.models import Cluster, User
from msgspec.structs import replace

from ..base import StoreRefused
from .config import KubeConfig

_CONNECT_TIMEOUT = 3.0  # seconds; a running server accepts a connection at once


def connect(config: KubeConfig) -> httpx2.AsyncClient:
    """Build the client; it does not connect yet. Raises StoreRefused without valid credentials."""
    timeout = httpx2.Timeout(config.request_timeout, connect=_CONNECT_TIMEOUT)
    try:
        return AsyncClient(_access(config), ConnectionParams(timeout=timeout))
    except Exception as e:  # errors of YAML, types and TLS, depending on the files' content
        source = config.kubeconfig_file or config.api_url or config.service_account
        raise StoreRefused(f"no access to the Kubernetes API from {source}: {e or repr(e)}") from e


def _access(config: KubeConfig) -> kubeconfig.SingleConfig:
    """Select kubeconfig (with api_url as its server), else api_url, else the service account.

    In a pod, an https api_url is used with the credentials of the pod's service account. flannel
    sends no credentials in this case, which only an API server without authentication accepts.
    """
    account = config.service_account
    if config.kubeconfig_file is not None:
        access = kubeconfig.KubeConfig.from_file(config.kubeconfig_file).get()
    elif not config.api_url:
        access = kubeconfig.KubeConfig.from_service_account(account).get()
    elif config.api_url.startswith("https:") and (account / "token").exists():
        cluster = Cluster(certificate_auth=str(account / "ca.crt"))
        user = User(token_file=str(account / "token"))
        access = kubeconfig.KubeConfig.from_one(cluster=cluster, user=user).get()
    else:
        access = kubeconfig.KubeConfig.from_server(config.api_url).get()
    assert access is not None  # get() without a default returns one or raises
    user = access.user or User()
    if user.token_file is not None:
        user = replace(user, token_file=str(access.abs_file(user.token_file)))
    server = config.api_url or access.cluster.server
    return access._replace(cluster=replace(access.cluster, server=server), user=user)
