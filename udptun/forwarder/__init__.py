"""The forwarder: composition of the data plane. Start with forwarder.py."""

from ..device.offload import OffloadRequest
from .config import ForwarderConfig
from .forwarder import Forwarder

__all__ = ["Forwarder", "ForwarderConfig", "OffloadRequest"]
