"""udptun: an IP-over-UDP tunnel in flannel's wire format.

Has the names of the public API. A name is imported at its first use (PEP 562), so that a client
command does not load the data plane. ``from udptun import Forwarder`` works as usual.
"""

from ._version import __version__

TYPE_CHECKING = False  # importing typing is slow, and the CNI plugin must start fast

if TYPE_CHECKING:
    from .answers import Drop, Node, Peer, ProbeAnswer, Status, Trace
    from .control.client import ControlClient
    from .errors import (
        ControlError,
        DeviceError,
        FieldError,
        GenerationMismatch,
        NoForwarder,
        RouteExists,
        UdptunError,
    )
    from .forwarder import Forwarder, ForwarderConfig, OffloadRequest
    from .model import Endpoint, Route, RouteDiff

__all__ = [
    "ControlClient",
    "ControlError",
    "DeviceError",
    "Drop",
    "Endpoint",
    "FieldError",
    "Forwarder",
    "ForwarderConfig",
    "GenerationMismatch",
    "NoForwarder",
    "Node",
    "OffloadRequest",
    "Peer",
    "ProbeAnswer",
    "Route",
    "RouteDiff",
    "RouteExists",
    "Status",
    "Trace",
    "UdptunError",
    "__version__",
]

_HOMES = {
    "answers": ("Drop", "Node", "Peer", "ProbeAnswer", "Status", "Trace"),
    "control.client": ("ControlClient",),
    "errors": (
        "ControlError", "DeviceError", "FieldError", "GenerationMismatch", "NoForwarder",
        "RouteExists", "UdptunError",
    ),
    "forwarder": ("Forwarder", "ForwarderConfig", "OffloadRequest"),
    "model": ("Endpoint", "Route", "RouteDiff"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
