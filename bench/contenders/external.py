"""Contenders from description files: any tunnel that two commands can start.

Owns: the format, and its reading. A file bench/contenders/NAME.toml, or one given by --contender:

    title     what the report calls it
    programs  used only when all of these are installed
    package   where Debian has them; said when they are not
    carries   nft expression of its packets on the wire, e.g. "udp dport 8300"
    device    the network device it makes
    mtu       of that device
    profiles  optional: those it can be measured on
    prepare   commands to run first, before either end is started
    start     the command that runs and stays
    ready     optional: words in its output that say it is up; else its device is awaited
    setup     commands of ip(8), when the device is there
    settle    optional: seconds of pings that it takes to be at its best
    [files]   name = text, written to {dir} first

Every text may hold {here} {there} (underlay addresses), {inner} {inner_there} (addresses to
measure between), {mtu} {device} {dir} (a folder of that end's own), {dir_there} and {side} {other}
("a" and "b"). Commands are lists of words or one text to be split like a shell does; they run on
that end's host.
"""

from __future__ import annotations

import shlex
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from udptun.lab import Host, Lab, Link, Unavailable, wait_for
from udptun.lab.tools import SEARCH_PATH

from .base import PROFILES, Contender, Road

DESCRIPTIONS = Path(__file__).resolve().parent
_REQUIRED = {"title", "carries", "device", "mtu", "start"}
_OPTIONAL = {"programs", "package", "profiles", "prepare", "ready", "settle", "setup", "files"}


def names() -> list[str]:
    return sorted(path.stem for path in DESCRIPTIONS.glob("*.toml"))


def installed_names() -> tuple[str, ...]:
    """Those whose programs are on this machine."""
    return tuple(name for name in names() if not missing(_read(name)))


def load(name: str) -> Contender:
    return contender(name, _read(name))


def _read(name: str) -> dict[str, Any]:
    return parse((DESCRIPTIONS / f"{name}.toml").read_text(), name)


def parse(text: str, name: str) -> dict[str, Any]:
    """The description; ValueError says what is wrong with it."""
    try:
        description = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{name}: {e}") from None
    if lacking := _REQUIRED - description.keys():
        raise ValueError(f"{name}: missing {', '.join(sorted(lacking))}")
    if unknown := description.keys() - _REQUIRED - _OPTIONAL:
        raise ValueError(f"{name}: unknown {', '.join(sorted(unknown))}")
    if bad := set(description.get("profiles", ())) - set(PROFILES):
        raise ValueError(f"{name}: no such profile: {', '.join(sorted(bad))}")
    return description


def words(command: str | list[str], values: Mapping[str, object]) -> list[str]:
    """A command with its blanks filled. Split first: a value is never split."""
    parts = shlex.split(command) if isinstance(command, str) else command
    return [part.format_map(values) for part in parts]


def contender(name: str, description: Mapping[str, Any]) -> Contender:
    def lay(lab: Lab, a: Host, b: Host, link: Link) -> Road:
        if absent := missing(description):
            package = description.get("package", "another source")
            raise Unavailable(f"{', '.join(absent)} not installed (Debian: {package})")
        net4, _ = lab.next_subnets()
        ends = {}
        for side, other, here, there, n in (("a", "b", a, b, 1), ("b", "a", b, a, 2)):
            ends[side] = here, {
                "here": here.v4, "there": there.v4, "inner": net4[n], "inner_there": net4[3 - n],
                "mtu": description["mtu"], "device": description["device"],
                "dir": lab.folder / f"{here.name}-{name}",
                "dir_there": lab.folder / f"{there.name}-{name}", "side": side, "other": other,
            }
        for host, values in ends.values():
            _write(description.get("files", {}), values)
            for command in description.get("prepare", ()):
                host.run(words(command, values))
        for host, values in ends.values():
            _start(host, description, values)
        return Road(
            name, a, b, link, net4[1], net4[2], description["carries"], description["mtu"],
            facts={"title": description["title"]}, settle_seconds=description.get("settle", 0),
        )

    return Contender(name, lay, tuple(description.get("profiles", PROFILES)))


def missing(description: Mapping[str, Any]) -> list[str]:
    """Its programs that are not on this machine."""
    return [
        name for name in description.get("programs", ())
        if shutil.which(name) is None and shutil.which(name, path=SEARCH_PATH) is None
    ]


def _write(files: Mapping[str, str], values: Mapping[str, object]) -> None:
    folder = Path(str(values["dir"]))
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        path = folder / name.format_map(values)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format_map(values))
        path.chmod(0o700 if text.startswith("#!") else 0o600)


def _start(host: Host, description: Mapping[str, Any], values: Mapping[str, object]) -> None:
    process = host.start(words(description["start"], values))
    if ready := description.get("ready"):
        process.wait_for_output(ready)
    device = description["device"]
    wait_for(
        lambda: host.run(["ip", "link", "show", device], check=False).returncode == 0,
        f"{device} of {process}",
    )
    for command in description.get("setup", ()):
        host.ip(" ".join(words(command, values)))
