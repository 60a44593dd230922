"""The raw results of a run: one JSON line per slot, block and event, written immediately.

Owns: bench/out/<time>-<command>/lines.jsonl and its format. Independent of the meaning of the
values. Main thread only. Each line has a ``kind``:

    run        the command and the machine
    resume     the run goes on: the machine
    contender  one contender that was set up: inner MTU, nft expression, details
    offloads   the offloads of the wire on one profile, as ethtool reports them
    slot       one measurement of one contender: values and facts. If the measurement was refused,
               ``refused`` is the reason, and there are no values
    block      the end of a block; ``rejected`` is the reason, or null if the block is accepted
    note       a remark for the reader of the report
    end        the way the run ended: "complete", "out of time", "interrupted" or "failed"

An interrupted run keeps all lines that were written before the interruption. A report can be
written from these lines, and the run can go on (``python -m bench resume``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

OUT = Path(__file__).resolve().parent / "out"
LINES = "lines.jsonl"

Line = dict[str, Any]


def new_folder(label: str) -> Path:
    """Create a folder for the results of a run that starts now."""
    folder = OUT / f"{time.strftime('%Y%m%d-%H%M%S')}-{label}"
    folder.mkdir(parents=True)
    return folder


class Recorder:
    """Writes the lines of one run. Each line is flushed, so that Ctrl-C loses no line.

    resume  keep the lines that the folder has, and write behind them
    """

    def __init__(self, folder: Path, resume: bool = False) -> None:
        self.folder = folder
        self.lines: list[Line] = read(folder) if resume else []
        self._out: TextIO = (folder / LINES).open("a" if resume else "w")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._out.close()

    def write(self, kind: str, **fields: Any) -> Line:
        line = {"kind": kind, "at": round(time.time(), 3), **fields}
        self.lines.append(line)
        print(json.dumps(line, default=str), file=self._out, flush=True)
        return line

    def note(self, text: str) -> None:
        """Write a note, unless the same note was written before."""
        if text not in (line.get("text") for line in self.lines if line["kind"] == "note"):
            self.write("note", text=text)


def read(path: Path) -> list[Line]:
    """Return the lines of a run; ``path`` is the folder of the run, or its lines.jsonl."""
    return list(_parse((path / LINES if path.is_dir() else path).read_text()))


def _parse(text: str) -> Iterator[Line]:
    for number, row in enumerate(text.splitlines(), start=1):
        try:
            line = json.loads(row)
        except ValueError as e:
            raise ValueError(f"line {number} is not JSON: {e}") from None
        if not isinstance(line, dict) or "kind" not in line:
            raise ValueError(f"line {number} has no kind: expected an object with a kind")
        yield line
