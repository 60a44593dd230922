"""What the container runtime asks: the environment variables and the network configuration.

Owns: the names of the variables and of our keys in the configuration, and their checks. Both come
from files and programs of others, so every value is checked before it is used, for example in a
path. Does not read the state of the node.
"""

from __future__ import annotations

import json
import re

from ..errors import FieldError
from ..text import shown
from .failure import BAD_CONFIG, BAD_CONTENT, BAD_ENVIRONMENT, INCOMPATIBLE_VERSION, CniError
from .versions import OLDEST, SUPPORTED, has_command

TYPE_CHECKING = False  # see udptun/cni/__init__.py
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

MAX_INPUT = 4 * 1024 * 1024  # bytes of the configuration; a list of 10,000 attachments has 1 MB
MAX_WAIT = 60.0
FLANNEL, OURS = "flannel", "udptun"  # the names under which the plugin is installed
# equal to Instance().subnet_file and .node_socket (tested); importing it takes too long
SUBNET_FILE = "/run/flannel/subnet.env"
NODE_SOCKET = "/run/udptun/node.sock"
DATA_DIRS = {FLANNEL: "/var/lib/cni/flannel", OURS: "/var/lib/cni/udptun"}
ATTACHMENTS = "cni.dev/valid-attachments"

COMMANDS = ("ADD", "DEL", "CHECK", "STATUS", "GC", "VERSION")
_NEEDED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"),
    "GC": ("CNI_PATH",),
    "STATUS": ("CNI_PATH",),
}
_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,250}")  # becomes a part of a file name
_ID_TEXT = "letters, digits, _ . and -, beginning with a letter or digit, at most 251"
_IFNAME = re.compile(r"(?!\.{1,2}$)[^/:\s\0]{1,15}")
_PLUGIN = re.compile(r"[^/\0]{1,255}")


class Request:
    """One command with its environment and configuration.

    version       the configuration's version
    config        the whole configuration
    container_id  "" for STATUS and GC
    """

    def __init__(self, environ: Mapping[str, str], text: bytes) -> None:
        """Raises CniError."""
        self.command = command_of(environ)
        self.config = parse_config(text)
        self.version = version_of(self.config)
        if not has_command(self.version, self.command):
            raise CniError(INCOMPATIBLE_VERSION, f"cniVersion {self.version} has no command "
                           f"{self.command}")
        missing = [name for name in _NEEDED[self.command] if not environ.get(name)]
        if missing:
            raise CniError(BAD_ENVIRONMENT, f"{self.command} needs the variables "
                           f"{', '.join(missing)}")
        self.container_id = _variable(environ, "CNI_CONTAINERID", _ID, _ID_TEXT)
        self.ifname = _variable(
            environ, "CNI_IFNAME", _IFNAME, "the name of a network interface")
        self.path = [part for part in environ["CNI_PATH"].split(":") if part.startswith("/")]
        self.environ = environ
        self.name = _string(self.config, "name")
        if not _ID.fullmatch(self.name):
            raise invalid("name", self.name, _ID_TEXT)
        self.type = _string(self.config, "type", OURS)

    # Our keys in the configuration

    @property
    def files(self) -> tuple[str, str]:
        """The paths of subnet.env and of the node daemon's socket."""
        name = _string(self.config, "instance", OURS)
        subnet_file, socket = SUBNET_FILE, NODE_SOCKET
        if name != OURS:
            from ..instance import Instance

            try:
                instance = Instance(name)
            except FieldError as error:
                raise CniError(BAD_CONFIG, str(error)) from None
            subnet_file, socket = str(instance.subnet_file), str(instance.node_socket)
        return (_path(self.config, "subnetFile", subnet_file),
                _path(self.config, "nodeSocket", socket))

    @property
    def data_dir(self) -> str:
        """The directory with the saved configurations of the delegate."""
        return _path(self.config, "dataDir", DATA_DIRS.get(self.type, DATA_DIRS[OURS]))

    @property
    def wait(self) -> float:
        """For so many seconds, ADD waits until the node is ready."""
        value = self.config.get("waitSeconds", 10)
        if isinstance(value, bool) or not isinstance(value, int | float) or (
            not 0 <= value <= MAX_WAIT
        ):
            raise invalid("waitSeconds", value, f"a number from 0 to {MAX_WAIT:.0f}")
        return float(value)

    @property
    def delegate(self) -> dict[str, Any]:
        """Return a copy of the delegate's settings, with the name of the delegate."""
        settings = dict(_object(self.config, "delegate"))
        for name in ("name", "ipam"):
            if name in settings:
                raise invalid(f"delegate.{name}", settings[name], "nothing: the plugin sets it")
        settings.setdefault("type", "bridge")
        check_plugin("delegate.type", settings["type"])
        return settings

    @property
    def ipam(self) -> dict[str, Any]:
        """Return a copy of the settings for the IPAM plugin, with its name and the routes."""
        settings = dict(_object(self.config, "ipam"))
        settings.setdefault("type", "host-local")
        check_plugin("ipam.type", settings["type"])
        routes = settings.get("routes")
        if routes is not None and not isinstance(routes, list):
            raise invalid("ipam.routes", routes, "a list of routes")
        return settings

    @property
    def runtime_config(self) -> dict[str, Any]:
        return _object(self.config, "runtimeConfig")

    @property
    def previous_result(self) -> dict[str, Any]:
        return _object(self.config, "prevResult")

    @property
    def attachments(self) -> set[tuple[str, str]]:
        """The container IDs and interface names that GC must keep."""
        if ATTACHMENTS not in self.config:  # an empty list would remove all attachments
            raise invalid(ATTACHMENTS, None, "the list of valid attachments")
        entries = self.config[ATTACHMENTS]
        if entries is None:  # the specification's library prints an empty list like this
            return set()
        if not isinstance(entries, list):
            raise invalid(ATTACHMENTS, entries, "a list")
        found = set()
        for number, entry in enumerate(entries):
            pair = entry if isinstance(entry, dict) else {}
            values = pair.get("containerID"), pair.get("ifname")
            if not all(isinstance(value, str) and value for value in values):
                raise invalid(f"{ATTACHMENTS}[{number}]", entry, "containerID and ifname")
            found.add((str(values[0]), str(values[1])))
        return found


