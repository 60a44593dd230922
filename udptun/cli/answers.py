"""The answers of the node daemon and the forwarder of this host, and the peers computed from them.

Owns the rule for a part that does not answer: its answer is None. If neither answers, the error of
the forwarder is raised. Opens no connection: the callers pass clients. Threading: as the clients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import NoForwarder
from .mesh import Row, mesh

if TYPE_CHECKING:
    from ..control.client import ControlClient


class Answers:
    """The answers at one time.

    node       the state of the node daemon; None: it does not answer
    forwarder  the status of the forwarder; None: it does not answer
    rows       the peers by name
    """

    def __init__(self, node: dict[str, Any] | None, forwarder: dict[str, Any] | None) -> None:
        self.node, self.forwarder = node, forwarder
        self.rows: list[Row] = mesh(node, [] if forwarder is None else forwarder["peers"])


def ask(node: ControlClient, forwarder: ControlClient) -> Answers:
    """Ask both. Raises NoForwarder if neither answers."""
    of_node = ask_node(node)
    try:
        return Answers(of_node, forwarder.status())
    except NoForwarder:
        if of_node is None:
            raise
        return Answers(of_node, None)


def ask_node(node: ControlClient) -> dict[str, Any] | None:
    """Return the state of the node daemon; None: none answers."""
    try:
        return node.node()
    except NoForwarder:
        return None
