"""The log of a long-running command: to stderr or a file, as text or as one JSON object per line.

Owns the two formats, the largest size of the file, and the level of each logger: udptun's own
loggers log from INFO on, all other loggers from WARNING on, because some libraries log every
request at INFO. Messages contain text that others have chosen, so both formats escape unprintable
characters and cut long lines. Threading: call from the main thread, at the start.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from ..files import DISK_ERRORS, make_directory, open_log
from ..text import printable

log = logging.getLogger("udptun")

FILE_MAX = 4 << 20  # bytes
MESSAGE_MAX = 4000  # characters


class TextFormatter(logging.Formatter):
    """One line per record. The lines of a traceback follow, indented, so that no message can look
    like another record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message, MESSAGE_MAX)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "  " + _printable_lines(super().formatException(ei), "\n  ")


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage(), MESSAGE_MAX),
        }
        if record.exc_info:
            text = self.formatException(record.exc_info)
            entry["exception"] = _printable_lines(text, "\n")
        return json.dumps(entry, ensure_ascii=False)


def _printable_lines(text: str, separator: str) -> str:
    return separator.join(printable(line, MESSAGE_MAX) for line in text.split("\n"))


class _BoundedFile(RotatingFileHandler):
    """A log file that is renamed to FILE.1 at FILE_MAX bytes. At most these two files exist.

    If another program has removed or renamed the file, the next line goes to a new one. stdout and
    stderr are redirected to the file, so the file also gets the message of a crash.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=FILE_MAX, backupCount=1)
        self._take_output()

    def _open(self) -> TextIOWrapper:
        try:
            handle = open_log(Path(self.baseFilename))
        except OSError as exc:
            if exc.errno not in DISK_ERRORS:
                raise
            handle = os.dup(2)  # the former file, or stderr; each line tries the new file again
        return os.fdopen(handle, "a", encoding=self.encoding)

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # then the line goes to the old file
            self._follow_path()
        super().emit(record)

    def _follow_path(self) -> None:
        path = Path(self.baseFilename)
        if self.stream is None:  # the renaming of a full file has failed
            self.stream = self._open()
        if path.exists() and path.stat().st_ino == os.fstat(self.stream.fileno()).st_ino:
            return
        make_directory(path.parent)
        former, self.stream = self.stream, self._open()
        former.close()
        self._take_output()

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        # A pipe has no size: the log goes to stderr because the file could not be opened.
        return (self.stream is None or self.stream.seekable()) and \
            bool(super().shouldRollover(record))

    def doRollover(self) -> None:
        super().doRollover()
        self._take_output()

    def _take_output(self) -> None:
        assert self.stream is not None
        for fd in (1, 2):
            os.dup2(self.stream.fileno(), fd)


def _is_journal() -> bool:
    """Return whether stderr is the connection to the journal that systemd has made.

    That JOURNAL_STREAM is set does not show this: a process with another stderr may have
    inherited the variable.
    """
    found = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def is_json() -> bool:
    """Return whether the log has started and has the format JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.root.handlers)


def start(verbose: int = 0, form: str = "text", file: Path | None = None) -> None:
    """Start the log. A second call changes the level. With ``file``, it also moves the log there.

    verbose  1 or more: also log udptun's DEBUG lines
    file     log to this file instead of stderr. Raises OSError.
    """
    handler = logging.StreamHandler(sys.stderr) if file is None else _BoundedFile(file)
    # No time if the log goes to the journal, which adds the time itself.
    stamp = "" if file is None and _is_journal() else "%(asctime)s "
    handler.setFormatter(
        JsonFormatter() if form == "json"
        else TextFormatter(f"{stamp}%(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=file is not None)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
