"""The messages with which a forwarder hands itself over to another process. docs/takeover.md
describes them.

Owns the types of the messages, their form as JSON, and the rule by which both sides agree on a
version. An unknown field is ignored; a missing field has its default. So a newer forwarder can take
over from an older one, and an older one from a newer one. Does no input or output. Threading: pure
functions.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from ..errors import UdptunError

VERSION = 1  # of the messages; increased if an old forwarder could not use a new message correctly
OLDEST = 1  # the oldest version that we can use

MESSAGE_MAX = 60_000  # bytes; larger values are passed as documents, in files without a name
DESCRIPTORS_MAX = 64  # descriptors in one message; the kernel's limit is 253
NUMBER_MAX = (1 << 64) - 1  # the core's counters and times have 64 bits
EVERYTHING, DESCRIPTORS = "everything", "descriptors"  # Hello.want


class TakeOverError(UdptunError):
    """A take-over has failed. The running forwarder continues."""


# Each kind of message has ``carries``: the least and the largest number of its descriptors.


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of the process that asks.

    want      EVERYTHING: it is going to take over. DESCRIPTORS: it only keeps copies of the
              descriptors, and gets a new message each time when they change
    oldest, newest  versions of the messages that it can use
    program, build  its version and build of udptun
    namespace  inode of its network namespace
    options   the options in which both forwarders must agree
    """

    kind: ClassVar = "hello"
    carries: ClassVar = (0, 0)
    want: str = EVERYTHING
    oldest: int = 1
    newest: int = 1
    program: str = ""
    pid: int = 0
    namespace: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    build: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """The answer to ``Hello`` if there will be no take-over."""

    kind: ClassVar = "refused"
    carries: ClassVar = (0, 0)
    reason: str = "no reason was given"


@dataclass(frozen=True, slots=True)
class Descriptors:
    """The names of the descriptors that this message carries.

    more  another message of this kind follows
    """

    kind: ClassVar = "descriptors"
    carries: ClassVar = (0, DESCRIPTORS_MAX)
    names: list[str] = field(default_factory=list)
    more: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """What the running forwarder has. The message carries the descriptor of the document.

    version  of the messages, from here on
    program, build  the version and build of udptun that runs
    size     bytes of the document
    """

    kind: ClassVar = "state"
    carries: ClassVar = (1, 1)
    version: int = 1
    program: str = ""
    pid: int = 0
    size: int = 0
    build: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """The new forwarder can begin. The message carries an eventfd for each worker. The old worker
    writes to it after its last turn."""

    kind: ClassVar = "ready"
    carries: ClassVar = (0, DESCRIPTORS_MAX)


@dataclass(frozen=True, slots=True)
class Stopped:
    """The old workers have stopped. The message carries the descriptor of the last document: the
    counters."""

    kind: ClassVar = "stopped"
    carries: ClassVar = (1, 1)
    size: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """The new forwarder has everything. The old one ends.

    taken  the names of the listening sockets and locks that the new one uses from now on. The old
           one removes the files of the others
    """

    kind: ClassVar = "done"
    carries: ClassVar = (0, 0)
    taken: list[str] = field(default_factory=list)


Message = Hello | Refused | Descriptors | State | Ready | Stopped | Done
KINDS: dict[str, type[Message]] = {
    kind.kind: kind for kind in (Hello, Refused, Descriptors, State, Ready, Stopped, Done)
}


def encode(message: Message) -> bytes:
    return json.dumps({"type": message.kind, **asdict(message)}).encode()


def decode(data: bytes) -> Message | None:
    """Return the message; None if its type is unknown. Raises TakeOverError."""
    values = read_object(data, "the message")
    name = values.get("type")
    if not isinstance(name, str):
        raise TakeOverError(f"not a message of a take-over: {data[:60]!r}")
    kind = KINDS.get(name)
    return None if kind is None else from_json(kind, values)


def read_object(text: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object. Raises TakeOverError, which begins with ``what``."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise TakeOverError(f"{what} is not JSON: {error}") from None
    except RecursionError:
        raise TakeOverError(f"{what} is not valid: its lists and objects are too deep") from None
    if not isinstance(values, dict):
        raise TakeOverError(f"{what} is not a JSON object")
    return values


T = TypeVar("T")


def from_json(kind: type[T], values: dict[str, Any]) -> T:
    """Make an object of a dataclass whose fields all have defaults. Ignore unknown values.

    Raises TakeOverError if a value does not have the type of its field.
    """
    types = get_type_hints(kind)
    known = {}
    for each in fields(kind):  # type: ignore[arg-type]
        if each.name not in values:
            continue
        value, expected = values[each.name], types[each.name]
        if not has_type(value, expected):
            text = "" if isinstance(value, dict | list) else f" {value!r:.60}:"
            name = expected.__name__ if get_origin(expected) is None else str(expected)
            raise TakeOverError(
                f"{kind.__name__.lower()}: {each.name}:{text} expected a value of the type {name}"
            )
        known[each.name] = value
    return kind(**known)


def has_type(value: Any, expected: Any) -> bool:
    """Return whether a JSON value has this type: Any, bool, int, str, or a list or dict of those.

    An int is in the range 0..NUMBER_MAX. A str can be written as UTF-8.
    """
    if expected is Any:
        return True
    if type(value) is not (get_origin(expected) or expected):
        return False
    if isinstance(value, dict | list):
        inner = get_args(expected)[-1]
        items = value.values() if isinstance(value, dict) else value
        return inner is Any or all(has_type(item, inner) for item in items)
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
    return bool(0 <= value <= NUMBER_MAX)


def agree(oldest: int, newest: int) -> int:
    """Return the newest version that both sides support. Raises TakeOverError."""
    version = min(newest, VERSION)
    if version < max(oldest, OLDEST):
        raise TakeOverError(
            f"the other forwarder uses the versions {oldest} to {newest} of the take-over, this "
            f"one {OLDEST} to {VERSION}; restart instead"
        )
    return version
