"""Contenders described by a TOML file: any tunnel that shell commands can start.

Owns: the file format and its parsing. Main thread only, like udptun.lab. A file
bench/contenders/NAME.toml has:

    title     its name in the report
    programs  optional: the programs it needs; without them it is not measured
    package   optional: the Debian package that has them
    carries   nft expression that matches its packets on the wire, e.g. "udp dport 8300"
    device    the network device that it creates
    mtu       MTU of that device
    profiles  optional: the profiles on which it works
    prepare   optional: commands to run on both hosts before it is started on either
    start     the command that starts it and keeps running
    ready     optional: text in its output that shows that it is up; without this text, only the
              device is awaited
    setup     optional: ip(8) commands to run when the device exists
    settle    optional: seconds of pings until it reaches its full rate
    [files]   optional: name = text, written to {dir} first

Every text may contain {here} {there} (underlay addresses), {inner} {inner_there} (the addresses
that traffic is measured between), {mtu} {device} {dir} (a folder of that host), {dir_there}, and
{side} {other} ("a" and "b"). A command is a list of words, or one text that is split as a shell
does it; it runs on the host that is being set up.
"""

from __future__ import annotations

import shlex
import shutil
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from udptun.lab import Host, Lab, Link, Unavailable, wait_for
from udptun.lab.tools import SEARCH_PATH

from .. import profiles
from .base import Contender, PathUnderTest

DESCRIPTIONS = Path(__file__).resolve().parent
_REQUIRED = {"title", "carries", "device", "mtu", "start"}
_OPTIONAL = {"programs", "package", "profiles", "prepare", "ready", "settle", "setup", "files"}


def names() -> list[str]:
    return sorted(path.stem for path in DESCRIPTIONS.glob("*.toml"))


def installed_names() -> tuple[str, ...]:
    """Return the names of the described contenders whose programs are installed."""
    return tuple(name for name in names() if not missing(_read(name)))


def load(name: str) -> Contender:
    return contender(name, _read(name))


def _read(name: str) -> dict[str, Any]:
    return parse((DESCRIPTIONS / f"{name}.toml").read_text(), name)


def parse(text: str, name: str) -> dict[str, Any]:
    """Return the description; ValueError if it is not valid."""
    try:
        description = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{name}: {e}") from None
    if lacking := _REQUIRED - description.keys():
        raise ValueError(f"{name}: missing {_listed(lacking)}")
    if unknown := description.keys() - _REQUIRED - _OPTIONAL:
        raise ValueError(
            f"{name}: unknown {_listed(unknown)}; expected {_listed(_REQUIRED | _OPTIONAL)}"
        )
    if bad := set(description.get("profiles", ())) - set(profiles.NAMES):
        raise ValueError(
            f"{name}: unknown profile {_listed(bad)}; expected {_listed(profiles.NAMES)}"
        )
    return description


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def argv(command: str | list[str], values: Mapping[str, object]) -> list[str]:
    """Fill the placeholders of a command. It is split first, so that a value is never split."""
    parts = shlex.split(command) if isinstance(command, str) else command
    return [part.format_map(values) for part in parts]


def contender(name: str, description: Mapping[str, Any]) -> Contender:
    """Return the contender that a description stands for."""

    def build(lab: Lab, a: Host, b: Host, link: Link) -> PathUnderTest:
        if absent := missing(description):
            package = description.get("package", "none")
            raise Unavailable(f"{', '.join(absent)} not installed (Debian package: {package})")
        inner, _ = lab.next_subnets()
        ends = {}
        for side, other, here, there, n in (("a", "b", a, b, 1), ("b", "a", b, a, 2)):
            ends[side] = here, {
                "here": here.v4, "there": there.v4, "inner": inner[n], "inner_there": inner[3 - n],
                "mtu": description["mtu"], "device": description["device"],
                "dir": lab.folder / f"{here.name}-{name}",
                "dir_there": lab.folder / f"{there.name}-{name}", "side": side, "other": other,
            }
        for host, values in ends.values():
            _write(description.get("files", {}), values)
            for command in description.get("prepare", ()):
                host.run(argv(command, values))
        for host, values in ends.values():
            _start(host, description, values)
        return PathUnderTest(
            name, a, b, link, inner[1], inner[2], description["carries"], description["mtu"],
            facts={"title": description["title"]}, warm_up_seconds=description.get("settle", 0),
        )

    return Contender(name, build, tuple(description.get("profiles", profiles.NAMES)))


def missing(description: Mapping[str, Any]) -> list[str]:
    """Return the programs of a description that are not installed."""
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
    process = host.start(argv(description["start"], values))
    if ready := description.get("ready"):
        process.wait_for_output(ready)
    device = description["device"]
    wait_for(
        lambda: host.run(["ip", "link", "show", device], check=False).returncode == 0,
        f"{device} of {process}",
    )
    for command in description.get("setup", ()):
        host.ip(" ".join(argv(command, values)))
