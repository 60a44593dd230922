"""Check the direction of all imports. The files are parsed, so imports inside functions count too.

A module follows the rule with the longest matching name. It may import the modules that its rule
names, and their submodules. Each third-party package may be imported only by the modules that
THIRD_PARTY names.
"""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from udptun.leases.sources import SOURCES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "udptun"
OWN = ("udptun", "bench", "tests", "scripts")  # directories with Python files

LEAVES = {
    "answers", "build", "connections", "drops", "env_file", "errors", "files", "flows",
    "instance", "model", "notify", "privileges", "repairs", "spans", "text", "wait", "_version",
}
RULES = {
    "answers": set(),
    "build": set(),
    "errors": {"text"},
    "text": set(),
    "files": set(),
    "drops": set(),
    "flows": set(),
    "privileges": set(),
    "repairs": set(),
    "spans": set(),
    "wait": set(),
    "connections": set(),
    "instance": {"errors", "files"},
    "notify": {"errors", "model"},
    "_version": set(),
    "model": {"errors"},
    "env_file": {"errors"},
    "cni": LEAVES | {"cni"},
    "probe": LEAVES | {"probe"},
    "takeover": LEAVES | {"takeover"},
    "device": LEAVES | {"device"},
    "net": LEAVES | {"device", "net"},
    "control.protocol": {"errors", "model"},
    "control.client": {"answers", "errors", "model", "control.protocol"},
    "control": LEAVES | {"control"},
    "forwarder": LEAVES | {
        "_core", "control.events", "control.flannel", "control.listen", "control.metrics",
        "control.scrape", "control.server", "control.sockets",
        "device", "forwarder", "net", "probe", "takeover",
    },
    "leases": LEAVES | {"leases"},
    "node.backends": LEAVES | {
        "leases", "net", "node.backends", "node.config", "node.host.interface", "node.process",
        "node.status.report", "probe",
    },
    "node.host": LEAVES | {"leases", "net", "node.config", "node.host", "node.status.report"},
    "node.paths": LEAVES | {
        "control.client", "net.conntrack", "net.icmp", "node.backends", "node.malloc",
        "node.paths", "node.status.report", "probe",
    },
    "node.process": LEAVES | {
        "control.client", "control.protocol", "node.process", "node.status.report", "takeover",
    },
    "node.status": LEAVES | {
        "control.client", "control.events", "control.families", "control.http",
        "control.peer_series", "control.protocol", "control.scrape", "control.sockets", "leases",
        "node.backends", "node.host.conntrack", "node.host.interface", "node.status",
    },
    "node": LEAVES | {
        "control.client", "control.listen", "control.scrape", "leases", "net", "node", "probe",
    },
    "lab": LEAVES | {"lab"},
    "doctor": LEAVES | {
        "cni.node", "control.client", "control.protocol", "device.offload", "doctor", "leases",
        "net", "node.host", "node.process.launch",
    },
    "cli": LEAVES | {
        "cli", "cni", "control.client", "control.listen", "control.protocol", "control.served",
        "device.offload", "device.tun", "doctor", "forwarder", "lab", "leases", "net.echo",
        "net.kernel_path", "node", "takeover.kept", "takeover.standby",
    },
    "__main__": {"cli"},
    "": LEAVES | {"control.client", "forwarder"},  # udptun/__init__.py: the public API
}
THIRD_PARTY = {
    "aiohttp": {"cli.web.server", "control.served", "control.server", "leases.kube"},
    "click": {"cli"},
    "google": {"leases.etcd"},  # protobuf
    "grpc": {"leases.etcd"},
    "msgspec": {"leases"},
    "prometheus_client": {"control.families", "control.metrics", "node.status.metrics"},
    "pyroute2": {"net.netlink", "net.underlay", "net.vxlan"},
    "uvloop": {"cli.forward", "forwarder"},
    "yaml": {"leases.kube"},
}
EXTENSIONS = {"_core"}


def covers(name, module):
    return module == name or module.startswith(f"{name}.")


def module_name(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path, root, modules):
    """Yield (line, package, module) of each import; package "" is udptun."""
    here = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else ()
            base = ".".join(filter(None, (*above, node.module or "")))
            base = f"{root.name}.{base}".rstrip(".") if node.level else base
            names = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, name in names:
            package, _, module = base.partition(".")
            if package != root.name:
                yield node.lineno, package, ""
                continue
            inner = f"{module}.{name}".lstrip(".") if name else module
            yield node.lineno, "", inner if inner in modules else module


