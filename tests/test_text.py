"""Text that others have chosen: printable, and of limited length."""

import json
import logging

from hypothesis import example, given, settings
from hypothesis import strategies as st

from udptun.cli.logs import MESSAGE_MAX, JsonFormatter, TextFormatter
from udptun.errors import FieldError
from udptun.leases.base import MAX_ERROR, MAX_REASONS, Skipped, StoreDown, StoreRefused
from udptun.text import LIMIT, printable

HOSTILE = "a\n2026-01-01 ERROR udptun: forged \x1b[2J\x1b]0;t\x07\u202e\u200b\x85\x00\ud800\u2028z"


@given(st.text(st.characters(codec=None)), st.integers(1, 50))
@example(HOSTILE, 300)
def test_any_text_becomes_printable_and_has_a_limited_length(text, limit):
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit + 30
    if text.isprintable() and len(text) <= limit:
        assert shown == text


@settings(max_examples=25)
@given(st.recursive(st.none() | st.integers() | st.binary() | st.text(st.characters(codec=None)),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
       st.text(st.characters(codec=None)), st.text(), st.text())
@example(HOSTILE * 1000, HOSTILE * 1000, HOSTILE * 1000, HOSTILE * 1000)
@example(b"\xff" * 100_000, "", "", "")
@example(["x" * 100_000], "", "", "")
def test_the_text_of_a_field_error(value, field, expected, where):
    text = str(FieldError(field, value, expected, where))
    assert text.isprintable()
    assert len(text) < 8 * LIMIT


def test_errors_of_a_store():
    for kind in (StoreDown, StoreRefused):
        text = str(kind(f"the server says {HOSTILE}" + "x" * 100_000))
        assert text.isprintable() and text.startswith("the server says a\\n2026")
        assert len(text) < MAX_ERROR + 30


def record(message, *args):
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    return logging.LogRecord("udptun", logging.ERROR, "", 1, message, args, info)


def test_a_log_line_is_one_line():
    formatter = TextFormatter("%(levelname)s %(name)s: %(message)s")
    first, *traceback = formatter.format(record("%s", HOSTILE + "x" * 100_000)).split("\n")
    assert first.isprintable() and first.startswith("ERROR udptun: a\\n2026")
    assert len(first) < MESSAGE_MAX + 100
    assert all(line.startswith("  ") and line.isprintable() for line in traceback)


def test_a_log_line_in_json():
    (line,) = JsonFormatter().format(record("%s", HOSTILE)).split("\n")
    assert line.isprintable()
    assert json.loads(line)["message"].startswith("a\\n2026")


def test_many_invalid_entries_give_one_line_and_a_count(caplog):
    skipped, log = Skipped(), logging.getLogger("udptun.test")
    for n in range(100_000):
        skipped.add(f"key{n}", "no address", f"key{n} is invalid: no address")
    skipped.log(log)
    assert caplog.messages == ["key0 is invalid: no address; so are 99999 more entries"]
    assert len(skipped) == 100_000
    assert sum(reason == "no address" for reason in skipped.values()) == MAX_REASONS
    for n in range(100_000):  # listed again
        skipped.add(f"key{n}", "no address", f"key{n} is invalid: no address")
    skipped.add("other", "no address", "other is invalid: no address")
    skipped.log(log)
    assert len(caplog.messages) == 1  # too soon for another line
    skipped._not_before = 0
    skipped.log(log)
    assert caplog.messages[1:] == ["other is invalid: no address"]
    skipped._not_before = 0
    skipped.log(log)
    assert len(caplog.messages) == 2
