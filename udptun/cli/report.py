"""``udptun report``: one file with the state of this host, to attach to a bug report.

Owns the options and the output. ``udptun.doctor.bundle`` collects the parts. Threading: main
thread.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from ..errors import UdptunError
from ..files import replace_file
from .doctor import Progress, facts_of, files_of_node, path_option, to_json
from .options import connection

STDOUT = Path("-")


@click.command()
@click.option("-o", "--output", type=path_option, metavar="FILE",
              help="The file to write; - is the standard output.  "
                   "[default: udptun-report-TIME.tar.gz]")
@click.option("--redact", is_flag=True,
              help="Replace addresses and names of hosts by pseudonyms.")
@files_of_node
@connection
@click.pass_context
def report(
    ctx: click.Context, output: Path | None, redact: bool, state_dir: Path | None,
    subnet_file: Path | None,
) -> None:
    """Write one file with the state of this host, to attach to a bug report.

    The file is a compressed tar. Passwords, tokens, keys and certificates are not in it. With
    --redact, addresses and names of hosts are pseudonyms: the same address has the same pseudonym
    in every part. Look at the file before you publish it.
    """
    from ..doctor.bundle import archive, collect, contents
    from ..doctor.checks import CHECKS
    from ..doctor.run import run

    to_stdout = output == STDOUT
    if to_stdout and sys.stdout.isatty():
        raise click.UsageError("-o - needs a pipe or a file, because the report is not text")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = output or Path(f"udptun-report-{stamp}.tar.gz")
    facts = facts_of(ctx, state_dir, subnet_file)
    with Progress() as progress:
        progress.now("asking the node daemon and the forwarder")
        facts.gather()
        parts = collect(facts, lambda: to_json(run(facts, CHECKS)), redact, progress.now)
    data = archive(parts, f"udptun-report-{stamp}")
    if to_stdout:
        click.echo(data, nl=False)
    else:
        try:
            replace_file(path, [data], 0o600)
        except OSError as exc:
            raise UdptunError(f"{path} cannot be written: {exc.strerror}; -o names another file, "
                              "-o - the standard output") from exc
    click.echo(contents(parts), nl=False, err=to_stdout)
    if not to_stdout:
        click.echo(f"wrote {path}, readable only by you")
    if not redact:
        click.echo("It contains addresses and names of hosts; --redact replaces them.",
                   err=to_stdout)
