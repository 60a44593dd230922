"""Finds the contender for a specification such as ``udptun --offload off``.

Owns: the look-up. Any thread.
"""

from __future__ import annotations

import shlex

from . import builtin, external
from .base import Contender


def program(spec: str) -> str:
    """Return the first word of ``spec`` without ``@DIR``: ``udptun`` for ``udptun@DIR``."""
    name, *_ = shlex.split(spec) or [""]
    return name.partition("@")[0]


def find(spec: str) -> Contender:
    """Return the contender for ``spec``; ValueError if there is no such contender."""
    name, *options = shlex.split(spec) or [""]
    if program(spec) == "udptun":
        return builtin.udptun(spec, name.partition("@")[2], options)
    known = [*builtin.CONTENDERS, *external.names()]
    if name not in known and not name.endswith(".toml"):
        raise ValueError(
            f"contender {name!r}: expected one of udptun, {', '.join(known)}, or a file FILE.toml")
    if options:
        raise ValueError(f"contender {spec!r}: {name} takes no options; only udptun does")
    return builtin.CONTENDERS[name] if name in builtin.CONTENDERS else external.load(name)
