"""The picture of the mesh: this node, its peers, and the paths between them, as SVG.

There are two pictures with the same content: a star for wide screens, a tree for narrow ones. A
state has a shape and a word, not only a colour. If there are many peers, the ones in a bad state
and the busiest have a place of their own, and the others form one group for each path. Pure
functions: any thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import sha256

from ...spans import milliseconds
from ...text import counted, printable
from ..mesh import STATES, Row, natural
from ..samples import UNKNOWN, Pair
from .markup import Element, element

MOST = 14  # peers; with more, OWN of them have a place of their own
OWN = 8
GROUPS_MAX = 6  # with more, the groups are not divided by path
NAME_LEN = 20
STAR = (960, 460)
RADIUS = (230, 185)
TREE_WIDTH, TREE_STEP = 340, 46
SIZE = 11  # half the height of a shape
KINDS = {"no path": "bad", "refused": "bad", "unreachable": "bad", "limited": "limited",
         "reachable": "good"}  # all others: unknown
SHAPE_OF = {"bad": "square", "limited": "triangle", "good": "circle", "unknown": "diamond"}
SHAPES = {  # the outline of each state, around (0, 0), for a size of 1
    "square": "M-1,-1H1V1H-1Z M-.5,-.5L.5,.5 M-.5,.5L.5,-.5",
    "triangle": "M0,-1.1L1.1,.9H-1.1Z",
    "diamond": "M0,-1.2L1.2,0L0,1.2L-1.2,0Z",
    "circle": "M-1,0A1,1 0 0 1 1,0A1,1 0 0 1 -1,0Z",
    "group": "M-1.6,-1H1.6V1H-1.6Z",
}


class Spot:
    """One thing in the picture: a peer, or several peers that are counted together.

    kind   the class for the style: bad, limited, unknown, good
    """

    def __init__(
        self, title: str, text: str, shape: str, kind: str, path: str | None, link: str | None
    ) -> None:
        self.title, self.text, self.shape, self.kind = title, text, shape, kind
        self.path, self.link = path, link


def anchor(name: str) -> str:
    """Return the ID of the row of a peer. Names can have characters that an ID may not have."""
    return "peer-" + sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def kind_of(state: str) -> str:
    return KINDS.get(state, "unknown")


def shape_of(state: str) -> str:
    return SHAPE_OF[kind_of(state)]


def spots(rows: Sequence[Row], rates: Mapping[str, Pair]) -> list[Spot]:
    """Return what the picture shows, in the order of the names; groups are the last."""
    def rank(row: Row) -> tuple[int, float]:
        busy = sum(one or 0.0 for one in rates.get(row["name"], UNKNOWN))
        return STATES.index(row["state"]), -busy

    ranked = sorted(rows, key=rank)
    own = ranked if len(ranked) <= MOST else ranked[:OWN]
    rest = ranked[len(own) :]
    divided = len({(row["state"], row["path"]) for row in rest}) <= GROUPS_MAX
    groups: dict[tuple[str, str | None], list[Row]] = {}
    for row in rest:
        groups.setdefault((row["state"], row["path"] if divided else None), []).append(row)
    return [*(_peer(row) for row in sorted(own, key=lambda row: natural(row["name"]))),
            *(_group(*key, members) for key, members in groups.items())]


def _peer(row: Row) -> Spot:
    facts = [row["path"] or "no path"]
    if row["state"] != "reachable":
        facts.insert(0, row["state"])
    if row["rtt_us"] is not None:
        facts.append(milliseconds(row["rtt_us"]))
    if row["loss"]:
        facts.append(f"loss {row['loss']:.0%}")
    return Spot(_cut(row["name"]), ", ".join(facts), shape_of(row["state"]), kind_of(row["state"]),
                row["path"], anchor(row["name"]))


def _group(state: str, path: str | None, members: Sequence[Row]) -> Spot:
    times = [row["rtt_us"] for row in members if row["rtt_us"] is not None]
    facts = [state, *filter(None, [path])]
    if times:
        facts.append(f"{milliseconds(min(times))} to {milliseconds(max(times))}")
    more = counted(len(members), "more peer")
    return Spot(more, ", ".join(facts), "group", kind_of(state), path or "several", None)


def star(host: str, shown: Sequence[Spot]) -> Element:
    """Return the picture for wide screens: this node in the middle, the peers around it."""
    width, height = STAR
    middle = width / 2, height / 2
    lines, marks = [], []
    for at, spot in enumerate(shown):
        # Half a step away from the top, so that no label is above or below another one.
        angle = 2 * math.pi * (at + 0.5) / len(shown) - math.pi / 2
        x, y = (middle[i] + RADIUS[i] * turn for i, turn in enumerate(
            (math.cos(angle), math.sin(angle))))
        lines += _line(spot, middle, (x, y))
        right = math.cos(angle) > -1e-9
        reach = SIZE * (2 if spot.shape == "group" else 1.3)
        marks.append(_mark(spot, (x, y), x + (reach if right else -reach) + (4 if right else -4),
                           "start" if right else "end"))
    own = element("g", _shape("circle", middle, 16, "own"), _label(
        middle[0], middle[1] + 34, "middle", "name", _cut(host)), _label(
        middle[0], middle[1] + 50, "middle", "fact", "this node"))
    return _svg("star", STAR, [*lines, own, *marks])


def tree(host: str, shown: Sequence[Spot]) -> Element:
    """Return the picture for narrow screens: this node at the top, the peers below each other."""
    height = 60 + TREE_STEP * len(shown)
    top = 24.0, 24.0
    lines, marks = [], []
    for at, spot in enumerate(shown):
        y = 60.0 + TREE_STEP * at + TREE_STEP / 2
        lines += _line(spot, top, (70.0, y), corner=True)
        marks.append(_mark(spot, (70.0, y), 96, "start"))
    own = element("g", _shape("circle", top, 14, "own"), _label(
        top[0] + 24, 22, "start", "name", _cut(host)), _label(
        top[0] + 24, 38, "start", "fact", "this node"))
    return _svg("tree", (TREE_WIDTH, height), [*lines, own, *marks])


def legend() -> Element:
    """Return the list of shapes and lines."""
    shapes = [("circle", "good", "reachable"), ("triangle", "limited", "limited: large packets are "
              "lost"), ("square", "bad", "unreachable"), ("diamond", "unknown", "not measured"),
              ("group", "good", "several peers")]
    items = [element("li", element("svg", _shape(shape, (18, 12), 8, kind), viewBox="0 0 36 24",
                                   class_="key", aria_hidden="true"), text)
             for shape, kind, text in shapes]
    for path, text in (("udp", "UDP"), ("vxlan", "VXLAN")):
        line = element("line", x1=0, y1=12, x2=36, y2=12, class_=f"path {path}")
        items.append(element("li", element("svg", line, viewBox="0 0 36 24", class_="key",
                                           aria_hidden="true"), text))
    return element("ul", *items, class_="legend")


def _svg(kind: str, size: tuple[int, int], parts: Sequence[Element]) -> Element:
    return element("svg", *parts, viewBox=f"0 0 {size[0]} {size[1]}", class_=f"mesh {kind}",
                   role="group", aria_label="paths to the peers")


def _line(
    spot: Spot, start: tuple[float, float], end: tuple[float, float], corner: bool = False
) -> list[Element]:
    """Return the line of the path. A path that does not work is interrupted."""
    if spot.path in (None, "none"):
        return []
    broken = " broken" if spot.kind == "bad" else ""
    by = f"M{_n(start[0])},{_n(start[1])}" + (f"V{_n(end[1])}H{_n(end[0])}" if corner else
                                              f"L{_n(end[0])},{_n(end[1])}")
    kind = spot.path if spot.path in ("udp", "vxlan") else "other"
    return [element("path", d=by, class_=f"path {kind}{broken}")]


def _mark(spot: Spot, at: tuple[float, float], x: float, side: str) -> Element:
    """Return the shape and the text of a spot. A peer links to its row in the table."""
    parts = [_shape(spot.shape, at, SIZE, spot.kind),
             _label(x, at[1] - 2, side, "name", spot.title),
             _label(x, at[1] + 14, side, "fact", spot.text)]
    if spot.link is None:
        return element("g", *parts)
    return element("a", *parts, href=f"#{spot.link}")


def _shape(shape: str, at: tuple[float, float], size: float, kind: str) -> Element:
    return element("path", d=SHAPES[shape], class_=f"shape {kind}",
                   vector_effect="non-scaling-stroke",
                   transform=f"translate({_n(at[0])} {_n(at[1])}) scale({_n(size)})")


def _label(x: float, y: float, side: str, kind: str, text: str) -> Element:
    return element("text", text, x=_n(x), y=_n(y), text_anchor=side, class_=kind)


def _n(number: float) -> str:
    return f"{number:.1f}"


def _cut(name: str) -> str:
    shown = printable(name)
    return shown if len(shown) <= NAME_LEN else f"{shown[: NAME_LEN - 1]}…"
