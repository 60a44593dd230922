"""The values of ``--metrics`` and ``--metrics-peers``. A leaf, quick to import. Any thread."""

from __future__ import annotations

import ipaddress

from ..errors import FieldError
from ..model import MAX_PORT, Endpoint, parse_address, parse_number

LOOPBACK = ipaddress.IPv4Address("127.0.0.1")
PEERS_MAX = 1000  # limit of --metrics-peers


def parse_listen(field: str, text: str) -> Endpoint:
    """Parse ``PORT`` (on LOOPBACK), ``ADDRESS:PORT`` or ``[ADDRESS]:PORT``."""
    host, _, port = text.rpartition(":")
    try:
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise FieldError(field, text, "IPv6 in brackets")
        address = parse_address(field, host) if ":" in text else LOOPBACK
        return Endpoint(address, parse_number(field, port, 1, MAX_PORT))
    except FieldError:
        raise FieldError(
            field, text, "PORT (on 127.0.0.1), ADDRESS:PORT or [IPV6]:PORT, for example 9100, "
            "192.0.2.1:9100 or 0.0.0.0:9100") from None


def check_peers(field: str, number: int) -> None:
    """Raises FieldError if ``number`` is not valid for --metrics-peers."""
    if not 0 <= number <= PEERS_MAX:
        raise FieldError(field, number, f"from 0 to {PEERS_MAX}")
