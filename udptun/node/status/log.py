"""Log an error only once, even if the failing operation is repeated every second."""

from __future__ import annotations

import logging


class LogOnce:
    """Logs each distinct error text once. After ``clear``, logs each text once again."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._logged: set[str] = set()

    def error(self, text: str) -> None:
        if text not in self._logged:
            self._log.error("%s", text)
            self._logged.add(text)

    def clear(self) -> None:
        """Forget the logged errors. Call it when everything works again."""
        self._logged.clear()
