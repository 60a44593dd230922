"""``udptun cni``: the CNI plugin.

Owns no behaviour: the plugin is ``udptun.cni``. A container runtime should start the launcher that
is installed for it (docs/cni.md), because importing click takes longer than the plugin.
"""

from __future__ import annotations

import click


@click.command()
def cni() -> None:
    """Run the CNI plugin: the command is in CNI_COMMAND, the configuration on standard input."""
    from ..cni.plugin import main

    main()
