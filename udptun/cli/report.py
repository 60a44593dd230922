"""``udptun report``: one file with the state of this host, to attach to a bug report.

Owns the options and the output. ``udptun.doctor.bundle`` collects the parts. Threading: main
thread.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from ..errors import UdptunError
from ..files import replace_file
from .doctor import Progress, facts_of, files_of_node, path_option, to_json
from .options import connection


@click.command()
@click.option("-o", "--output", type=path_option, metavar="FILE",
              help="The file to write.  [default: udptun-report-TIME.tar.gz]")
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

    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = output or Path(f"udptun-report-{stamp}.tar.gz")
    facts = facts_of(ctx, state_dir, subnet_file)
    with Progress() as progress:
        progress.now("asking the node daemon and the forwarder")
        facts.gather()
        parts = collect(facts, lambda: to_json(run(facts, CHECKS)), redact, progress.now)
    try:
        replace_file(path, [archive(parts, f"udptun-report-{stamp}")], 0o600)
    except OSError as exc:
        raise UdptunError(f"{path} cannot be written: {exc.strerror}") from exc
    click.echo(contents(parts), nl=False)
    click.echo(f"wrote {path}, readable only by you")
    if not redact:
        click.echo("It contains addresses and names of hosts; --redact replaces them.")