def violations(root, rules, third_party):
    """Return one message for each import that no rule allows."""
    paths = sorted(root.rglob("*.py"))
    modules = {module_name(path, root) for path in paths} | EXTENSIONS
    found = []
    for path in paths:
        module = module_name(path, root)
        rule = max((name for name in rules if covers(name, module)), key=len, default=None)
        if rule is None:
            found.append(f"{module}: no rule covers it")
            continue
        for line, package, target in imported(path, root, modules):
            where = f"{module}:{line}"
            if not package:
                if not any(covers(name, target) for name in rules[rule]):
                    found.append(f"{where} imports {target or 'the public API'}")
            elif package in third_party:
                if not any(covers(home, module) for home in third_party[package]):
                    found.append(f"{where} imports {package}")
            elif package not in sys.stdlib_module_names:
                found.append(f"{where} imports {package}, which no rule allows")
    return found


def test_imports_follow_the_rules():
    assert violations(PACKAGE, RULES, THIRD_PARTY) == []


def canonical(distribution):
    """Return the name in the form in which all spellings of a distribution's name are equal."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def declared_for(top, *inner):
    """Return the distributions that pyproject.toml declares for the module at this path.

    A package of leases that is an extra has the extra's requirements, the rest of udptun has only
    the requirements that are always installed. Programs of the checkout have all.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    if top != "udptun":
        chosen = [project["build-system"]["requires"], *extras.values()]
    else:
        chosen = [
            extras[source.extra] for source in SOURCES
            if source.extra and inner[:2] == ("leases", source.module.split(".")[1])
        ]
    requirements = [*project["project"]["dependencies"], *(one for each in chosen for one in each)]
    return {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def undeclared(root, paths):
    """Return one message for each import of a package that pyproject.toml does not declare.

    A package that is installed only as a dependency of another package counts as undeclared.
    """
    distributions = packages_distributions()
    found = []
    for path in paths:
        parts = path.relative_to(root).parts
        declared = declared_for(*parts)
        # a script has its own directory in sys.path; setup.py and some tests add this directory
        scripts = {each.stem for each in (root / "scripts").glob("*.py")}
        if parts[0] not in {"scripts", "setup.py", "tests"}:
            scripts = set()
        for line, package, _ in imported(path, root / parts[0], set()):
            if package and package not in (*sys.stdlib_module_names, *OWN, *scripts):
                names = distributions.get(package, [package])  # not installed: the usual name
                if declared.isdisjoint(map(canonical, names)):
                    found.append(f"{'/'.join(parts)}:{line} imports {package}")
    return found


def test_every_imported_package_is_declared():
    paths = [ROOT / "setup.py", *(path for top in OWN for path in (ROOT / top).rglob("*.py"))]
    assert len(paths) > 200
    assert undeclared(ROOT, paths) == []


@pytest.mark.parametrize(("module", "statement"), [
    ("udptun/leases/kube/x.py", "import yarl"),  # installed only because of aiohttp
    ("udptun/leases/kube/x.py", "def f():\n    from multidict import CIMultiDict"),
    ("udptun/leases/etcd/x.py", "import yaml"),  # declared, but for another extra
    ("udptun/leases/cache.py", "import msgspec"),
    ("udptun/node/x.py", "import scapy"),  # declared for the tests only
    ("bench/x.py", "import numpy"),
])
def test_an_undeclared_import_is_found(module, statement, tmp_path):
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(statement)
    assert len(undeclared(tmp_path, [path])) == 1


def documented_rules(text):
    """Return the table of imports in docs/design.md, in the form of RULES."""
    section = text.partition("\n## Imports point one way\n")[2].partition("\n## ")[0]
    block = section.split("```")[1]
    rules = {}
    for line in re.sub(r",\s*\n\s+", ", ", block).strip().splitlines():
        names, targets = (re.split(r",\s*", side.strip()) for side in line.split("->"))
        for name in names:
            rule = "" if name == "udptun/__init__.py" else name
            assert rule not in rules
            rules[rule] = set()
            for target in targets:
                rules[rule] |= {"nothing": set(), "leaves": LEAVES, "itself": {rule}}.get(
                    target, {target}
                )
    return rules


def test_the_table_in_the_design_document_has_the_rules():
    assert documented_rules((PACKAGE.parent / "docs" / "design.md").read_text()) == RULES


def test_the_rules_have_no_cycle():
    """Cycles between top-level packages are errors; within a package they are not checked."""
    packages = {}
    for name, allowed in RULES.items():
        package = name.partition(".")[0] or "udptun"
        packages.setdefault(package, set()).update(target.partition(".")[0] for target in allowed)
    graph = {package: targets - {package} for package, targets in packages.items()}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("path", "source", "want"),
    [
        ("errors.py", "from .model import Route", "errors:1 imports model"),
        ("model.py", "from .drops import ENCAP", "model:1 imports drops"),
        ("leases/base.py", "from ..device.tun import Tun", "leases.base:1 imports device.tun"),
        ("leases/base.py", "from .. import _core", "leases.base:1 imports _core"),
        ("leases/base.py", "import scapy", "leases.base:1 imports scapy, which no rule allows"),
        ("device/tun.py", "import udptun.leases.base", "device.tun:1 imports leases.base"),
        ("device/tun.py", "from ..forwarder import Forwarder", "device.tun:1 imports forwarder"),
        ("forwarder/a.py", "from .. import leases", "forwarder.a:1 imports leases"),
        ("forwarder/a.py", "from .. import cut", "forwarder.a:1 imports the public API"),
        ("forwarder/a.py", "from ..control import client",
         "forwarder.a:1 imports control.client"),
        ("forwarder/a.py", "def f():\n    from udptun.cli import main",
         "forwarder.a:2 imports cli"),
        ("forwarder/a.py", "import os\nimport pyroute2.netlink as n",
         "forwarder.a:2 imports pyroute2"),
        ("net/udp.py", "from pyroute2 import IPRoute", "net.udp:1 imports pyroute2"),
        ("control/client.py", "import aiohttp", "control.client:1 imports aiohttp"),
        ("control/client.py", "from .server import ControlServer",
         "control.client:1 imports control.server"),
        ("leases/etcd.py", "from ..forwarder import Forwarder",
         "leases.etcd:1 imports forwarder"),
        ("cli/route.py", "if TYPE_CHECKING:\n    from ..net.netlink import Netlink",
         "cli.route:2 imports net.netlink"),
        ("cli/route.py", "from . import lazy\nfrom .. import device",
         "cli.route:2 imports device"),
        ("stray.py", "import os", "stray: no rule covers it"),
    ],
)
def test_the_check_finds_each_wrong_import(tmp_path, path, source, want):
    """The tree has one wrong import, and the message names it."""
    root = tmp_path / "udptun"
    for clean in (
        "__init__.py", "errors.py", "model.py", "drops.py", "cli/__init__.py", "cli/lazy.py",
        "control/client.py", "control/server.py", "device/__init__.py", "device/tun.py",
        "forwarder/__init__.py", "leases/etcd.py", "net/netlink.py", "net/udp.py",
        "leases/__init__.py", "leases/base.py",
    ):
        (root / clean).parent.mkdir(parents=True, exist_ok=True)
        (root / clean).write_text("import os\nfrom typing import Any\n")
    (root / "net/netlink.py").write_text("import pyroute2\nfrom ..errors import DeviceError\n")
    (root / "forwarder/__init__.py").write_text("from .. import _core\nfrom ..device import tun\n")
    (root / "cli/lazy.py").write_text("import click\nfrom ..control.client import ControlClient\n")
    assert violations(root, RULES, THIRD_PARTY) == []
    (root / path).write_text(source)
    assert violations(root, RULES, THIRD_PARTY) == [want]


