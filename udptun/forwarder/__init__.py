"""The forwarder: the composition of the data plane. See forwarder.py."""

from ..device.offload import OffloadRequest
from .config import ForwarderConfig
from .forwarder import Forwarder

__all__ = ["Forwarder", "ForwarderConfig", "OffloadRequest"]
