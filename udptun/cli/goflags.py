"""Go's syntax of flags for a click command, so that flanneld's command lines work unchanged.

Owns the syntax; ``node`` has the flags. The rules:
- ``-x`` is the same as ``--x``.
- A value is written ``--x=value`` or ``--x value``. A boolean accepts only the first form.
- A boolean without a value is true.
- If a flag is repeated, the last value counts, unless the flag collects values.
- If a flag has several environment variables, the first one that is set and not empty counts.

There is one difference from Go: an argument that is not a flag is refused. Go ignores such an
argument and all arguments after it.

Source: Go's package flag, FlagSet.parseOne and Value of bool and int; flannel's main.go.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # not generic before click 8.2

TRUE = ("1", "t", "T", "TRUE", "true", "True")  # strconv.ParseBool
FALSE = ("0", "f", "F", "FALSE", "false", "False")
# time.ParseDuration, without signs and without units below a millisecond
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
PART = r"(\d+(?:\.\d*)?|\.\d+)(ms|s|m|h)"
NUMBER = re.compile(r"[+-]?[0-9][0-9a-zA-Z_]*")


class Bool(_ParamType):
    name = "boolean"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> bool:
        if isinstance(value, bool):
            return value
        if value not in TRUE + FALSE:
            self.fail(f"{value!r} is not valid: expected true or false", param, ctx)
        return value in TRUE


class Duration(_ParamType):
    """A duration in Go's notation: 10s, 1m30s, 500ms or 0. The value is in seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if not isinstance(value, str):
            return float(value)
        if value == "0":
            return 0.0
        if not re.fullmatch(f"(?:{PART})+", value):
            self.fail(f"{value!r} is not valid: expected a duration such as 10s, 1m30s or 500ms",
                      param, ctx)
        return sum(float(number) * UNITS[unit] for number, unit in re.findall(PART, value))


class Int(_ParamType):
    """An integer of at least ``low``, in any of Go's notations: 10, 0x0a, 0o12, 012, 1_000."""

    name = "n"

    def __init__(self, low: int | None = None) -> None:
        self._low = low

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        try:
            number = value if isinstance(value, int) else int(_octal(value), 0)
        except ValueError:
            self.fail(f"{value!r} is not valid: expected a whole number", param, ctx)
        if self._low is not None and number < self._low:
            self.fail(f"{value!r} is not valid: expected at least {self._low}", param, ctx)
        return number


def _octal(text: str) -> str:
    return re.sub(r"^([+-]?)0_?(?=[0-7])", r"\g<1>0o", text)


class Collected(click.Option):
    """A flag that may be repeated. As in flannel, its environment variable holds one value, which
    may contain blanks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"multiple": True}))

    def value_from_envvar(self, ctx: click.Context) -> tuple[str, ...] | None:
        value = self.resolve_envvar_value(ctx)
        return None if value is None else (value,)


class Level(click.Option):
    """A number, or 1 if the flag has no value.

    The next argument is the value only if it is a number. In Go the next argument is always the
    value.
    """


class GoCommand(click.Command):
    """A command whose options have Go's syntax. ``Bool`` and ``Level`` flags need no value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._normalised_if_complete(ctx, args)))

    def _normalised_if_complete(self, ctx: click.Context, args: list[str]) -> Iterator[str]:
        """Yield the arguments of ``_normalised``.

        While a shell completes a command line, the end of the line may be missing. In this case,
        ignore usage errors.
        """
        try:
            yield from self._normalised(ctx, args)
        except click.UsageError:
            if not ctx.resilient_parsing:
                raise

    def _normalised(self, ctx: click.Context, args: list[str]) -> Iterator[str]:
        """Yield each flag and its value as one argument, which click cannot misread."""
        flags = {opt.lstrip("-"): param for param in self.get_params(ctx) for opt in param.opts}
        words = deque(args)
        while words:
            word = words.popleft()
            if word == "--" and not words:
                return
            if word in ("-", "--") or not word.startswith("-"):
                raise click.UsageError(
                    f"{word!r} is not a flag. Write the value of a flag as --flag=value.", ctx
                )
            name, equals, value = word[1:].removeprefix("-").partition("=")
            flag = flags.get(name)
            if flag is None:
                near = [f"--{other}" for other in get_close_matches(name, flags)]
                raise click.NoSuchOption(word.partition("=")[0], possibilities=near, ctx=ctx)
            long = max(flag.opts, key=len)
            if isinstance(flag, click.Option) and flag.is_flag:  # click's own --help
                yield long
                continue
            if not equals:
                value = _value(flag, word, words, ctx)
            yield f"{long}={value}"


def _value(
    flag: click.Parameter, word: str, words: deque[str], ctx: click.Context
) -> str:
    """Return the value of a flag that has no ``=``."""
    if isinstance(flag.type, Bool):
        return "true"
    if isinstance(flag, Level) and not (words and NUMBER.fullmatch(words[0])):
        return "1"
    if not words:
        raise click.BadOptionUsage(word, f"{word} needs a value.", ctx)
    return words.popleft()
