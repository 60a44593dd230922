"""The messages with which a forwarder hands itself over to another process. docs/takeover.md
describes them.

Owns the types of the messages, their form as JSON, and the rule by which both sides agree on a
version. A field that this version does not know is ignored; a missing field has its default. So a
newer forwarder can take over from an older one, and the other way round. Does no input or output.
Threading: pure functions.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from ..errors import UdptunError

VERSION = 1  # of the messages; increased if an old forwarder could not use a new message correctly
OLDEST = 1  # the oldest version that we can use

MESSAGE_MAX = 60_000  # bytes; larger values are passed as documents, in files without a name
DESCRIPTORS_MAX = 64  # descriptors in one message; the kernel's limit is 253
EVERYTHING, DESCRIPTORS = "everything", "descriptors"  # Hello.want


class TakeOverError(UdptunError):
    """A take-over has failed. The forwarder that runs goes on."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of the process that asks.

    want      EVERYTHING: it is going to take over. DESCRIPTORS: it only keeps copies of the
              descriptors, and gets a new message each time when they change
    oldest, newest  versions of the messages that it can use
    program   its version of udptun
    namespace  inode of its network namespace
    options   the options in which both forwarders must agree
    """

    kind: ClassVar = "hello"
    want: str = EVERYTHING
    oldest: int = 1
    newest: int = 1
    program: str = ""
    pid: int = 0
    namespace: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refused:
    """The answer to ``Hello`` if there will be no take-over."""

    kind: ClassVar = "refused"
    reason: str = "no reason was given"


@dataclass(frozen=True, slots=True)
class Descriptors:
    """The names of the descriptors that this message carries.

    more  another message of this kind follows
    """

    kind: ClassVar = "descriptors"
    names: list[str] = field(default_factory=list)
    more: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """What the running forwarder has. The message carries the descriptor of the document.

    version  of the messages, from here on
    size     bytes of the document
    """

    kind: ClassVar = "state"
    version: int = 1
    program: str = ""
    pid: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    """The new forwarder can begin. The message carries an eventfd for each worker. The old worker
    writes to it after its last turn."""

    kind: ClassVar = "ready"


@dataclass(frozen=True, slots=True)
class Stopped:
    """The old workers have stopped. The message carries the descriptor of the last document: the
    counters."""

    kind: ClassVar = "stopped"
    size: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """The new forwarder has everything. The old one ends.

    taken  the names of the listening sockets and locks that the new one uses from now on. The old
           one removes the files of the others
    """

    kind: ClassVar = "done"
    taken: list[str] = field(default_factory=list)


Message = Hello | Refused | Descriptors | State | Ready | Stopped | Done
KINDS: dict[str, type[Message]] = {
    kind.kind: kind for kind in (Hello, Refused, Descriptors, State, Ready, Stopped, Done)
}


def encode(message: Message) -> bytes:
    return json.dumps({"type": message.kind, **asdict(message)}).encode()


def decode(data: bytes) -> Message | None:
    """Return the message; None if this version does not know its type. Raises TakeOverError."""
    try:
        values = json.loads(data)
        kind = KINDS.get(values["type"])
    except (ValueError, KeyError, TypeError):
        raise TakeOverError(f"not a message of a take-over: {data[:60]!r}") from None
    return None if kind is None else from_json(kind, values)


T = TypeVar("T")


def from_json(kind: type[T], values: dict[str, Any]) -> T:
    """Make an object of a dataclass whose fields all have defaults. Ignore unknown values.

    Raises TakeOverError if a value has another type than the default of its field.
    """
    default = kind()
    known = {}
    for each in fields(default):  # type: ignore[arg-type]
        if each.name not in values:
            continue
        value, like = values[each.name], getattr(default, each.name)
        if like is not None and type(value) is not type(like):
            raise TakeOverError(
                f"{kind.__name__.lower()}: {each.name}: {str(value)[:60]}: expected a value of the "
                f"type {type(like).__name__}"
            )
        known[each.name] = value
    return kind(**known)


def agree(oldest: int, newest: int) -> int:
    """Return the version that both sides use: the newest that both know. Raises TakeOverError."""
    version = min(newest, VERSION)
    if version < max(oldest, OLDEST):
        raise TakeOverError(
            f"the other forwarder uses the versions {oldest} to {newest} of the take-over, this "
            f"one {OLDEST} to {VERSION}; restart instead"
        )
    return version
