"""The versions of the CNI specification. Converts a result from one version's format to another's.

Owns: the list of supported versions, and the conversion. The functions have no side effects.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing takes longer than the rest of this module
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

OLDEST = "0.1.0"  # a configuration without a version has this one
SUPPORTED = (OLDEST, "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
NEWEST = SUPPORTED[-1]
# the first version that has the command
SINCE = {"CHECK": "0.4.0", "STATUS": "1.1.0", "GC": "1.1.0"}


def has_command(version: str, command: str) -> bool:
    return SUPPORTED.index(version) >= SUPPORTED.index(SINCE.get(command, OLDEST))


def common(wanted: str, offered: Iterable[object]) -> str | None:
    """Return the newest version in ``offered`` that is not newer than ``wanted``, or None."""
    known = [version for version in SUPPORTED if version in offered]
    return max((version for version in known if is_at_most(version, wanted)),
               key=SUPPORTED.index, default=None)


def is_at_most(version: str, other: str) -> bool:
    return SUPPORTED.index(version) <= SUPPORTED.index(other)


def convert(result: dict[str, Any], version: str) -> dict[str, Any]:
    """Return ``result`` in the format of ``version``.

    From 1.0.0 on, an address has no field "version". Results of versions before 0.3.0 have another
    structure and are not converted. No conversion is needed: a delegate that supports ``version``
    prints its result in this version.
    """
    source_version = result.get("cniVersion", OLDEST)
    if source_version == version or source_version not in SUPPORTED:
        return result
    if not is_at_most("0.3.0", source_version):
        return result
    if not is_at_most("0.3.0", version):
        return result
    converted = {**result, "cniVersion": version}
    addresses = result.get("ips")
    if isinstance(addresses, list):
        converted["ips"] = [_address(one, is_at_most("1.0.0", version)) for one in addresses]
    return converted


def _address(entry: object, is_new: bool) -> object:
    if not isinstance(entry, dict):
        return entry
    bare = {name: value for name, value in entry.items() if name != "version"}
    if is_new:
        return bare
    return {"version": "6" if ":" in str(entry.get("address")) else "4", **bare}
