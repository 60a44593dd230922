"""The errors that udptun raises. A leaf."""

from __future__ import annotations

import errno

from .text import printable, shown


class UdptunError(Exception):
    """Base class of all errors that udptun raises on purpose."""


class FieldError(UdptunError, ValueError):
    """A value is invalid. The error names the field, the value and the expected form.

    Others may have chosen all of them, so the text is printable and has a limited length.

    where  position of the value in the input, such as ``"line 3"`` or ``"routes[17]"``, or empty
    """

    def __init__(self, field: str, value: object, expected: str, where: str = "") -> None:
        self.field, self.value, self.expected, self.where = field, value, expected, where
        prefix = f"{printable(where)}: " if where else ""
        super().__init__(f"{prefix}{printable(field)}: {shown(value)} is not valid: "
                         f"expected {printable(expected)}")


class RouteExists(UdptunError):
    """The table has a different route to the same prefix."""


class RouteLoops(FieldError):
    """The host would route the datagrams to a route's endpoint into our own TUN (ELOOP).

    The TUN would give them back to the forwarder.
    """

    def __init__(self, dst: str, via: str, device: str) -> None:
        self.errno = errno.ELOOP
        super().__init__(
            "via", via, f"an address that this host does not route into {device} itself (ELOOP)",
            f"route {dst}",
        )


class GenerationMismatch(UdptunError):
    """The table's generation is not the one that the caller expects: the table has changed."""


class DeviceError(UdptunError, OSError):
    """A system call on a device or socket failed. Has the errno, and names the operation."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class ControlError(UdptunError):
    """The forwarder answered a control request with an error.

    The error has a ``code``, which is stable, and a sentence.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(message)


class NoForwarder(UdptunError):
    """No forwarder answers on the control socket."""
