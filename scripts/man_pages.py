"""Write the man pages of all commands: ``python scripts/man_pages.py FOLDER``.

One page for ``udptun`` and one for each command, all in section 8. The text is that of ``--help``.
"""

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import release

sys.path.insert(0, str(release.ROOT))
from udptun.cli import cli


def roff(text: str) -> str:
    """Escape text: a backslash, a hyphen, and a control character at the start of a line."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def paragraphs(text: str) -> Iterator[str]:
    for number, part in enumerate(re.split(r"\n\s*\n", text.strip())):
        if number:
            yield ".PP"
        if part.startswith("\b"):  # click's mark: keep the lines
            yield ".nf"
            yield from (roff(line) for line in part.splitlines()[1:])
            yield ".fi"
        else:
            yield roff(" ".join(part.split()))


def commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=name)
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None and not found.hidden:
                yield from commands(f"{name} {child}", found)


def page(name: str, command: click.Command, others: list[str]) -> str:
    context = click.Context(
        command, info_name=name, auto_envvar_prefix=name.replace(" ", "_").upper()
    )
    date = time.strftime("%Y-%m-%d", time.gmtime(release.epoch()))
    title = name.replace(" ", "-")
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    lines = [
        f'.TH {roff(title.upper())} 8 "{date}" "udptun {release.VERSION}" "udptun"',
        ".SH NAME", f"{roff(title)} \\- {roff(command.get_short_help_str(200).rstrip('.'))}",
        ".SH SYNOPSIS", f".B {roff(usage)}",
        ".SH DESCRIPTION", *paragraphs(command.help or ""),
        ".SH OPTIONS",
    ]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            lines += [".TP", f".B {roff(record[0])}", roff(" ".join(record[1].split())) or r"\&"]
    see = [other for other in others if other != title and (
        other == "udptun" or other.startswith(f"{title}-")
    )]
    if see:
        lines += [".SH SEE ALSO", ",\n".join(f".BR {roff(other)} (8)" for other in see)]
    return "\n".join(lines).replace(",\n.BR", "\n.BR") + "\n"


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = list(commands("udptun", cli))
    names = [name.replace(" ", "-") for name, _ in found]
    for name, command in found:
        (folder / f"{name.replace(' ', '-')}.8").write_text(page(name, command, names))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
