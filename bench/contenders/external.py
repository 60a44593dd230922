"""Contenders described by a TOML file: any tunnel that shell commands can start.

Owns: the file format and its parsing. Main thread only, like udptun.lab. The file
bench/contenders/NAME.toml describes the tunnel NAME. Any other file is named by its path, which
ends with ``.toml``.

    title     the tunnel's name in the report
    programs  optional: the programs that the tunnel needs; if one is missing, the tunnel is not
              measured
    package   optional: the Debian package with these programs
    carries   an nft expression that matches the tunnel's packets on the wire: "udp dport 8300"
    device    the network device that the tunnel creates
    mtu       the MTU of the device
    profiles  optional: the profiles on which the tunnel works
    prepare   optional: commands that run on both hosts before the first start command
    start     the command that starts the tunnel; the command must keep running
    ready     optional: a text that the start command prints when the tunnel is up. The set-up waits
              for this text and for the device; without ``ready`` it waits for the device only
    setup     optional: commands that run when the device exists. A text is a command of ip(8)
              without the word "ip", a list of words is any command
    settle    optional: the tunnel reaches its full rate after this many seconds of pings
    [files]   optional: name = text; these files are written to {dir} first

Every text may contain placeholders. "This host" is the host that is being set up:

    {here} {there}         the underlay addresses of this host and of the other host
    {inner} {inner_there}  the addresses of the measured traffic, on this and on the other host
    {dir} {dir_there}      a folder of this host and of the other host
    {side} {other}         "a" and "b", or "b" and "a": this host and the other host
    {mtu} {device}         the values above

A command is a list of words, or one text that is split into words as a shell splits it. A command
runs on the host that is being set up. There, /run is a folder of this host alone, so that the
programs of both hosts can use the same files in it.
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

PLACEHOLDERS = (
    "here", "there", "inner", "inner_there", "dir", "dir_there", "side", "other", "mtu", "device",
)
DESCRIPTIONS = Path(__file__).resolve().parent
_REQUIRED = {"title", "carries", "device", "mtu", "start"}
_OPTIONAL = {"programs", "package", "profiles", "prepare", "ready", "settle", "setup", "files"}


def names() -> list[str]:
    return sorted(path.stem for path in DESCRIPTIONS.glob("*.toml"))


def installed_names() -> tuple[str, ...]:
    """Return the names of the contenders with a description file whose programs are installed."""
    return tuple(name for name in names() if not missing(_read(name)))


def load(name: str) -> Contender:
    """Return the contender NAME, or that of the file with this path. ValueError if it is wrong."""
    return contender(name, _read(name))


def _read(name: str) -> dict[str, Any]:
    path = Path(name) if name.endswith(".toml") else DESCRIPTIONS / f"{name}.toml"
    try:
        return parse(path.read_text(), name)
    except OSError as e:
        raise ValueError(f"contender {name!r}: {e.strerror}") from None


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
    for key, value in description.items():
        if problem := _problem(key, value):
            raise ValueError(f"{name}: {key}: {problem}")
    return description


def _problem(key: str, value: Any) -> str | None:
    """Return what is wrong with the value of a key."""
    if key in ("mtu", "settle"):
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return None if good else f"{value!r}: expected a whole number"
    if key == "files":
        texts = [*value, *value.values()] if isinstance(value, dict) else [value]
    elif key in ("programs", "profiles"):
        texts = value if isinstance(value, list) else [None]
    elif key in ("prepare", "setup"):
        texts = [word for command in value for word in _words(command)] \
            if isinstance(value, list) else [None]
    else:
        texts = _words(value) if key == "start" else [value]
    for text in texts:
        if not isinstance(text, str):
            expected = "a list of commands" if key in ("prepare", "setup") else "text"
            return f"{value!r}: expected {expected}"
        try:
            text.format_map(dict.fromkeys(PLACEHOLDERS, "x"))
        except (KeyError, IndexError, ValueError):
            known = " ".join(f"{{{one}}}" for one in PLACEHOLDERS)
            return f"{text!r}: expected only the placeholders {known}, and {{{{ for a brace"
    return None


def _words(command: Any) -> list[Any]:
    return command if isinstance(command, list) else [command]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def argv(command: str | list[str], values: Mapping[str, object]) -> list[str]:
    """Split a command into words, then fill the placeholders, so that a value is never split."""
    parts = shlex.split(command) if isinstance(command, str) else command
    return [part.format_map(values) for part in parts]


def contender(name: str, description: Mapping[str, Any]) -> Contender:
    """Return the contender for a description."""

    def build(lab: Lab, a: Host, b: Host, link: Link) -> PathUnderTest:
        if absent := missing(description):
            package = description.get("package", "none")
            raise Unavailable(f"{', '.join(absent)} not installed (Debian package: {package})")
        inner, _ = lab.next_subnets()
        label = Path(name).stem
        ends = {}
        for side, other, here, there, n in (("a", "b", a, b, 1), ("b", "a", b, a, 2)):
            ends[side] = here, {
                "here": here.v4, "there": there.v4, "inner": inner[n], "inner_there": inner[3 - n],
                "mtu": description["mtu"], "device": description["device"],
                "dir": lab.folder / f"{here.name}-{label}",
                "dir_there": lab.folder / f"{there.name}-{label}", "side": side, "other": other,
            }
        for host, values in ends.values():
            _write(description.get("files", {}), values)
            for command in description.get("prepare", ()):
                host.run(_with_own_run(argv(command, values), values))
        for host, values in ends.values():
            _start(host, description, values)
        return PathUnderTest(
            name, a, b, link, inner[1], inner[2], description["carries"], description["mtu"],
            facts={"title": description["title"]}, warm_up_seconds=description.get("settle", 0),
        )

    return Contender(name, build, tuple(description.get("profiles", profiles.NAMES)))


def missing(description: Mapping[str, Any]) -> list[str]:
    """Return the programs in a description that are not installed."""
    return [
        name for name in description.get("programs", ())
        if shutil.which(name) is None and shutil.which(name, path=SEARCH_PATH) is None
    ]


def _write(files: Mapping[str, str], values: Mapping[str, object]) -> None:
    folder = Path(str(values["dir"]))
    (folder / "run").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name.format_map(values)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format_map(values))
        path.chmod(0o700 if text.startswith("#!") else 0o600)


def _start(host: Host, description: Mapping[str, Any], values: Mapping[str, object]) -> None:
    command = argv(description["start"], values)
    process = host.start(_with_own_run(command, values), name=Path(command[0]).name)
    if ready := description.get("ready"):
        process.wait_for_output(ready)
    device = description["device"]
    wait_for(
        lambda: host.run(["ip", "link", "show", device], check=False).returncode == 0,
        f"{device} of {process}",
    )
    for command in description.get("setup", ()):
        if isinstance(command, list):
            host.run(_with_own_run(argv(command, values), values))
        else:
            host.ip(" ".join(argv(command, values)))


def _with_own_run(command: list[str], values: Mapping[str, object]) -> list[str]:
    """Return the command with a /run of this host. ``ip netns exec`` makes a mount namespace."""
    return ["sh", "-c", 'mount --bind "$0" /run && exec "$@"', f"{values['dir']}/run", *command]