def command_of(environ: Mapping[str, str]) -> str:
    command = environ.get("CNI_COMMAND", "")
    if command not in COMMANDS:
        raise CniError(
            BAD_ENVIRONMENT,
            f"CNI_COMMAND is {shown(command)}: expected one of {', '.join(COMMANDS)}; "
            "a container runtime starts this program")
    return command


def parse_config(text: bytes) -> dict[str, Any]:
    """Raises CniError."""
    if len(text) > MAX_INPUT:
        raise CniError(BAD_CONTENT, f"the configuration has more than {MAX_INPUT} bytes")
    try:
        config = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise CniError(BAD_CONTENT, "the configuration on standard input is not valid JSON",
                       str(error)) from None
    if not isinstance(config, dict):
        raise CniError(BAD_CONTENT, f"the configuration is {shown(config)[:80]}: "
                       "expected a JSON object")
    return config


def version_of(config: dict[str, Any]) -> str:
    version = config.get("cniVersion") or OLDEST
    if version not in SUPPORTED:
        raise CniError(INCOMPATIBLE_VERSION, f"cniVersion {shown(version)} is not supported: "
                       f"expected one of {', '.join(SUPPORTED)}")
    return str(version)


def check_plugin(field: str, value: object) -> None:
    """Raises CniError if ``value`` cannot be the name of another plugin."""
    if not isinstance(value, str) or not _PLUGIN.fullmatch(value) or value in (
        ".", "..", FLANNEL, OURS
    ):
        raise invalid(field, value, "the file name of another plugin, such as bridge")


def invalid(field: str, value: object, expected: str) -> CniError:
    try:
        return CniError(BAD_CONFIG, str(FieldError(field, value, expected)))
    except RecursionError:
        return CniError(BAD_CONFIG, f"{field} is nested too deeply: expected {expected}")


def _variable(
    environ: Mapping[str, str], name: str, form: re.Pattern[str], expected: str
) -> str:
    value = environ.get(name, "")
    if value and not form.fullmatch(value):
        raise CniError(BAD_ENVIRONMENT, str(FieldError(name, value, expected)))
    return value


def _string(config: dict[str, Any], name: str, default: str = "") -> str:
    value = config.get(name, default)
    if not isinstance(value, str) or not value:
        raise invalid(name, value, "a string")
    return value


def _path(config: dict[str, Any], name: str, default: str) -> str:
    value = _string(config, name, default)
    if not value.startswith("/") or "\0" in value:
        raise invalid(name, value, "an absolute path")
    return value


def _object(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(name, value, "a JSON object")
    return value
