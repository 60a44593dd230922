"""Checks of the parts that attach pods, on a host with a kubelet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..check import Finding, Skip, check, failed, ok, warning
from ..facts import Facts
from ..processes import named

CONFIG_DIR = Path("/etc/cni/net.d")
PLUGIN_DIR = Path("/opt/cni/bin")
PLUGINS = ("flannel", "udptun")
NEEDED = ("bridge", "host-local", "loopback")


def kubelet_is_here() -> bool:
    return bool(named("kubelet", "k3s-agent", "k3s-server", "k0s", "rke2"))


@check("cni", "the CNI configuration and plugins, on a host with a kubelet", "cni.md")
def cni(facts: Facts) -> Iterator[Finding]:
    if not kubelet_is_here():
        raise Skip("no kubelet runs here")
    if not CONFIG_DIR.is_dir() and not PLUGIN_DIR.is_dir():
        raise Skip(f"{CONFIG_DIR} and {PLUGIN_DIR} are not visible here")
    configs = sorted(path for path in CONFIG_DIR.glob("*") if path.suffix in (
        ".conf", ".conflist", ".json"))
    if not configs:
        yield failed(f"{CONFIG_DIR} has no configuration: no pod can be attached",
                     remedy="run: udptun cni install --conflist FILE")
        return
    used = _types(configs[0])
    if not set(used) & set(PLUGINS):
        yield warning(f"the container runtime uses {configs[0]}, which does not use udptun",
                      f"its plugins: {', '.join(used) or 'none'}",
                      f"remove the file, or give it a name after that of udptun in {CONFIG_DIR}")
        return
    for name in (*used, *NEEDED):
        if not (PLUGIN_DIR / name).exists():
            yield failed(f"the CNI plugin {name} is missing: no pod can be attached",
                         f"{PLUGIN_DIR / name} does not exist", "run: udptun cni install")
    yield ok(f"{configs[0]} uses {', '.join(used)}")


def _types(path: Path) -> list[str]:
    try:
        config = json.loads(path.read_bytes())
        plugins = config.get("plugins", [config])
        return [str(plugin["type"]) for plugin in plugins]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


CHECKS = (cni,)
