"""Send single ICMP echo requests along the kernel's route, and wait for each reply.

For a person who looks for a fault. Uses only the standard library, because a client command has to
start fast. Blocks. One thread per object.
"""

from __future__ import annotations

import socket
import time
from typing import Any

from ..errors import FieldError
from ..model import IPAddress
from .icmp import Echoes, open_raw

ECHO_MIN = {4: 36, 6: 56}  # the smallest packets
HEADERS = {4: 28, 6: 48}  # bytes before the payload of an echo request


class Answer:
    """The result of one packet. rtt: in seconds; None: no answer, and ``error`` says why."""

    def __init__(self, rtt: float | None, error: str = "") -> None:
        self.rtt, self.error = rtt, error


class EchoPinger:
    """Sends ICMP echo requests along the kernel's route."""

    def __init__(self, address: IPAddress) -> None:
        self.smallest = ECHO_MIN[address.version]
        self._version, self._headers = address.version, HEADERS[address.version]
        self._echoes, self._token = Echoes(address.version), 0
        self._raw: socket.socket = open_raw(address.version, self._echoes.identifier)
        self._raw.connect((str(address), 0))

    def once(self, size: int, seconds: float) -> Answer:
        if size < self.smallest:
            raise FieldError("size", size, f"at least {self.smallest}, the smallest packet")
        self._token += 1
        wanted = size - self._headers
        sent_at = time.monotonic()
        try:
            self._raw.send(self._echoes.request(self._token, wanted))
            while (left := sent_at + seconds - time.monotonic()) > 0:
                self._raw.settimeout(left)
                reply = self._echoes.reply(self._raw.recv(65536))
                if reply == (self._token, wanted):
                    return Answer(time.monotonic() - sent_at)
        except TimeoutError:
            pass
        except OSError as exc:
            return Answer(None, exc.strerror or str(exc))
        return Answer(None, f"no answer within {seconds:g} s")

    def close(self) -> None:
        self._raw.close()

    def directions(self) -> dict[str, Any]:
        """Echo requests do not show which direction fails."""
        return {"from_peer": None, "to_peer": None}
