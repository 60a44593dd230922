"""The acts, by kind. ``ACTS`` has all of them, by name."""

from . import devices, firewalls, network, processes, routes, stores
from .act import Act, Scene

ACTS: dict[str, Act] = {
    act.name: act
    for kind in (devices, routes, firewalls, network, processes, stores)
    for act in kind.ACTS
}

__all__ = ["ACTS", "Act", "Scene"]
