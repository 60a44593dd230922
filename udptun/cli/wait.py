"""``udptun forward --wait-for FILE``: options from a file that may not be there yet.

Owns the file's form: a JSON object, keyed by the long options of the command without their
dashes; a list where the option may be repeated, null for an option that is not given. What the
command line or the environment says goes before it. Refuses to know the options: they are the
command's own, and check the values themselves. Main thread, before anything runs.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..errors import FieldError
from . import logs
from .lazy import Failure

log = logging.getLogger("udptun")

# Seconds between looks. Not inotify: the file's directory may not be there yet either, and its
# parents may be mounted over meanwhile; a look takes microseconds.
POLL_SECONDS = 0.1


def take_options(
    ctx: click.Context, param: click.Parameter, path: Path | None
) -> Path | None:
    """Callback of an eager option: what the file says becomes the defaults of all others."""
    if path is None:
        return None
    try:
        ctx.default_map = _defaults(ctx, param, _wait(path), str(path))
    except FieldError as exc:
        raise Failure(str(exc)) from exc
    except OSError as exc:
        raise Failure(f"{path}: {exc.strerror}") from exc
    return path


def _wait(path: Path) -> bytes:
    waited = False
    while True:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            if not waited:
                logs.start()
                log.info("waiting for %s, which says what to forward", path)
                waited = True
            time.sleep(POLL_SECONDS)


def _defaults(
    ctx: click.Context, waiting: click.Parameter, text: bytes, where: str
) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise FieldError(where, text[:40].decode(errors="replace"), f"JSON ({exc})") from None
    if not isinstance(told, Mapping):
        raise FieldError(where, told, "an object of the long options and their values")
    options = {
        name.removeprefix("--"): option for option in ctx.command.params
        for name in option.opts if name.startswith("--") and option is not waiting
    }
    defaults: dict[str, Any] = {}
    for key, value in told.items():
        if key not in options:
            raise FieldError(key, value, "only the long options of this command", where)
        option = options[key]
        if value is not None:
            assert option.name is not None
            defaults[option.name] = _checked(ctx, option, key, value, where)
    return defaults


def _checked(
    ctx: click.Context, option: click.Parameter, key: str, value: object, where: str
) -> object:
    """As click takes it from a default: text as on a command line, or a list of such."""
    words = value if isinstance(value, list) and option.multiple else [value]
    for word in words:
        if isinstance(word, bool) or not isinstance(word, str | int):
            form = "a text, a number or a list of these" if option.multiple else "a text or number"
            raise FieldError(key, value, form, where)
    texts = [str(word) for word in words]
    given = texts if option.multiple else texts[0]
    try:
        option.type_cast_value(ctx, given)
    except click.BadParameter as exc:
        raise Failure(f"{where}: {key}: {exc.message}") from exc
    return given
