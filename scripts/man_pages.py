"""The man pages of all commands: one page for ``udptun`` and one for each command.

The text is that of ``--help``. Daemons and the programs that others start are in section 8, the
other commands in section 1.
"""

import re
import time
from collections.abc import Iterator

import command_tree
import release
from command_tree import Command

EXIT = {
    "udptun forward": {
        0: "It was stopped by a signal, by `udptun stop` or by flannel.",
        1: "It failed to start, lost its TUN device, or got a second signal.",
        2: "An option is not valid.",
    },
    "udptun node": {
        0: "It was stopped by a signal.",
        1: "It got a second signal, or an error that a retry cannot fix.",
        2: "An option is not valid.",
    },
    "udptun doctor": {
        0: "Nothing was found.",
        1: "Something was found.",
        2: "An option or argument is not valid.",
    },
    "": {
        0: "Success.",
        1: "The request failed, or no forwarder answers.",
        2: "An option or argument is not valid.",
    },
}


def roff(text: str) -> str:
    """Escape text: a backslash, a hyphen, and a control character at the start of a line."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def paragraphs(command: Command) -> Iterator[str]:
    for number, part in enumerate(command.paragraphs):
        if number:
            yield ".PP"
        if part.startswith("\b"):  # click's mark: keep the lines
            yield ".nf"
            yield from (roff(line) for line in part.splitlines()[1:])
            yield ".fi"
        else:
            yield roff(" ".join(part.split()))


def page(command: Command, others: list[Command]) -> str:
    date = time.strftime("%Y-%m-%d", time.gmtime(release.epoch()))
    lines = [
        f'.TH {roff(command.title.upper())} {command.section} "{date}" '
        f'"udptun {release.VERSION}" "udptun"',
        ".SH NAME", f"{roff(command.title)} \\- {roff(command.summary)}",
        ".SH SYNOPSIS", f".B {roff(command.usage)}",
        ".SH DESCRIPTION", *(paragraphs(command) if command.paragraphs else [command.summary]),
        ".SH OPTIONS",
    ]
    for option in command.options:
        lines += [".TP", f".B {roff(option.names)}", roff(option.text) or r"\&"]
        if option.variables:
            lines += [".br", roff(f"Environment: {', '.join(option.variables)}")]
    lines.append(".SH EXIT STATUS")
    for code, meaning in EXIT.get(command.name, EXIT[""]).items():
        lines += [".TP", f".B {code}", roff(meaning)]
    related = [
        other for other in others if other != command and (
            other.name == "udptun" or command.name == other.name.rpartition(" ")[0]
        )
    ]
    if related:
        lines.append(".SH SEE ALSO")
        lines += [f".BR {roff(other.title)} ({other.section})" for other in related]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, bytes]:
    """Return path below share/man -> text."""
    found = command_tree.commands()
    return {
        f"man{command.section}/{command.title}.{command.section}": page(command, found).encode()
        for command in found
    }
