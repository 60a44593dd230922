"""Builds one HTTP client for the API server from a KubeConfig.

Owns: the choice of the server's address and of the credentials, in flannel's order of precedence.
lightkube reads kubeconfig files and service accounts and handles TLS. If the server has rejected
the token, lightkube reads the token file again. Asyncio, one loop.
"""

from __future__ import annotations

import httpx2
from lightkube.config import kubeconfig
from lightkube.config.client_adapter import AsyncClient, ConnectionParams
from lightkube.config.models import Cluster, User
from msgspec.structs import replace

from ...text import without_user
from ..base import StoreRefused
from .config import KubeConfig

_CONNECT_TIMEOUT = 3.0  # seconds; a running server accepts a connection at once


def connect(config: KubeConfig) -> httpx2.AsyncClient:
    """Build the client. Does not connect to the server yet.

    Raises StoreRefused if there are no valid credentials.
    """
    timeout = httpx2.Timeout(config.request_timeout, connect=_CONNECT_TIMEOUT)
    try:
        return AsyncClient(_access(config), ConnectionParams(timeout=timeout))
    except Exception as e:  # invalid files cause errors of many types: YAML, TypeError, TLS
        source = config.kubeconfig_file or without_user(config.api_url) or config.service_account
        raise StoreRefused(f"no access to the Kubernetes API from {source}: {e or repr(e)}") from e


def _access(config: KubeConfig) -> kubeconfig.SingleConfig:
    """Select the server and the credentials. The first of these that is given is used:

    1. kubeconfig_file. If api_url is also given, it replaces the server in the file.
    2. api_url. In a pod, an https api_url is used with the credentials of the pod's service
       account. flannel sends no credentials in this case. Only an API server without authentication
       accepts such requests.
    3. The service account.
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
    assert access is not None  # get() without a default value never returns None
    user = access.user or User()
    if user.token_file is not None:
        user = replace(user, token_file=str(access.abs_file(user.token_file)))
    server = config.api_url or access.cluster.server
    return access._replace(cluster=replace(access.cluster, server=server), user=user)
