"""Run another plugin: find its program, ask which versions it has, start it, read its answer.

Owns: the conversation with one plugin, and the conversion between our version and the plugin's.
Does not know what is in the configuration. ``subprocess`` is not used, because importing it takes
too long; the calls block until the plugin has ended.
"""

from __future__ import annotations

import json
import os
import signal
import stat

from ..text import printable
from .failure import BAD_CONTENT, INCOMPATIBLE_VERSION, INTERNAL, IO_FAILURE, CniError
from .request import check_plugin
from .versions import OLDEST, common, convert, has_command

TYPE_CHECKING = False  # see udptun/cni/__init__.py
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

MAX_OUTPUT = 4 * 1024 * 1024


class Delegate:
    """The plugin ``name``, found in the directories ``path``. Raises CniError.

    environ  the environment of our own command; a call changes only what it names
    wanted   the version of our configuration
    version  the newest version of the plugin that is not newer
    """

    def __init__(
        self, name: str, path: Iterable[str], environ: Mapping[str, str], wanted: str
    ) -> None:
        self.name, self._wanted = name, wanted
        self._program = find(name, path)
        self._environ = environ
        answer = self._run("VERSION", {"cniVersion": wanted}, {})
        offered = (answer or {}).get("supportedVersions", [OLDEST])
        version = common(wanted, offered if isinstance(offered, list) else [])
        if version is None:
            raise CniError(INCOMPATIBLE_VERSION, f"the plugin {name} has none of the versions up "
                           f"to {wanted}: it has {printable(', '.join(map(str, offered)))}")
        self.version = version

    def has(self, command: str) -> bool:
        return has_command(self.version, command)

    def call(
        self, command: str, config: Mapping[str, Any], **environ: str
    ) -> dict[str, Any] | None:
        """Run a command. Return its result in our version, or None if it printed nothing.

        environ  variables of the environment that differ from our own
        """
        sent = {**config, "cniVersion": self.version}
        if isinstance(previous := sent.get("prevResult"), dict):
            sent["prevResult"] = convert(previous, self.version)
        answer = self._run(command, sent, environ)
        return None if answer is None else convert(answer, self._wanted)

    def _run(
        self, command: str, config: Mapping[str, Any], environ: Mapping[str, str]
    ) -> dict[str, Any] | None:
        environ = {**self._environ, **environ, "CNI_COMMAND": command}
        status, output = run(self._program, json.dumps(config).encode(), environ)
        if len(output) > MAX_OUTPUT:
            raise CniError(BAD_CONTENT, f"{self.name} {command} printed more than {MAX_OUTPUT} "
                           "bytes")
        answer = _object(output)
        if status != 0:
            raise self._failure(command, status, answer, output)
        if answer is None and output.strip():
            raise CniError(BAD_CONTENT, f"{self.name} {command} printed no JSON object",
                           _text(output))
        return answer

    def _failure(
        self, command: str, status: int, answer: dict[str, Any] | None, output: bytes
    ) -> CniError:
        error = answer or {}
        code, message = error.get("code"), error.get("msg")
        if type(code) is int and code > 0 and isinstance(message, str):
            details = error.get("details")
            return CniError(code, f"{self.name}: {message}",
                            details if isinstance(details, str) else "")
        how = f"signal {-status}" if status < 0 else f"exit code {status}"
        return CniError(INTERNAL, f"{self.name} {command} ended with {how}", _text(output))


def find(name: str, path: Iterable[str]) -> str:
    """Return the path of the plugin's program. Raises CniError."""
    check_plugin("type", name)
    for directory in path:
        program = os.path.join(directory, name)
        try:
            is_file = stat.S_ISREG(os.stat(program).st_mode)
        except OSError:
            continue
        if is_file and os.access(program, os.X_OK):
            return program
    raise CniError(
        IO_FAILURE, f"the plugin {name} is not in CNI_PATH ({':'.join(path)}): install the plugins "
        "bridge and host-local of the project containernetworking")


def run(program: str, text: bytes, environ: Mapping[str, str]) -> tuple[int, bytes]:
    """Run a program with this standard input. Return its exit code, and what it printed.

    The exit code is negative if a signal ended the program. Raises CniError.
    """
    stdin = os.memfd_create("cni-config")  # a pipe could block if the program reads nothing
    reader, writer = os.pipe()
    try:
        _write(stdin, text)
        os.lseek(stdin, 0, os.SEEK_SET)
        process = os.posix_spawn(
            program, [program], environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, writer, 1)],
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ])  # Python ignores them
    except OSError as error:
        os.close(reader)
        raise CniError(IO_FAILURE, f"{program} cannot be started: {error.strerror}") from None
    finally:
        os.close(stdin)
        os.close(writer)
    try:
        output = _read(reader)
    finally:
        os.close(reader)
        _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), output


def _write(handle: int, text: bytes) -> None:
    left = memoryview(text)
    while left:
        left = left[os.write(handle, left):]


def _read(handle: int) -> bytes:
    """Return everything up to the end, or a little more than MAX_OUTPUT bytes."""
    parts, length = [], 0
    while part := os.read(handle, 65536):
        if length <= MAX_OUTPUT:
            parts.append(part)
            length += len(part)
    return b"".join(parts)


def _object(output: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(output)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def _text(output: bytes) -> str:
    return printable(output.decode(errors="replace").strip())
