"""``udptun cni``: the CNI plugin, and its installation on a host.

Owns the options. The plugin is ``udptun.cni.plugin``. A container runtime should start the launcher
that is installed for it (docs/cni.md), because importing click takes longer than the plugin.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .lazy import Failure, failure_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..cni.install import Installation

TREE = Path("/usr/local/lib/udptun-cni")  # in our image
PLUGINS = Path("/usr/lib/cni")  # of Debian's containernetworking-plugins

_path = click.Path(path_type=Path, file_okay=False)
_bin_dir = click.option(
    "--bin-dir", type=_path, default=Path("/opt/cni/bin"), show_default=True,
    help="Directory of the host's CNI plugins.")
_conf_dir = click.option(
    "--conf-dir", type=_path, default=Path("/etc/cni/net.d"), show_default=True,
    help="Directory of the host's network configurations.")


@click.group(invoke_without_command=True)
@click.pass_context
def cni(context: click.Context) -> None:
    """Attach a pod to the overlay: the CNI plugin.

    Without a subcommand, the CNI command is in CNI_COMMAND, and the network configuration on
    standard input.
    """
    if context.invoked_subcommand is None:
        from ..cni.plugin import main

        main()


@cni.command()
@_bin_dir
@_conf_dir
@click.option("--tree", type=_path, default=TREE, show_default=True,
              help="Output of scripts/cni_tree.py.")
@click.option("--plugins", type=_path, default=PLUGINS, show_default=True,
              help="Where bridge, host-local, loopback and portmap are copied from, if the host "
                   "does not have them.")
@click.option("--conflist", type=click.Path(path_type=Path, dir_okay=False, exists=True),
              help="Network configuration to install.")
def install(
    bin_dir: Path, conf_dir: Path, tree: Path, plugins: Path, conflist: Path | None
) -> None:
    """Install the plugin on a host. The host needs no Python."""
    from ..cni.install import Installation

    installation = Installation(bin_dir, conf_dir)
    _run(installation, lambda: installation.install(tree, plugins, conflist))


@cni.command()
@_bin_dir
@_conf_dir
def uninstall(bin_dir: Path, conf_dir: Path) -> None:
    """Remove the plugin, and restore the programs that it has replaced."""
    from ..cni.install import Installation

    installation = Installation(bin_dir, conf_dir)
    _run(installation, installation.uninstall)


def _run(installation: Installation, action: Callable[[], None]) -> None:
    """Run the action, and show what it has changed. Raises Failure."""
    from ..cni.failure import CniError

    try:
        action()
    except CniError as error:
        raise Failure(error.message) from error
    except OSError as error:
        raise failure_of(error) from error
    finally:
        for line in installation.log:
            click.echo(line)
