"""Elements of HTML and SVG. Every text and every attribute is escaped, because none is markup.

``element`` takes text and elements; ``html`` writes the document. There is no way to insert markup
as text. Text of other hosts can contain characters that a document must not contain, so
``printable`` escapes it first. Pure functions: any thread.
"""

from __future__ import annotations

from xml.etree import ElementTree

from ...text import printable

TEXT_LEN = 2000  # characters of one text

Element = ElementTree.Element
Child = Element | str | int | None


def element(tag: str, *children: Child, **attributes: object) -> Element:
    """Return an element. None is no child and no attribute, True an attribute without value.

    The name of an attribute has ``-`` for ``_``; a final ``_`` is removed: ``class_``.
    """
    made = ElementTree.Element(tag)
    for name, value in attributes.items():
        if value is not None and value is not False:
            key = name.removesuffix("_").replace("_", "-")
            made.set(key, key if value is True else printable(str(value), TEXT_LEN))
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            last = child
        elif child is not None:
            text = printable(str(child), TEXT_LEN)
            if last is None:
                made.text = (made.text or "") + text
            else:
                last.tail = (last.tail or "") + text
    return made


def html(document: Element) -> bytes:
    text: bytes = ElementTree.tostring(document, encoding="utf-8", method="html")
    return b"<!doctype html>\n" + text + b"\n"
