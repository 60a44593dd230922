"""Log an error only once, even if the failing operation is repeated every second, and its end."""

from __future__ import annotations

import logging


class LogOnce:
    """Logs each distinct error text once. After ``clear``, logs each text once again."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._logged: dict[str, None] = {}  # a set that keeps the order

    def error(self, text: str) -> None:
        if text not in self._logged:
            self._log.error("%s", text)
            self._logged[text] = None

    def clear(self) -> None:
        """Forget the logged errors, and log that they are resolved.

        Call it when everything works again.
        """
        for text in self._logged:
            self._log.info("resolved: %s", text)
        self._logged.clear()
