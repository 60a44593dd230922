"""Checks of the parts that attach pods, on a host with a kubelet."""

from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Iterable, Iterator
from glob import glob
from pathlib import Path
from typing import Any

from ..check import Finding, Result, Skip, check, failed, ok, warning
from ..facts import Facts
from ..processes import command_line, named, option_of

log = logging.getLogger(__name__)

RUNTIME_CONFIG = Path("/etc/containerd/config.toml")
CONFIG_DIR = Path("/etc/cni/net.d")  # if the runtime has no other setting
PLUGIN_DIR = Path("/opt/cni/bin")
PLUGINS = ("flannel", "udptun")
NEEDED = ("bridge", "host-local", "loopback")
# They start a containerd of their own, with a configuration file of their own.
WITH_CONTAINERD = ("k3s-agent", "k3s-server", "k0s", "rke2")

Directories = tuple[Path, Path]  # of CNI configurations, and of CNI plugins


def kubelet_is_here() -> bool:
    return bool(named("kubelet", *WITH_CONTAINERD))


def runtime_configs() -> list[Path]:
    """Return the configuration files of the containerds that run here and can serve a kubelet."""
    found = []
    for pid, _ in named("containerd"):
        argv = command_line(pid)
        given = option_of(argv, "config") or option_of(argv, "c")
        path = RUNTIME_CONFIG if given is None else Path(given)
        if not any("cri" in str(table.get("disabled_plugins", "")) for table in _tables(path)):
            found.append(path)  # else it is the one of Docker
    # k3s, rke2 and k0s use the containerd that they start, not that of the distribution.
    others = [path for path in found if path != RUNTIME_CONFIG]
    return others if others and named(*WITH_CONTAINERD) else found


def directories(configs: Iterable[Path]) -> dict[Directories, Path]:
    """Return the directories of the containerds with these configurations, each with the first
    configuration that names it. Without a containerd, these are the default directories."""
    found: dict[Directories, Path] = {}
    for path in configs:
        settings: dict[str, Any] = {}
        for table in _tables(path):
            for plugin in table.get("plugins", {}).values():
                settings |= plugin.get("cni", {})
        plugins = [*settings.get("bin_dirs", ()), settings.get("bin_dir"), PLUGIN_DIR]
        found.setdefault((Path(settings.get("conf_dir") or CONFIG_DIR),
                          Path(next(one for one in plugins if one))), path)
    return found or {(CONFIG_DIR, PLUGIN_DIR): RUNTIME_CONFIG}


def _tables(path: Path) -> list[dict[str, Any]]:
    """Return the content of a configuration file of containerd, and of the files that it names."""
    try:
        main = tomllib.loads(path.read_text())
        files = [Path(file) for name in main.get("imports", ())
                 for file in sorted(glob(name, root_dir=path.parent))]  # noqa: PTH207 - it may be absolute
        return [main, *(tomllib.loads((path.parent / file).read_text()) for file in files)]
    except (OSError, ValueError) as error:
        log.debug("%s cannot be read: %s", path, error)
        return []


def _install(config_dir: Path, plugin_dir: Path) -> str:
    """Return the command that installs the plugin in these directories."""
    command = "run: udptun cni install"
    if plugin_dir != PLUGIN_DIR:
        command += f" --bin-dir {plugin_dir}"
    return command if config_dir == CONFIG_DIR else f"{command} --conf-dir {config_dir}"


@check("cni", "the CNI configuration and plugins, on a host with a kubelet", "cni.md")
def cni(facts: Facts) -> Iterator[Finding]:
    if not kubelet_is_here():
        raise Skip("no kubelet runs here")
    runtimes = directories(runtime_configs())
    if not any(path.is_dir() for pair in runtimes for path in pair):
        raise Skip(" and ".join(str(path) for pair in runtimes for path in pair)
                   + " are not visible here")
    for (config_dir, plugin_dir), file in runtimes.items():
        for found in _look(config_dir, plugin_dir):
            yield found if len(runtimes) == 1 else _unless_unused(found, file)


def _unless_unused(found: Finding, file: Path) -> Finding:
    """Return what a finding means while it is not known which containerd the kubelet uses."""
    if found.result is Result.OK:
        return found
    return warning(f"if the kubelet uses the containerd of {file}: {found.text}", found.evidence,
                   f"if it does, {found.remedy}")


def _look(config_dir: Path, plugin_dir: Path) -> Iterator[Finding]:
    configs = sorted(path for path in config_dir.glob("*") if path.suffix in (
        ".conf", ".conflist", ".json"))
    if not configs:
        yield failed(f"{config_dir} has no configuration: no pod can be attached",
                     remedy=f"{_install(config_dir, plugin_dir)} --conflist FILE")
        return
    used = _types(configs[0])
    if not set(used) & set(PLUGINS):
        yield warning(f"the container runtime uses {configs[0]}, which does not use udptun",
                      f"its plugins: {', '.join(used) or 'none'}",
                      f"remove the file, or give it a name after that of udptun in {config_dir}")
        return
    for name in (*used, *NEEDED):
        if not (plugin_dir / name).exists():
            yield failed(f"the CNI plugin {name} is missing: no pod can be attached",
                         f"{plugin_dir / name} does not exist",
                         _install(config_dir, plugin_dir))
    yield ok(f"{configs[0]} uses {', '.join(used)}")


def _types(path: Path) -> list[str]:
    try:
        config = json.loads(path.read_bytes())
        plugins = config.get("plugins", [config])
        return [str(plugin["type"]) for plugin in plugins]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


CHECKS = (cni,)
