"""The log of a long-running command. Lines go to stderr, as text or as one JSON object each.

Owns the two formats, and the level of each logger: udptun's own loggers log from INFO on, all other
loggers from WARNING on. Libraries log every request at INFO: for example httpx2, which lightkube
uses. Threading: call from the main thread, at the start.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime

log = logging.getLogger("udptun")


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def start(verbose: int = 0, form: str = "text") -> None:
    """Start the log. A second call changes only the level.

    verbose  1 or more: also log udptun's DEBUG lines
    """
    # No time if the log goes to the journal, which adds the time itself.
    stamp = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter() if form == "json"
        else logging.Formatter(f"{stamp}%(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
