"""The fixtures of the tests that use a fake forwarder."""

from tests.control.fakes import served, thread

__all__ = ["served", "thread"]
