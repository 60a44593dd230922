"""The errors udptun raises. A leaf: imports nothing of ours."""


class UdptunError(Exception):
    """Root of every error raised on purpose by udptun."""


class FieldError(UdptunError, ValueError):
    """A value that cannot be used: says which field, which value, and what was expected.

    ``where`` places it for a person, e.g. ``"line 3"`` or ``"routes[17]"``; empty if there is
    nothing to add.
    """

    def __init__(self, field: str, value: object, expected: str, where: str = "") -> None:
        self.field, self.value, self.expected, self.where = field, value, expected, where
        prefix = f"{where}: " if where else ""
        super().__init__(f"{prefix}{field}: {value!r} is not valid: expected {expected}")


class RouteExists(UdptunError):
    """A route to the same prefix with another next hop is in the table."""


class GenerationMismatch(UdptunError):
    """The table is no longer at the generation that the caller based its change on."""


class DeviceError(UdptunError, OSError):
    """A system call on a device or socket failed: keeps errno, says what was being done."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class ControlError(UdptunError):
    """The forwarder answered a control request with an error: stable ``code``, a sentence."""

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(message)


class NoForwarder(UdptunError):
    """Nobody answers on the control socket."""
