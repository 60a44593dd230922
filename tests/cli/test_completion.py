"""Completion by the shell: every command and option, for each shell that click supports."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

from udptun.cli import cli
from udptun.node.backends import MODES

SHELLS = {  # shell: the environment that its script sets for `udptun node --backend <TAB>`
    "bash": {"COMP_WORDS": "udptun node --backend ", "COMP_CWORD": "3"},
    "zsh": {"COMP_WORDS": "udptun node --backend ", "COMP_CWORD": "3"},
    "fish": {"COMP_WORDS": "udptun node --backend ", "COMP_CWORD": ""},
}


def commands(
    command: click.Command = cli, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command and group, and the words that select it."""
    yield words, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from commands(inner, (*words, name))


def options() -> Iterator[tuple[tuple[str, ...], click.Option, str]]:
    for words, command in commands():
        for param in command.get_params(click.Context(command)):
            if isinstance(param, click.Option):
                for name in param.opts:
                    yield words, param, name


def complete(*words: str, incomplete: str = "") -> list[CompletionItem]:
    completion = ShellComplete(cli, {}, "udptun", "_UDPTUN_COMPLETE")
    return completion.get_completions(list(words), incomplete)


def values(*words: str, incomplete: str = "") -> list[str]:
    return [item.value for item in complete(*words, incomplete=incomplete)]


def test_every_command_completes_its_options_and_subcommands() -> None:
    for words, command in commands():
        found = values(*words, incomplete="-")
        assert "--help" in found, words
        if isinstance(command, click.Group):
            assert values(*words) == command.list_commands(click.Context(command))
        else:
            complete(*words)


def test_every_option_completes_its_value() -> None:
    for words, param, name in options():
        if isinstance(param.type, click.Choice):
            assert values(*words, name) == list(param.type.choices), (words, name)
            last = param.type.choices[-1]
            assert values(*words, name, incomplete=last) == [last]
            assert values(*words, incomplete=f"{name}={last[:1]}"), (words, name)
        else:
            complete(*words, name)
            complete(*words, incomplete=f"{name}=")


def test_an_unfinished_or_wrong_word_before_it_is_no_error() -> None:
    for before in (
        "--no-such", "word", "-", "--iface", "--iface-regex=[", "--iptables-resync=none",
        "--instance=UPPER", "--network=10.244.0.0", "--mtu", "-v", "--ip-masq",
    ):
        for words, _, name in options():
            complete(*words, before, name)
            complete(*words, name, before)


def test_completion_does_not_read_files_or_wait_for_them(tmp_path: Path) -> None:
    file = tmp_path / "forward.json"
    assert values("forward", "--wait-for", str(file), "--source-check") == ["strict", "peer", "off"]
    file.write_text("not JSON")
    assert values("forward", "--wait-for", str(file), "--source-check") == ["strict", "peer", "off"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_program_completes_for(shell: str) -> None:
    assert get_completion_class(shell) is not None
    env = os.environ | SHELLS[shell] | {"_UDPTUN_COMPLETE": f"{shell}_complete"}
    program = [sys.executable, "-c", "from udptun.cli import main; main()"]
    result = subprocess.run(
        program, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    for mode in MODES:
        assert mode in result.stdout