def private_imports(path):
    """Yield the line of each import of a name with an underscore from another module of ours."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from (f"{path.name}:{node.lineno}: {alias.name}" for alias in node.names
                        if re.match("_(?!core$|version$)[a-z]", alias.name))


def test_private_names_are_used_only_in_their_module(tmp_path):
    found = [use for path in sorted(PACKAGE.rglob("*.py")) for use in private_imports(path)]
    assert found == []
    (tmp_path / "bad.py").write_text("from .. import _core\nfrom .show import _size\n")
    assert [*private_imports(tmp_path / "bad.py")] == ["bad.py:2: _size"]


def loaded_by(statement):
    """Return the names in sys.modules after one statement in a new interpreter."""
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True,
        cwd=PACKAGE.parent, timeout=60,
    )
    return set(result.stdout.split())


CLIENT = "udptun.cli.route, udptun.cli.show, udptun.cli.stop, udptun.cli.version"


@pytest.mark.parametrize(
    "statement",
    ["import udptun", "import udptun.cli", f"import {CLIENT}, udptun.control.client"],
)
def test_client_commands_import_no_large_module(statement):
    heavy = {
        "aiohttp", "asyncio", "prometheus_client", "pyroute2", "uvloop", "udptun._core",
        "udptun.forwarder", "udptun.net",
    }
    assert not loaded_by(statement) & heavy


def test_the_public_api_imports_the_forwarder_on_demand():
    """Also shows that ``loaded_by`` finds large modules."""
    assert loaded_by("from udptun import Forwarder") >= {"uvloop", "udptun._core"}
