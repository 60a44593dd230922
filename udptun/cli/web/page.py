"""The page of ``udptun web``: its sections, the table of peers, the order and the choice of rows.

The page is complete without JavaScript: the buttons of the table and the filter are a form, and the
server sorts. The script only loads the page again and replaces the parts with the attribute
``data-live``. Pure functions: any thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from ..._version import __version__
from ...drops import DROP_REASONS
from ...errors import FieldError
from ...spans import milliseconds, size, span
from ...text import counted
from .. import express
from ..mesh import STATES, Row, why, words
from ..node_status import age, trouble
from ..samples import UNKNOWN, Pair, host_name, total
from ..top.cells import amount, count
from .markup import Element, element, html
from .picture import anchor, kind_of, legend, shape_of, spots, star, tree
from .watch import View

E = element

ROWS_MAX = 1000
# key, title, whether a narrow screen hides the column, whether it has numbers
COLUMNS = (
    ("name", "Peer", False, False), ("state", "State", False, False), ("for", "For", True, True),
    ("path", "Path", False, False), ("rtt", "Round trip", False, True),
    ("loss", "Loss", True, True), ("out", "Out/s", False, True), ("in", "In/s", False, True),
    ("sent", "Sent", True, True), ("received", "Received", True, True),
    ("mtu", "Largest packet", True, True), ("seen", "Seen", True, True),
    ("subnets", "Subnets", True, False), ("reason", "Reason", False, False),
)
SORTABLE = ("name", "state", "path", "rtt", "loss", "out", "in", "sent", "received")
ASCENDING = ("name", "path", "state")  # state: the worst first
MEANINGS = {reason.name: reason.meaning for reason in DROP_REASONS}


class Choice:
    """The order and the choice of the rows.

    sort     a column; after ``-``, in reverse order
    column   the column without ``-``
    reverse  whether it is in reverse order
    """

    def __init__(self, sort: str = "name", wanted: str = "", state: str = "") -> None:
        self.sort, self.wanted, self.state = sort, wanted, state
        self.column, self.reverse = sort.removeprefix("-"), sort.startswith("-")

    @classmethod
    def parse(cls, query: Mapping[str, str]) -> Choice:
        """Raises FieldError. The last value of a field counts: that of the pressed button."""
        values = {name: value for name, value in query.items() if value}
        unknown = values.keys() - {"sort", "q", "state"}
        if unknown:
            raise FieldError("query", min(unknown), "sort, q and state")
        choice = cls(values.get("sort", "name"), values.get("q", ""), values.get("state", ""))
        if choice.column not in SORTABLE:
            raise FieldError("sort", choice.sort, f"one of {', '.join(SORTABLE)}, or - and one")
        if choice.state not in ("", *STATES):
            raise FieldError("state", choice.state, f"one of {', '.join(STATES)}")
        return choice

    def rows(self, rows: list[Row], rates: Mapping[str, Pair]) -> list[Row]:
        """Return the chosen ones of the rows, which are sorted by name, in the chosen order."""
        wanted = self.wanted.lower()
        kept = [row for row in rows if self.state in ("", row["state"]) and wanted in words(row)]
        if self.column == "name":
            return kept[::-1] if self.reverse else kept
        values = [(row, _value(row, rates, self.column)) for row in kept]
        known = [pair for pair in values if pair[1] is not None]
        known.sort(key=lambda pair: pair[1], reverse=self.reverse == (self.column in ASCENDING))
        return [row for row, _ in [*known, *(pair for pair in values if pair[1] is None)]]


def _value(row: Row, rates: Mapping[str, Pair], column: str) -> Any:
    out, into = rates.get(row["name"], UNKNOWN)
    return {
        "state": STATES.index(row["state"]), "path": row["path"], "rtt": row["rtt_us"],
        "loss": row["loss"], "out": out, "in": into, "sent": row["sent"] and row["sent"]["bytes"],
        "received": row["received"] and row["received"]["bytes"],
    }[column]


def page(view: View, choice: Choice) -> bytes:
    host = host_name(view.sample)
    moment = _moment(view.wall)
    head = E(
        "head", E("meta", charset="utf-8"), E("title", f"udptun on {host}"),
        E("meta", name="viewport", content="width=device-width, initial-scale=1"),
        E("meta", name="color-scheme", content="light dark"),
        E("link", rel="icon", href="/icon.svg"), E("link", rel="stylesheet", href="/page.css"),
        E("script", src="/page.js", defer=True))
    header = E(
        "header", E("h1", f"udptun on {host}"),
        E("p", f"As seen from {host}: this page shows only what this node has measured. Other "
               "nodes may measure something else."),
        E("div", E("p", "State of ", E("time", moment, id="moment", data_live=True)),
          E("button", "Pause", id="pause", type="button", hidden=True),
          E("p", id="note", role="status"), class_="bar"),
        E("noscript", E("p", f"JavaScript is off, so this is the state of {moment}. Load the page "
                             "again to see the present one.")))
    main = E("main", *_sections(view, choice, host))
    footer = E("footer", E("p", f"udptun {__version__}. This page cannot change anything."))
    body = E("body", E("a", "Skip to the peers", href="#peers", class_="skip"), header, main,
             footer)
    return html(E("html", head, body, lang="en"))


def _sections(view: View, choice: Choice, host: str) -> Iterator[Element]:
    yield E("section", E("h2", "State"), *_summary(view), id="summary", data_live=True)
    sample, change = view.sample, view.change
    rates = {} if change is None else change.peers
    rows = [] if sample is None else sample.rows
    shown = spots(rows, rates)
    yield E("section", E("h2", "Paths"), *(
        [E("figure", star(host, shown), tree(host, shown), legend())] if shown else
        [E("p", "no peers")]), id="mesh", data_live=True)
    yield _peers(choice, rows, rates)
    yield E("section", E("h2", "Drops"), *_drops(view), id="drops", data_live=True)
    yield E("section", E("h2", "Events"), *_events(view), id="events", data_live=True)


# State


def _summary(view: View) -> Iterator[Element]:
    if view.sample is None:
        yield E("p", view.trouble, class_="problem")
        return
    problems = [*_problems(view)]
    if problems:
        yield E("ul", *problems, class_="problem")
    yield E("dl", *(E("div", E("dt", name), E("dd", value)) for name, value in _facts(view)))


def _problems(view: View) -> Iterator[Element]:
    assert view.sample is not None
    node = view.sample.node
    if node is None:
        yield E("li", "the node daemon does not answer: peers have no names")
    else:
        if not node["ready"]:
            yield E("li", "the node is not ready" + (
                f": {node['waiting']}" if node["waiting"] else ""))
        for check in node["checks"]:
            if check["name"] == "peers" and check["state"] != "ok":
                yield E("li", f"{check['state']}: peers: {check['text'][0]}; see ",
                        E("a", "the table of peers", href="#peers"))
        for one in trouble(node):
            if one.check != "peers":
                yield E("li", f"{one.state}: {one.check}: {one.text}",
                        *([E("ul", E("li", one.remedy))] if one.remedy else []))
    if view.sample.forwarder is None:
        yield E("li", "no forwarder answers: nothing is known about UDP")


def _facts(view: View) -> Iterator[tuple[str, str]]:
    sample, change = view.sample, view.change
    assert sample is not None and change is not None
    states = [(state, sum(row["state"] == state for row in sample.rows)) for state in STATES]
    yield "Peers", ", ".join(f"{n} {state}" for state, n in states[::-1] if n) or "none"
    if sample.node is not None:
        yield "Subnets", " ".join(sample.node["subnets"]) or "no lease"
    if sample.forwarder is not None:
        (out, into), packets = change.total, change.packets
        yield "UDP out", f"{amount(out)}/s, {count(packets[0])} packets/s"
        yield "UDP in", f"{amount(into)}/s, {count(packets[1])} packets/s"
        yield "CPU of workers", " ".join(
            "-" if share is None else f"{share:.0%}" for share in change.cpu) or "-"
        yield "Packets per call", "sent {}, received {}".format(*(
            "-" if n is None else f"{n:.1f}" for n in change.batch))
        yield "Express path", express.rates(sample.forwarder, change.kernel, packets)
        yield "Drops", f"{count(total(change.drops.values()))}/s"
    for device, (out, into) in change.vxlan.items():
        yield f"VXLAN {device}", f"out {amount(out)}/s, in {amount(into)}/s, all peers together"


# Peers


def _peers(choice: Choice, rows: list[Row], rates: Mapping[str, Pair]) -> Element:
    kept = choice.rows(rows, rates)
    form = E(
        "form", E("input", type="hidden", name="sort", value=choice.sort, id="sort"),
        E("label", "Filter ", E("input", type="search", name="q", value=choice.wanted, id="filter",
                                maxlength=100, autocomplete="off")),
        E("label", "State ", E("select", E("option", "all", value=""), *(
            E("option", state, value=state, selected=state == choice.state)
            for state in STATES), name="state", id="state")),
        E("button", "Show"), id="choice", method="get", action="/")
    number = f"{len(kept)} of {len(rows)} peers" if len(kept) != len(rows) else \
        counted(len(rows), "peer")
    if len(kept) > ROWS_MAX:
        number += f"; the first {ROWS_MAX} are shown"
    table = E(
        "table", E("thead", E("tr", *(_heading(choice, *column) for column in COLUMNS)), id="heads",
          data_live=True),
        E("tbody", *(_row(row, rates) for row in kept[:ROWS_MAX]), id="rows", data_live=True))
    return E("section", E("h2", "Peers"), form, E("p", number, id="counted", data_live=True),
             E("p", "Rates count UDP payload, without packets that VXLAN carries. - is a value "
                    "that was not measured.", class_="quiet"),
             E("div", table, class_="scroll", tabindex="0", role="region",
               aria_label="table of peers"), id="peers", tabindex="-1")


def _heading(choice: Choice, key: str, title: str, hidden: bool, number: bool) -> Element:
    kind = _kind(hidden, number)
    if key not in SORTABLE:
        return E("th", title, scope="col", class_=kind)
    is_sorted = choice.column == key
    ascending = (key in ASCENDING) != choice.reverse
    order = None if not is_sorted else "ascending" if ascending else "descending"
    arrow = {"ascending": " ▲", "descending": " ▼", None: ""}[order]
    button = E("button", title, E("span", arrow, aria_hidden="true"), name="sort",
               value=f"-{key}" if is_sorted and not choice.reverse else key, form="choice",
               id=f"sort-{key}")
    return E("th", button, scope="col", aria_sort=order, class_=kind)


def _kind(hidden: bool, number: bool) -> str | None:
    return " ".join(filter(None, ("more" if hidden else "", "number" if number else ""))) or None


def _row(row: Row, rates: Mapping[str, Pair]) -> Element:
    out, into = rates.get(row["name"], UNKNOWN)
    seen = row["last_seen_seconds"]
    cells: dict[str, object] = {
        "for": row["since"] and age(row["since"]), "path": row["path"],
        "rtt": None if row["rtt_us"] is None else milliseconds(row["rtt_us"]),
        "loss": None if row["loss"] is None else f"{row['loss']:.0%}",
        "out": amount(out), "in": amount(into),
        **{side: row[side] and size(row[side]["bytes"]) for side in ("sent", "received")},
        "mtu": row["largest_size"], "seen": None if seen is None else f"{span(seen)} ago",
        "subnets": " ".join(row["subnets"]) or None,
        "reason": "; ".join(filter(None, (why(row), _error(row)))) or None,
    }
    state = E("td", E("span", class_=f"mark {shape_of(row['state'])}", aria_hidden="true"),
              row["state"], class_=f"state {kind_of(row['state'])}")
    return E("tr", E("th", E("span", row["name"], class_="peer"), scope="row"), state, *(
        E("td", "-" if cells[key] is None else str(cells[key]),
          class_="text" if key == "reason" else _kind(hidden, number))
        for key, _, hidden, number in COLUMNS[2:]), id=anchor(row["name"]))


def _error(row: Row) -> str | None:
    error = row["last_error"]
    return error and f"last error {error['errno']}, {span(error['seconds_ago'])} ago"


# Drops and events


def _drops(view: View) -> Iterator[Element]:
    sample, change = view.sample, view.change
    if sample is None or change is None or sample.forwarder is None:
        yield E("p", "no forwarder answers")
        return
    rows = [drop for drop in sample.drops if drop["packets"]]
    if not rows:
        yield E("p", "no packet was dropped")
        return

    def rate(drop: Mapping[str, Any]) -> float:
        return change.drops.get((drop["reason"], drop["direction"])) or 0.0

    rows.sort(key=lambda drop: (-rate(drop), -drop["packets"]))
    yield E("div", E(
        "table", E("thead", E("tr", *(E("th", title, scope="col", class_=kind) for title, kind in (
            ("Reason", None), ("Direction", None), ("Packets/s", "number"), ("Packets", "number"),
            ("Meaning", None))))),
        E("tbody", *(E(
            "tr", E("th", drop["reason"], scope="row"), E("td", drop["direction"]),
            E("td", count(change.drops.get((drop["reason"], drop["direction"]))), class_="number"),
            E("td", drop["packets"], class_="number"),
            E("td", MEANINGS.get(drop["reason"], ""), class_="text")) for drop in rows))),
        class_="scroll", tabindex="0", role="region", aria_label="table of drops")


def _events(view: View) -> Iterator[Element]:
    if not view.events:
        yield E("p", "no events")
        return
    yield E("ol", *(E("li", E("time", event.time), " ", E("b", event.kind), f" {event.text}")
                    for event in view.events))


def _moment(wall: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(wall))


