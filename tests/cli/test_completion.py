"""Completion by the shell: every command and option, for each shell that click supports.

The last tests start the real shells with the completion files that packages install.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

from tests.cli.tty import Tty
from tests.scripts import script
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


# The installed files, in real shells

share_files = script("share_files")
RENDERED = ("udptun", "udptun-node", "udptun-route-add")
BIN = Path(sys.executable).parent  # has the command udptun


@pytest.fixture
def share(tmp_path: Path) -> Path:
    share_files.write(tmp_path)
    return tmp_path


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    if not (BIN / "udptun").exists():
        pytest.skip(f"there is no {BIN}/udptun")


def typed(command: list[str], ready: str, keys: str, wanted: str, folder: Path) -> None:
    """Run a shell in a terminal. When it has printed ``ready``, type ``keys``, and wait until it
    prints ``wanted``."""
    env = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(folder), "TERM": "dumb"}
    only = ["env", "-i", *(f"{name}={value}" for name, value in env.items())]
    with Tty([*only, *command]) as tty:
        tty.until(lambda: ready.encode() in tty.raw)
        before = len(tty.raw)
        tty.press(keys)
        tty.until(lambda: wanted.encode() in tty.raw[before:])


def test_bash_completes_with_the_installed_file(share: Path) -> None:
    need("bash")
    rc = share / "bashrc"
    rc.write_text(f"PS1='rea''dy> '\n. {share / share_files.COMPLETION['bash']}\n")
    typed(["bash", "--noprofile", "--rcfile", str(rc), "-i"], "ready> ",
          "udptun node --backend vx\t", "vxlan ", share)


def test_zsh_completes_with_the_installed_file(share: Path) -> None:
    need("zsh")
    (share / ".zshrc").write_text(
        f"PS1='ready> '\nfpath=({(share / share_files.COMPLETION['zsh']).parent} $fpath)\n"
        "autoload -Uz compinit && compinit -u\n")
    typed(["zsh", "-i"], "ready> ", "udptun node --backend vx\t", "vxlan", share)


def test_fish_completes_with_the_installed_file(share: Path) -> None:
    need("fish")
    file = share / share_files.COMPLETION["fish"]
    script = f"source {file}; complete -C 'udptun node --backend '"
    done = subprocess.run(
        ["fish", "--no-config", "-c", script], capture_output=True, text=True, check=False,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(share)})
    assert set(MODES) <= {line.split("\t")[0] for line in done.stdout.splitlines()}, done.stderr


# The man pages


def test_man_renders_the_pages_and_knows_their_names(share: Path) -> None:
    need("man")
    pages = sorted((share / "man").rglob("*.[18]"))
    wanted = {"-".join(("udptun", *words)) for words, _ in commands()}
    assert {page.stem for page in pages} == wanted
    named = subprocess.run(
        ["lexgrog", *map(str, pages)], capture_output=True, text=True, check=True)
    for page, line in zip(pages, named.stdout.splitlines(), strict=True):
        assert line.startswith(f'{page}: "{page.stem} - '), line
    shown = subprocess.run(
        ["man", "--warnings=w", "-l", *(str(page) for page in pages if page.stem in RENDERED)],
        capture_output=True, text=True, check=True,
        env=os.environ | {"LC_ALL": "C.UTF-8", "MANPAGER": "cat"})
    assert shown.stderr == ""
    assert "UDPTUN_NODE_BACKEND" in shown.stdout


def test_the_daemons_are_in_section_8(share: Path) -> None:
    assert (share / "man" / "man8" / "udptun-forward.8").exists()
    assert (share / "man" / "man1" / "udptun-status.1").exists()
