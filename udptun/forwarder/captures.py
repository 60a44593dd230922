"""The captures of this forwarder: what a reader needs to understand their records.

Owns the head of a capture. The core owns the records. Threading: control loop only.
"""

from __future__ import annotations

import time
from typing import Any

from .. import _core
from .._version import __version__
from ..drops import DROP_REASONS
from ..errors import ControlError
from ..model import CaptureFilter

REASONS = [reason.name for reason in DROP_REASONS]


class Captures:
    """Starts captures.

    device, mtu  the name and the MTU of the TUN
    """

    def __init__(self, core: _core.Core, device: str, mtu: int) -> None:
        self._core, self._device, self.mtu = core, device, mtu

    def start(self, wanted: CaptureFilter) -> Captured:
        """Raises ControlError if too many captures run already."""
        capture = self._core.start_capture(wanted)
        if capture is None:
            raise ControlError("too_many", "too many captures run already: end one of them first")
        return Captured(capture, {
            "version": __version__, "device": self._device, "mtu": self.mtu,
            "clock_offset_ns": time.time_ns() - time.monotonic_ns(),
            "reasons": REASONS, "snaplen": wanted.snaplen, "sample": wanted.sample,
        })


class Captured:
    """A running capture. ``head`` says how to read its records."""

    def __init__(self, capture: _core.Capture, head: dict[str, Any]) -> None:
        self.head = head
        self.take = capture.take
        self.counts = capture.counts
        self.close = capture.close
