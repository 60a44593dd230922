"""The error of a CNI command, and its JSON. Owns the codes of the CNI specification 1.1.0."""

from __future__ import annotations

INCOMPATIBLE_VERSION = 1
UNKNOWN_CONTAINER = 3
BAD_ENVIRONMENT = 4
IO_FAILURE = 5
BAD_CONTENT = 6  # it cannot be decoded
BAD_CONFIG = 7
TRY_AGAIN = 11
NOT_AVAILABLE = 50  # STATUS: ADD would fail
LIMITED = 51  # STATUS: ADD would fail, and existing pods may have no connectivity
INTERNAL = 999  # not in the specification, used by its library


class CniError(Exception):
    """A command failed.

    code     a code of the specification, or of the delegate
    message  one sentence
    details  more text, may be empty
    """

    def __init__(self, code: int, message: str, details: str = "") -> None:
        self.code, self.message, self.details = code, message, details
        super().__init__(message)

    def to_json(self, version: str) -> dict[str, object]:
        """Return the object that the plugin prints. ``version`` is the configuration's."""
        error: dict[str, object] = {
            "cniVersion": version, "code": self.code, "msg": self.message}
        if self.details:
            error["details"] = self.details
        return error
