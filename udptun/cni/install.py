"""Install the CNI plugin on a host, and remove it: launchers, interpreter tree, conflist.

Owns the layout of the directory ``.udptun`` in the directory of the CNI plugins, and says which
files are ours. All files are replaced atomically, so a container runtime can start the plugin at
any time. The plugin itself does not import this module, so it may import slow modules. Raises
CniError and OSError. One process at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import FileLock, replace_file
from .failure import BAD_CONFIG, IO_FAILURE, CniError
from .request import FLANNEL, OURS, parse_config

LAUNCHERS = (OURS, FLANNEL)
PLUGINS = ("bridge", "host-local", "loopback", "portmap")
HOME = ".udptun"
CURRENT, REPLACED, RECORD = "current", "replaced", "installed.json"
CONFLIST = "10-udptun.conflist"
_CONFIG_SUFFIXES = (".conf", ".conflist", ".json")
_PROGRAM = 0o755


class Installation:
    """The plugin in the directory ``bin_dir``, and its conflist in ``conf_dir``.

    log  the changes, as sentences
    """

    def __init__(self, bin_dir: Path, conf_dir: Path) -> None:
        self._bin, self._home = bin_dir, bin_dir / HOME
        self._conflist = conf_dir / CONFLIST
        self._record = self._read_record()
        self.log: list[str] = []

    def install(self, source: Path, plugins: Path, conflist: Path | None) -> None:
        """Install, or update an installation.

        source    the directory that scripts/cni_tree.py has made
        plugins   the directory with bridge, host-local and others; those that the host has are kept
        conflist  the network configuration
        """
        launcher = source / "launcher"
        if not launcher.is_file():
            raise CniError(IO_FAILURE, f"{source} has no launcher: make it with "
                           "scripts/cni_tree.py")
        config = None if conflist is None else checked_conflist(conflist)
        self._home.mkdir(mode=_PROGRAM, parents=True, exist_ok=True)
        lock = FileLock.wait(self._home / "lock")
        try:
            self._record = self._read_record()
            former = self._switch(self._copy_tree(source / "tree"))
            for name in LAUNCHERS:
                self._install_launcher(name, launcher.read_bytes())
            for name in PLUGINS:
                self._install_plugin(name, plugins / name)
            if config is not None:
                self._install_conflist(config)
            self._remove_trees(keep={_link(self._home / CURRENT), former})
        finally:
            lock.release()

    def uninstall(self) -> None:
        """Remove what ``install`` has installed and nobody has changed since. Restore what it has
        replaced. Succeeds if nothing is installed."""
        if _is_ours(self._conflist):
            self._remove(self._conflist)
        for name, digest in self._record.items():
            if _digest(self._bin / name) == digest:
                self._remove(self._bin / name)
        for name in LAUNCHERS:
            kept = self._home / REPLACED / name
            if kept.exists() and not (self._bin / name).exists():
                kept.replace(self._bin / name)
                self.log.append(f"restored {self._bin / name}")
        if self._home.exists():
            shutil.rmtree(self._home)
            self.log.append(f"removed {self._home}")

    # The interpreter tree

    def _copy_tree(self, tree: Path) -> str:
        """Copy the tree unless it is there. Return the name of its directory."""
        name = _tree_digest(tree)
        target = self._home / name
        if not target.exists():
            fresh = self._home / f".{name}"
            shutil.rmtree(fresh, ignore_errors=True)  # of an installation that was killed
            shutil.copytree(tree, fresh)
            fresh.replace(target)
            self.log.append(f"copied the interpreter to {target}")
        return name

    def _switch(self, name: str) -> str:
        """Make the tree the current one. Return the name of the former one, or ""."""
        link, fresh = self._home / CURRENT, self._home / f".{CURRENT}"
        former = _link(link)
        if former != name:
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(name)
            fresh.replace(link)
        return former

    def _remove_trees(self, keep: set[str]) -> None:
        """Remove older trees. A plugin that runs now may use the former one."""
        for path in self._home.iterdir():
            if path.is_dir() and not path.is_symlink() and path.name not in (REPLACED, *keep):
                shutil.rmtree(path)

    # Programs

    def _install_launcher(self, name: str, content: bytes) -> None:
        path = self._bin / name
        if path.exists() and _digest(path) not in (self._record.get(name), _sha(content)):
            kept = self._home / REPLACED / name
            kept.parent.mkdir(exist_ok=True)
            # a link, so that there is a plugin at each moment
            kept.unlink(missing_ok=True)
            os.link(path, kept)
            self.log.append(f"kept the former {path} as {kept}")
        self._write(name, content)

    def _install_plugin(self, name: str, source: Path) -> None:
        path = self._bin / name
        if path.exists() and _digest(path) != self._record.get(name):
            return  # the host's
        if source.is_file():
            self._write(name, source.read_bytes())
        elif not path.exists():
            raise CniError(IO_FAILURE, f"neither {path} nor {source} exists: install the plugins "
                           "of the project containernetworking")

    def _write(self, name: str, content: bytes) -> None:
        path, digest = self._bin / name, _sha(content)
        if self._record.get(name) != digest:
            self._record[name] = digest
            self._write_record()  # first, so that an interrupted installation can be removed
        if _digest(path) != digest:
            replace_file(path, [content], _PROGRAM)
            self.log.append(f"wrote {path}")

    # The conflist

    def _install_conflist(self, content: bytes) -> None:
        path = self._conflist
        if path.exists() and not _is_ours(path):
            self.log.append(f"{path} has no plugin of the type {OURS}, so it is not changed")
        elif not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, [content], 0o644)
            self.log.append(f"wrote {path}")
        first = min((one.name for one in path.parent.iterdir()
                     if one.suffix in _CONFIG_SUFFIXES), default=path.name)
        if first != path.name:
            self.log.append(f"{path.parent / first} comes before {path.name} in the alphabet, so "
                            "the container runtime uses that file")

    # The record

    def _read_record(self) -> dict[str, str]:
        """Return the digests of our programs, by name."""
        try:
            found: Any = json.loads((self._home / RECORD).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return {name: digest for name, digest in found.items()
                if name in (*LAUNCHERS, *PLUGINS)} if isinstance(found, dict) else {}

    def _write_record(self) -> None:
        text = json.dumps(self._record, indent=1, sort_keys=True) + "\n"
        replace_file(self._home / RECORD, [text.encode()], 0o644)

    def _remove(self, path: Path) -> None:
        path.unlink()
        self.log.append(f"removed {path}")


def checked_conflist(conflist: Path) -> bytes:
    """Return the text of a conflist that this plugin can use. Raises CniError."""
    text = conflist.read_bytes()
    config = parse_config(text)
    if not isinstance(config.get("name"), str) or OURS not in _types(config):
        raise CniError(BAD_CONFIG, f"{conflist}: expected a name, and a plugin of the type {OURS}")
    return text


def _is_ours(conflist: Path) -> bool:
    try:
        return OURS in _types(parse_config(conflist.read_bytes()))
    except (CniError, OSError):
        return False


def _types(config: dict[str, Any]) -> Iterable[object]:
    plugins = config.get("plugins")
    entries = plugins if isinstance(plugins, list) else []
    return [entry.get("type") for entry in entries if isinstance(entry, dict)]


def _link(path: Path) -> str:
    return path.readlink().name if path.is_symlink() else ""


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest(path: Path) -> str | None:
    return _sha(path.read_bytes()) if path.is_file() else None


def _tree_digest(tree: Path) -> str:
    """Return a name that is different for different trees."""
    digest = hashlib.sha256()
    for path in sorted(tree.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(tree)}\0{path.stat().st_mode:o}\0".encode())
            digest.update(_sha(path.read_bytes()).encode())
    return digest.hexdigest()[:16]
