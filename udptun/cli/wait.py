"""``udptun forward --wait-for FILE``: options from a file that may not exist yet.

Owns the format of the file: a JSON object whose keys are the command's long options, without the
leading dashes. The value is a list if the option can be repeated, and null if the option is not
given. The command line and the environment take precedence over the file. The command's own options
check the values. Threading: main thread, before the loop runs.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..errors import FieldError
from ..notify import Notifier
from . import logs
from .lazy import Failure

log = logging.getLogger("udptun")

# Seconds between checks; a check takes microseconds. inotify is not used: the directory may not
# exist yet, and a file system may be mounted over a parent directory later.
POLL_SECONDS = 0.1
_GIVEN = "udptun.cli.wait"  # key in ``Context.meta``


class WaitFor(click.Option):
    """The option. It remembers the options that are given on the command line: the log starts
    before these are processed."""

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        ctx.meta[_GIVEN] = opts
        return super().handle_parse_result(ctx, opts, args)


def _log_format(ctx: click.Context) -> str:
    """Return the value of --log-format, from the command line or the environment."""
    for option in ctx.command.params:
        if option.name == "log_format":
            return str(option.consume_value(ctx, ctx.meta[_GIVEN])[0])
    return "text"


def take_options(
    ctx: click.Context, param: click.Parameter, path: Path | None
) -> Path | None:
    """Callback of an eager option: make the file's values the defaults of all other options."""
    if path is None or ctx.resilient_parsing:  # resilient: a shell completes the command line
        return path
    try:
        ctx.default_map = _defaults(ctx, param, _wait(path, _log_format(ctx)), str(path))
    except FieldError as exc:
        raise Failure(str(exc)) from exc
    except OSError as exc:
        raise Failure(f"{path}: {exc.strerror}") from exc
    return path


def _wait(path: Path, log_format: str) -> bytes:
    waited = False
    notifier = Notifier(os.environ.get("NOTIFY_SOCKET", ""))
    while True:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            if not waited:
                logs.start(form=log_format)
                log.info("waiting for the options file %s", path)
                waited = True
            notifier.watchdog()
            time.sleep(POLL_SECONDS)


def _defaults(
    ctx: click.Context, waiting: click.Parameter, text: bytes, where: str
) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise FieldError(where, text[:40].decode(errors="replace"), f"JSON ({exc})") from None
    if not isinstance(content, Mapping):
        raise FieldError(where, content, "an object with the long options as keys")
    options = {
        name.removeprefix("--"): option for option in ctx.command.params
        for name in option.opts if name.startswith("--") and option is not waiting
    }
    defaults: dict[str, Any] = {}
    for key, value in content.items():
        if key not in options:
            raise FieldError(key, value, "only long options of this command", where)
        option = options[key]
        if value is not None:
            assert option.name is not None
            defaults[option.name] = _checked(ctx, option, key, value, where)
    return defaults


def _checked(
    ctx: click.Context, option: click.Parameter, key: str, value: object, where: str
) -> object:
    """Return the value in click's form for defaults: a string, or a list of strings."""
    words = value if isinstance(value, list) and option.multiple else [value]
    for word in words:
        if isinstance(word, bool) or not isinstance(word, str | int):
            form = "a string or a number" + ", or a list of these" * option.multiple
            raise FieldError(key, value, form, where)
    texts = [str(word) for word in words]
    given = texts if option.multiple else texts[0]
    try:
        option.type_cast_value(ctx, given)
    except click.BadParameter as exc:
        raise Failure(f"{where}: {key}: {exc.message}") from exc
    return given
