"""The command blocks of the documents, and the marker above each block.

A block of commands has the language ``sh``. The comment above the block says what runs it:

    <!-- run: WORLD, on HOST -->               a test of tests/docs, in this world, on this host
    <!-- run: WORLD, on HOST, background -->   the same; the commands run until the test ends
    <!-- run by: PATH::TEST -->                another test
    <!-- run by: make e2e, step NAME -->       a step of the whole cluster
    <!-- checked by: PATH::TEST -->            nothing; the test does what the commands do
    <!-- not run: REASON -->                   nothing

Blocks of one page and world run in the order of the page.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "bench" / "README.md", *sorted((ROOT / "deploy").rglob("*.md")),
         *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"<!-- (run|run by|checked by|not run): (.+?) -->\s*\Z")
# A block without a language has commands if it begins with one, or with a comment of a shell.
COMMAND = re.compile(
    r"# |for \w+ in |[A-Z_]+=\S+ |(?:\.venv/bin/|/opt/\S*/)?(?:udptun|make|curl|systemctl|kubectl|"
    r"helm|apt-get|python3?|sh|ip|install|pip|setpriv|ctr|git|nft|iptables|sysctl|docker|cd) ")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    kind: str  # run, run by, checked by, not run; "" without a marker
    marker: str

    @property
    def is_command(self) -> bool:
        return self.language in ("sh", "console") or (
            not self.language and COMMAND.match(self.text) is not None)

    @property
    def words(self) -> list[str]:
        return [word.strip() for word in self.marker.split(",")]

    @property
    def world(self) -> str:
        return self.words[0]

    @property
    def host(self) -> str:
        return self.words[1].removeprefix("on ")

    @property
    def in_background(self) -> bool:
        return self.words[-1] == "background"

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in FENCE.finditer(text):
        marker = MARKER.search(text[max(0, found.start() - 300) : found.start()])
        kind, words = marker.groups() if marker else ("", "")
        indent = len(found["indent"])
        lines = "".join(line[indent:] for line in found["text"].splitlines(keepends=True))
        line = text.count("\n", 0, found.start()) + 1
        yield Block(str(page.relative_to(ROOT)), line, found["language"], lines, kind, words)


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.is_command]


def functions_of(path: Path) -> set[str]:
    """Return the names of the functions in a file of tests."""
    return {node.name for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
