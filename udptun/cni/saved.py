"""The saved configurations of the delegate: DEL, CHECK and GC use what ADD has used.

Owns: the files in the data directory. One file has the configuration of one attachment, as JSON,
with the mode 0600 because a configuration may contain secrets. With the type flannel, the names and
the contents are those of flannel's plugin, so each of the two plugins can remove the pods of the
other. Its file names have no interface name; those of the type udptun have.

``udptun.files`` is not used, because importing pathlib takes too long. The files need not survive a
crash of the machine: no pod does.
"""

from __future__ import annotations

import json
import os

from .request import DATA_DIRS, FLANNEL

TYPE_CHECKING = False  # see udptun/cni/__init__.py
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from .request import Request

ANY_INTERFACE = ""  # of a file in flannel's format


class Saved:
    """The saved configurations of one network. Methods raise OSError."""

    def __init__(self, request: Request) -> None:
        self._network, self._directory = request.name, request.data_dir
        self._is_flannel = request.type == FLANNEL

    def write(self, container_id: str, ifname: str, config: dict[str, Any]) -> None:
        path = self._path(container_id, ifname)
        os.makedirs(self._directory, 0o700, exist_ok=True)
        # no other process writes the file of this attachment, but GC may read it
        fresh = f"{self._directory}/.{os.path.basename(path)}.{os.getpid()}"
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(config, file)
            os.replace(fresh, path)
        except OSError:
            os.unlink(fresh)
            raise

    def read(self, container_id: str, ifname: str) -> dict[str, Any] | None:
        """Return the configuration. None: there is none. {}: it cannot be parsed."""
        path = self._find(container_id, ifname)
        return None if path is None else _load(path)

    def remove(self, container_id: str, ifname: str) -> None:
        """Remove the file that ``read`` reads, if there is one."""
        path = self._find(container_id, ifname)
        if path is not None:
            _remove(path)

    def attachments(self) -> Iterator[tuple[str, str]]:
        """Yield the container and the interface of each saved configuration of this network."""
        for name in _names(self._directory):
            if self._is_flannel:
                config = _load(f"{self._directory}/{name}")
                if config is not None and config.get("name") == self._network:
                    yield name, ANY_INTERFACE
            elif name.startswith(f"{self._network}:") and name.count(":") == 2:
                _, container_id, ifname = name.split(":")
                yield container_id, ifname

    def _path(self, container_id: str, ifname: str) -> str:
        if self._is_flannel:
            return f"{self._directory}/{container_id}"
        return f"{self._directory}/{self._network}:{container_id}:{ifname}"

    def _find(self, container_id: str, ifname: str) -> str | None:
        """Return the path of the file of an attachment, or None if there is none.

        flannel's plugin may have attached the pod, before the configuration had the type udptun.
        """
        path = self._path(container_id, ifname)
        if os.path.lexists(path):
            return path
        former = f"{DATA_DIRS[FLANNEL]}/{container_id}"
        if not self._is_flannel and (_load(former) or {}).get("name") == self._network:
            return former
        return None


def _load(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            config = json.loads(file.read())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _names(directory: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except FileNotFoundError:
        return []
