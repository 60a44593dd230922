"""The forwarder: the parts of the data plane, put together. Read forwarder.py first."""

from ..device.offload import OffloadRequest
from .config import ForwarderConfig
from .forwarder import Forwarder

__all__ = ["Forwarder", "ForwarderConfig", "OffloadRequest"]
