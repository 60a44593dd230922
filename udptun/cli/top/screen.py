"""The picture that ``udptun top`` draws: lines of text, and what the keys change.

Owns the layout, the order and the choice of the peers. Does not depend on the terminal: ``lines``
returns text for a given size. Every text of another host is escaped and cut. Threading: one thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from typing import Any

from ...spans import milliseconds, span
from ...text import counted, printable
from .. import express
from ..mesh import STATES, Row, why, words
from ..node_status import age, problems
from ..samples import UNKNOWN, History, Pair, host_name
from .cells import ASCII_BARS, BARS, amount, bars, count, fit, width

SORT = ("name", "state", "out", "in", "rtt", "loss")
DIRECTIONS = ("both", "out", "in")
NOTICE_SECONDS = 60.0  # how long the notice about another forwarder process is shown
LEAST_SPARK, MOST_SPARK = 10, 60
LEAST_NAME, LEAST_REASON = 8, 24
GAP = 1
NAME_SHARE = 4  # names may use 1/4 of the width before other columns are chosen
HEAD_SHARE = 3  # the part above the table has at most 1/3 of the lines
RESET, BOLD, DIM, REVERSE = "\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[7m"
HEADING = "\x1b[1;4m"  # bold, underlined
COLOURS = {
    "no path": "\x1b[31m", "refused": "\x1b[31m", "unreachable": "\x1b[31m",
    "limited": "\x1b[33m", "unknown": "\x1b[33m",
}
HELP = (
    "q               quit",
    "up down, PgUp PgDn, Home End   select a peer; a line below has its details",
    "s S, right left order by the next, by the previous column; r reverses it",
    "/               show only peers with a text in name, state, subnet or endpoint",
    "Escape          show all peers again",
    "d               direction: both, out, in",
    "p               pause: the picture stays, and the measurement continues",
    "? h             this page; any key closes it",
    "",
    "OUT/S, IN/S: bytes of UDP payload per second, without packets of VXLAN.",
    "LAST MINUTE: rate in the shown directions. Each peer has its own scale.",
    "packets per call: packets that one system call sends or receives.",
    "-: not measured.",
)


class Column:
    """A column of the table of peers: its title, its width in terminal cells, its alignment."""

    def __init__(self, title: str, cells: int, right: bool = False) -> None:
        self.title, self.cells, self.right = title, cells, right


# In the order of the screen.
COLUMNS = (
    Column("PEER", LEAST_NAME), Column("STATE", 11), Column("FOR", 6, True), Column("PATH", 5),
    Column("RTT", 8, True), Column("LOSS", 4, True), Column("OUT/S", 8, True),
    Column("IN/S", 8, True), Column("SENT", 8, True), Column("RECEIVED", 8, True),
    Column("LAST MINUTE", LEAST_SPARK + 1), Column("REASON", LEAST_REASON),
)
# If there is not enough room, the last ones are left out.
IMPORTANT = ("PEER", "OUT/S", "IN/S", "STATE", "LAST MINUTE", "RTT", "PATH", "LOSS", "REASON",
             "FOR", "SENT", "RECEIVED")
SORTED_BY = {"name": "PEER", "state": "STATE", "out": "OUT/S", "in": "IN/S", "rtt": "RTT",
             "loss": "LOSS"}


class Screen:
    """What is shown, and in which order.

    styled   False: no bold and no reversed text
    colour   False: no colours
    utf8     False: only ASCII
    """

    def __init__(
        self, history: History, interval: float, sort: str = "out", direction: str = "both",
        wanted: str = "", styled: bool = True, colour: bool = True, utf8: bool = True,
    ) -> None:
        self.interval, self.styled, self.utf8 = interval, styled, utf8
        self.colour = colour and styled
        self.sort, self.direction, self.filter = sort, direction, wanted
        self.reverse = self.help = self.typing = False
        self.paused_at: float | None = None
        self.trouble = ""  # why there is no sample
        self._notice, self._notice_at = "", -math.inf
        self._pid: int | None = None
        self._live = self._shown = history
        self._selected: str | None = None
        self._first = 0  # the first row on the screen
        self._page = 1  # rows on the screen

    # What has happened

    def updated(self, trouble: str = "") -> None:
        """Use the new sample of the history. ``trouble``: the reason why there is no new one."""
        self.trouble = trouble
        sample = self._live.sample
        pid = None if sample is None else sample.pid
        if pid is not None and self._pid is not None and pid != self._pid:
            self._notice = f"the forwarder was replaced by another process at " \
                f"{_clock(time.time())}: {self._pid} -> {pid}"
            self._notice_at = time.monotonic()
        if pid is None and self._pid is not None and not trouble and sample is not None:
            self.trouble = "the forwarder does not answer; trying again"
        self._pid = pid if pid is not None else self._pid

    def press(self, key: str) -> bool:
        """Return False if the program shall end."""
        if self.typing:
            self._type(key)
        elif self.help:
            self.help = False
        elif key == "q":
            return False
        else:
            self._command(key)
        return True

    def _type(self, key: str) -> None:
        if key == "enter":
            self.typing = False
        elif key == "escape":
            self.typing, self.filter = False, ""
        elif key == "backspace":
            self.filter = self.filter[:-1]
        elif len(key) == 1:
            self.filter += key
        self._first = 0

    def _command(self, key: str) -> None:
        if key in ("?", "h"):
            self.help = True
        elif key in ("s", "right", "S", "left"):
            step = 1 if key in ("s", "right") else -1
            self.sort, self.reverse = _after(SORT, self.sort, step), False
        elif key == "r":
            self.reverse = not self.reverse
        elif key == "d":
            self.direction = _after(DIRECTIONS, self.direction, 1)
        elif key == "/":
            self.typing, self.filter = True, ""
        elif key == "escape":
            self.filter = ""
        elif key in ("p", " "):
            self._pause()
        else:
            self._move(key)

    def _pause(self) -> None:
        if self.paused_at is None:
            self.paused_at, self._shown = time.time(), self._live.copy()
        else:
            self.paused_at, self._shown = None, self._live

    def _move(self, key: str) -> None:
        step = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -self._page,
                "page down": self._page, "home": -math.inf, "end": math.inf}.get(key)
        names = [row["name"] for row in self.rows()]
        if step is None or not names:
            return
        at = names.index(self._selected) if self._selected in names else 0
        self._selected = names[int(min(max(at + step, 0), len(names) - 1))]

    # The picture

    def rows(self) -> list[Row]:
        """Return the peers in the chosen order. The sample has them sorted by name already."""
        sample = self._shown.sample
        wanted = self.filter.lower()
        rows = [row for row in ([] if sample is None else sample.rows) if wanted in words(row)]
        if self.reverse:
            rows.reverse()
        return rows if self.sort == "name" else sorted(rows, key=self._key)

    def _key(self, row: Row) -> float:
        """Return a number; the smallest is the first. Unknown values are the last."""
        out, into = self._rates(row)
        value = {"state": -STATES.index(row["state"]), "out": out, "in": into,
                 "rtt": row["rtt_us"], "loss": row["loss"]}[self.sort]
        return math.inf if value is None else value if self.reverse else -value

    def _rates(self, row: Row) -> Pair:
        change = self._shown.change
        return UNKNOWN if change is None else change.peers.get(row["name"], UNKNOWN)

    def lines(self, columns: int, lines: int) -> list[str]:
        """Return exactly ``lines`` lines, of at most ``columns`` cells."""
        if self.help:
            shown = [self._bold(fit("udptun top: keys", columns)),
                     *(fit(line, columns) for line in HELP)]
            return self._filled(shown, columns, lines)
        head = [*self._head(columns)][: max(lines // HEAD_SHARE, 1)]
        self._page = max(lines - len(head) - 3, 1)
        rows = self.rows()
        at = self._scroll(rows)
        table = [*self._table(rows[self._first : self._first + self._page], columns, at)]
        return self._filled([*head, *table], columns, lines, self._detail(rows, at, columns))

    def all_lines(self, columns: int) -> Iterator[str]:
        """Yield the lines for ``--once``: all peers, without the selection and the bar of keys."""
        yield from (line.rstrip() for line in self._head(columns))
        yield from (line.rstrip() for line in self._table(self.rows(), columns, -1))

    def _filled(
        self, shown: list[str], columns: int, lines: int, detail: str = ""
    ) -> list[str]:
        last = [detail] if detail else []
        shown = shown[: lines - 1 - len(last)]
        return [*shown, *[""] * (lines - 1 - len(last) - len(shown)), *last, self._bar(columns)]

    def _scroll(self, rows: list[Row]) -> int:
        """Move the window so that it contains the selected row. Return the index of this row."""
        if self._selected is None:
            self._first = 0
            return 0
        names = [row["name"] for row in rows]
        # A peer that is gone: the row at the top of the window takes its place.
        at = names.index(self._selected) if self._selected in names else \
            min(self._first, max(len(rows) - 1, 0))
        self._first = max(min(self._first, at, len(rows) - self._page), at - self._page + 1, 0)
        return at

    def _head(self, columns: int) -> Iterator[str]:
        """Yield the lines above the table."""
        sample, change = self._shown.sample, self._shown.change
        title = f"udptun top  {host_name(sample)}"
        now = _clock(time.time() if sample is None else sample.wall)
        if self.paused_at is not None:
            now = f"PAUSED at {_clock(self.paused_at)}"
        elif sample is not None:
            now += f"  every {self.interval:g} s"
        yield self._bold(_ends(title, now, columns))
        if time.monotonic() - self._notice_at < NOTICE_SECONDS:
            yield self._coloured(fit(self._notice, columns), "limited")
        if self.trouble:
            yield self._coloured(fit(self.trouble, columns), "unreachable")
        if sample is None:
            return
        if sample.node is not None:  # the table shows the peers
            yield from (fit(line, columns) for line in problems(sample.node, omitted=("peers",)))
        yield fit(_states(sample.rows), columns)
        if change is None or sample.forwarder is None:
            if sample.forwarder is None and not self.trouble:
                yield fit("no forwarder on this host: nothing is known about UDP", columns)
        else:
            out, into = change.total
            packets = change.packets
            yield fit(f"UDP out {amount(out)}/s {count(packets[0])} packets/s, "
                      f"in {amount(into)}/s {count(packets[1])} packets/s", columns)
            yield fit(_drops(sample.drops, change.drops), columns)
            yield fit(_workers(change.cpu, change.batch), columns)
            if express.is_wanted(sample.forwarder):
                yield fit(f"{express.LABEL} " + express.rates(
                    sample.forwarder, change.kernel, packets), columns)
        for device, (out, into) in ({} if change is None else change.vxlan).items():
            yield fit(f"VXLAN {device} out {amount(out)}/s, in {amount(into)}/s, all peers "
                      "together", columns)

    def _table(self, rows: list[Row], columns: int, at: int) -> Iterator[str]:
        layout = self._layout(rows, columns)
        titles = (fit(self._title(column), column.cells, column.right) for column in layout)
        yield self._heading(fit((" " * GAP).join(titles), columns))
        if not rows:
            sample = self._shown.sample
            if sample is not None:
                yield "no peer matches the filter" if sample.rows else "no peers"
        for i, row in enumerate(rows, self._first):
            cells = (" " * GAP).join(self._cells(row, layout))
            yield self._coloured(self._reversed(cells) if i == at else cells, row["state"])

    def _title(self, column: Column) -> str:
        if SORTED_BY[self.sort] != column.title:
            return column.title
        return column.title + ("^" if self.reverse else "*")

    def _layout(self, rows: list[Row], columns: int) -> list[Column]:
        """Return the columns that fit, with their widths."""
        hidden = {"out": "IN/S", "in": "OUT/S"}.get(self.direction)
        empty = None if any(map(why, rows)) else "REASON"
        by_title = {column.title: copy(column) for column in COLUMNS}
        longest = max((width(printable(row["name"])) for row in rows), default=0)
        name = by_title["PEER"]
        name.cells = max(min(longest, columns // NAME_SHARE), name.cells)
        chosen: set[str] = set()
        left = columns + GAP
        for title in IMPORTANT:
            if title in (hidden, empty):
                continue
            if by_title[title].cells + GAP > left:
                break
            chosen.add(title)
            left -= by_title[title].cells + GAP
        texts = max((len(why(row)) for row in rows), default=0)
        for title, most in (("REASON", texts), ("PEER", longest), ("LAST MINUTE", MOST_SPARK)):
            if title in chosen:
                more = min(max(most - by_title[title].cells, 0), left)
                by_title[title].cells += more
                left -= more
        return [column for title, column in by_title.items() if title in chosen]

    def _cells(self, row: Row, layout: Iterable[Column]) -> Iterator[str]:
        out, into = self._rates(row)
        sent, received = (row[side] and amount(row[side]["bytes"]) for side in ("sent", "received"))
        values = {
            "PEER": row["name"], "STATE": row["state"], "FOR": row["since"] and age(row["since"]),
            "PATH": row["path"],
            "RTT": None if row["rtt_us"] is None else milliseconds(row["rtt_us"]),
            "LOSS": None if row["loss"] is None else f"{row['loss']:.0%}",
            "OUT/S": amount(out), "IN/S": amount(into), "SENT": sent, "RECEIVED": received,
            "REASON": why(row),
        }
        for column in layout:
            if column.title == "LAST MINUTE":
                yield bars(self._minute(row), self._live.length, column.cells,
                           BARS if self.utf8 else ASCII_BARS)
            else:
                yield fit(values[column.title], column.cells, column.right)

    def _minute(self, row: Row) -> list[float | None]:
        kept = self._shown.peers.get(row["name"], ())
        if self.direction == "both":
            return [None if pair == UNKNOWN else sum(one or 0.0 for one in pair) for pair in kept]
        return [pair[DIRECTIONS.index(self.direction) - 1] for pair in kept]

    def _detail(self, rows: list[Row], at: int, columns: int) -> str:
        """Return what is known about the selected peer, in one line."""
        if not rows:
            return ""
        row = rows[at]
        parts = [f"{row['state']}" + (f" for {age(row['since'])}" if row["since"] else "")]
        if row["reason"]:
            parts[0] += f": {row['reason']}"
        if row["last_error"]:
            error = row["last_error"]
            parts.append(f"{error['errno']} {span(error['seconds_ago'])} ago")
        if row["path"]:
            parts.append(f"by {row['path']}" + (
                f" to {row['endpoint']}" if row["endpoint"] and row["path"] == "udp" else "") + (
                f" ({row['path_reason']})" if row["path_reason"] else ""))
        parts += row["subnets"]
        if row["path_mtu"]:
            parts.append(f"path MTU {row['path_mtu']}")
        return self._dimmed(fit(f"{row['name']}: {', '.join(parts)}", columns))

    def _bar(self, columns: int) -> str:
        if self.typing:
            return fit(f"filter: {self.filter}_   Enter: keep it, Escape: show all", columns)
        chosen = f": {self.filter}" if self.filter else ""
        return self._reversed(fit(
            f"q quit  ? help  / filter{chosen}  s order: {self.sort}  "
            f"d direction: {self.direction}  p pause", columns))

    def _bold(self, text: str) -> str:
        return f"{BOLD}{text}{RESET}" if self.styled else text

    def _heading(self, text: str) -> str:
        return f"{HEADING}{text}{RESET}" if self.styled else text

    def _dimmed(self, text: str) -> str:
        return f"{DIM}{text}{RESET}" if self.colour else text

    def _reversed(self, text: str) -> str:
        return f"{REVERSE}{text}{RESET}" if self.styled else text

    def _coloured(self, text: str, state: str) -> str:
        colour = COLOURS.get(state) if self.colour else None
        return f"{colour}{text}{RESET}" if colour else text


def _after(values: tuple[str, ...], present: str, step: int) -> str:
    return values[(values.index(present) + step) % len(values)]


def _clock(wall: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(wall))


def _ends(left: str, right: str, columns: int) -> str:
    """Return two texts at both ends of a line. The right one is cut last."""
    room = max(columns - width(right) - 1, 0)
    return fit(f"{fit(left, room)} {right}", columns)


def _states(rows: list[Row]) -> str:
    found = [(state, sum(row["state"] == state for row in rows)) for state in STATES]
    listed = ", ".join(f"{n} {state}" for state, n in found if n)
    return counted(len(rows), "peer") + (f": {listed}" if listed else "")


def _workers(cpu: list[float | None], batch: Pair) -> str:
    known = [share for share in cpu if share is not None]
    shares = " ".join("-" if share is None else f"{share:.0%}" for share in cpu) or "-"
    if len(cpu) > 4 and known:
        shares = f"mean {sum(known) / len(known):.0%}, largest {max(known):.0%}"
    workers = counted(len(cpu), "worker") if cpu else "the workers"
    send, receive = ("-" if n is None else f"{n:.1f}" for n in batch)
    return f"CPU of {workers} {shares}   packets per " \
        f"call: sent {send}, received {receive}"


def _drops(drops: list[dict[str, Any]], rates: Mapping[tuple[str, str], float | None]) -> str:
    total = sum(drop["packets"] for drop in drops)
    now = sorted(((rate, key) for key, rate in rates.items() if rate), reverse=True)
    if not total:
        return "drops none"
    text = f"drops {count(sum(rate for rate, _ in now))}/s"
    if now:
        text += ": " + ", ".join(
            f"{reason} {direction} {count(rate)}/s" for rate, (reason, direction) in now)
        return f"{text}; {total} in total"
    worst = sorted(((drop["packets"], drop["reason"]) for drop in drops), reverse=True)[:3]
    return f"{text}; {total} in total: " + ", ".join(f"{reason} {n}" for n, reason in worst if n)
