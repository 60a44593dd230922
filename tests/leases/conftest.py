"""Fixtures that several modules of this folder use."""

import pytest

from tests.leases.etcd_server import Etcd


@pytest.fixture
def etcd(tmp_path):
    server = Etcd(tmp_path).start()
    yield server
    server.kill()
