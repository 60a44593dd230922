"""Raw results: one JSON line for each slot, block and fact, written as it happens.

Owns bench/out/<stamp>/ and the shape of its lines, which have a ``kind``:

    run      what was asked for, and the machine
    slot     one measurement of one contender: values, facts, or why there are none
    block    the end of a block; ``rejected`` says what spoiled it, else null
    note     something the reader of the report should know
    end      how it ended: "complete", "out of time", "interrupted"

A run that was cut short has all lines up to there, and a report can be made of it.
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
    folder = OUT / f"{time.strftime('%Y%m%d-%H%M%S')}-{label}"
    folder.mkdir(parents=True)
    return folder


class Recorder:
    """Writes the lines of one run, each flushed: Ctrl-C loses none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[Line] = []
        self._out: TextIO = (folder / LINES).open("w")

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
        if text not in (line.get("text") for line in self.lines if line["kind"] == "note"):
            self.write("note", text=text)


def read(path: Path) -> list[Line]:
    """The lines of a run, from its folder or the file itself."""
    return list(_parse((path / LINES if path.is_dir() else path).read_text()))


def _parse(text: str) -> Iterator[Line]:
    for number, row in enumerate(text.splitlines(), start=1):
        try:
            line = json.loads(row)
        except ValueError as e:
            raise ValueError(f"line {number} is not JSON: {e}") from None
        if not isinstance(line, dict) or "kind" not in line:
            raise ValueError(f"line {number} has no kind")
        yield line
