"""Import in advance what a forwarder otherwise imports after its first packet.

A forwarder that takes over does this before it asks the running one, because the import of these
libraries takes much CPU, and delays the first packets of the new workers. Main thread.
"""

from __future__ import annotations

from ..net import netlink


def load() -> None:
    from ..control import server  # noqa: F401 - not at the top: aiohttp loads slowly

    netlink.load()
