"""Log an error once, although the operation that fails is repeated every second."""

from __future__ import annotations

import logging


class LogOnce:
    """Logs each distinct error once, until ``clear``."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._logged: set[str] = set()

    def error(self, text: str) -> None:
        if text not in self._logged:
            self._log.error("%s", text)
            self._logged.add(text)

    def clear(self) -> None:
        """Everything works: log errors again if they come back."""
        self._logged.clear()
