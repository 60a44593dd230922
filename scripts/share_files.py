"""The files below share/ that belong to a package: man pages, and completion for three shells.

``setup.py`` puts them into a wheel, ``bundle.py`` into a bundle and a Debian package. Needs click,
and no other package.
"""

import sys
from pathlib import Path

import man_pages
import release
from click.shell_completion import get_completion_class

sys.path.insert(0, str(release.ROOT))
from udptun.cli import cli

COMPLETION = {
    "bash": "bash-completion/completions/udptun",
    "zsh": "zsh/site-functions/_udptun",
    "fish": "fish/vendor_completions.d/udptun.fish",
}


def completion(shell: str) -> bytes:
    """Return click's completion script. ``source`` of click would also start the shell."""
    kind = get_completion_class(shell)
    assert kind is not None
    complete = kind(cli, {}, "udptun", "_UDPTUN_COMPLETE")
    return (complete.source_template % complete.source_vars()).encode()


def files() -> dict[str, bytes]:
    """Return path below share/ -> content."""
    man = {f"man/{name}": text for name, text in man_pages.pages().items()}
    return man | {path: completion(shell) for shell, path in COMPLETION.items()}


def write(folder: Path) -> list[Path]:
    """Write the files into a folder that stands for share/. Return their paths."""
    written = []
    for name, content in sorted(files().items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        written.append(path)
    return written


if __name__ == "__main__":
    write(Path(sys.argv[1]))
