"""What the supervisor of the workers reports."""

from __future__ import annotations

import os

import pytest

from udptun import _core
from udptun.control.events import EventHub
from udptun.device.offload import Capabilities
from udptun.forwarder.workers import Workers

pytestmark = pytest.mark.unprivileged


def test_drops_that_an_earlier_process_has_reported_are_not_reported_again() -> None:
    notify_fd = os.eventfd(0)
    try:
        core = _core.Core("strict", 1, (1500, 1500), (), notify_fd)
        core.inherit(core.packets(), [("send_error", "encap", 5)], {})
        reported: list[str] = []
        workers = Workers(core, notify_fd, Capabilities(), EventHub(), lambda: None,
                          lambda: None, reported.append, lambda: None)
        workers.inherit([])
        workers._report_kernel_errors()
        assert reported == []
        core.inherit(core.packets(), [("send_error", "encap", 7)], {})
        workers._report_kernel_errors()
        assert len(reported) == 1
    finally:
        os.close(notify_fd)
