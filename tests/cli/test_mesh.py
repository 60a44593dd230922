"""The peers by name: the rows that the answers of the node daemon and the forwarder make."""

from ipaddress import ip_address
from typing import Any

import pytest

from tests.control.fakes import status_of
from udptun.cli.mesh import endpoint_of, find, find_behind, mesh, natural, spelled

PEERS: list[dict[str, Any]] = status_of(1, 0)["peers"]


def pair(key: str, subnet: str, **changed: Any) -> dict[str, Any]:
    return {
        "key": key, "subnet": subnet, "state": "reachable",
        "since": "2026-01-31T08:00:01.000+00:00", "reason": "", "path": "udp",
        "path_since": "2026-01-31T08:00:01.000+00:00", "path_reason": "", "preferred": "udp",
        "return_seconds": None, "return_at": None,
        "paths": {"udp": {"endpoint": "192.0.2.2:8285", "state": "reachable", "rtt_us": 310}},
    } | changed


def node(*pairs: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return {"peers": [*pairs], "no_path": {}, "refused": {}} | changed


def test_without_a_node_daemon_a_peer_has_the_name_of_its_endpoint() -> None:
    one, other = mesh(None, PEERS)
    assert (one["name"], one["state"], one["rtt_us"]) == ("192.0.2.2:8285", "reachable", 412)
    assert (other["name"], other["state"], other["rtt_us"]) == (
        "[2001:db8::3]:8285", "not probed", None)


def test_a_peer_has_the_name_of_its_lease_and_the_counters_of_the_forwarder() -> None:
    row, other = mesh(node(pair("n2", "10.244.2.0/24")), PEERS)[::-1]
    assert (row["name"], row["rtt_us"], row["sent"]["bytes"]) == ("n2", 310, 1536)
    assert row["last_error"]["errno"] == "ECONNREFUSED"
    assert other["name"] == "[2001:db8::3]:8285"


def test_without_a_forwarder_the_counters_are_unknown() -> None:
    (row,) = mesh(node(pair("n2", "10.244.2.0/24", path="vxlan", paths={"vxlan": {}})), [])
    assert (row["sent"], row["rtt_us"], row["path"], row["endpoint"]) == (None, None, "vxlan", None)


def test_a_node_with_two_subnets_is_one_row_with_the_worse_state() -> None:
    second = pair("n2", "fd44::/64", state="unreachable", reason="3 probes were not answered")
    (row, _) = sorted(mesh(node(pair("n2", "10.244.2.0/24"), second), PEERS),
                      key=lambda one: one["name"] != "n2")
    assert row["subnets"] == ["10.244.2.0/24", "fd44::/64"]
    assert (row["state"], row["reason"]) == ("unreachable", "3 probes were not answered")
    assert row["sent"]["bytes"] == 1536


def test_nodes_without_a_path_are_rows_too() -> None:
    rows = mesh(node(no_path={"n3": "no backend"}, refused={"n4": "it loops"}), [])
    assert [(row["name"], row["state"], row["reason"]) for row in rows] == [
        ("n3", "no path", "no backend"), ("n4", "refused", "it loops")]


def test_a_peer_is_found_by_name_subnet_endpoint_and_address() -> None:
    rows = mesh(node(pair("n2", "10.244.2.0/24")), PEERS)
    for target in ("n2", "10.244.2.0/24", "192.0.2.2:8285", "192.0.2.2"):
        found = find(rows, target)
        assert found is not None and found["name"] == "n2", target
    found = find(rows, "2001:db8::3")
    assert found is not None and found["endpoint"] == "[2001:db8::3]:8285"
    assert find(rows, "n") is find(rows, "10.244.2.1") is find(rows, "") is None


def test_a_node_with_an_address_of_each_family_is_found_by_both() -> None:
    other = {"udp": {"endpoint": "[2001:db8::2]:8285", "state": "reachable"}}
    pairs = node(pair("n2", "10.244.2.0/24"), pair("n2", "fd44::/64", paths=other))
    v6 = PEERS[1] | {"endpoint": "[2001:db8::2]:8285", "subnets": ["fd44::/64"]}
    for peers in ([], [PEERS[0], v6]):
        (row,) = mesh(pairs, peers)
        assert row["endpoints"] == {
            "192.0.2.2:8285": ["10.244.2.0/24"], "[2001:db8::2]:8285": ["fd44::/64"]}
        for target, endpoint in (
            ("n2", "192.0.2.2:8285"), ("fd44::/64", "[2001:db8::2]:8285"),
            ("192.0.2.2", "192.0.2.2:8285"), ("2001:db8::2", "[2001:db8::2]:8285"),
            ("[2001:db8::2]:8285", "[2001:db8::2]:8285"),
        ):
            assert find([row], target) is row, target
            assert endpoint_of(row, target) == endpoint, target


@pytest.mark.parametrize(("target", "found"), [
    ("2001:DB8::2", "2001:db8::2"), ("2001:db8:0::2", "2001:db8::2"),
    ("[2001:db8::2]", "2001:db8::2"), ("[2001:DB8::2]:8285", "[2001:db8::2]:8285"),
    ("FD44::/64", "fd44::/64"), ("10.244.2.9/24", "10.244.2.0/24"), ("192.0.2.2", "192.0.2.2"),
    ("192.0.2.2:8285", "192.0.2.2:8285"), ("2001:db8::2:8285", "2001:db8::2:8285"),
    ("n2", "n2"), ("n2:8285", "n2:8285"), ("[", "["), ("", ""), ("10.244.2.0-24", "10.244.2.0-24"),
    ("192.0.2.2:x", "192.0.2.2:x"), ("7", "7"), ("192.0.2.02", "192.0.2.02"),
])
def test_the_spelling_of_an_address_does_not_matter(target: str, found: str) -> None:
    assert spelled(target) == found
    other = {"udp": {"endpoint": "[2001:db8::2]:8285", "state": "reachable"}}
    rows = mesh(node(pair("n2", "10.244.2.0/24"), pair("n2", "fd44::/64", paths=other)), [])
    assert find(rows, target) == find(rows, found)
    assert endpoint_of(rows[0], target) == endpoint_of(rows[0], found)


def test_the_address_of_a_pod_belongs_to_a_peer() -> None:
    rows = mesh(node(pair("n2", "10.244.2.0/24"), pair("n2", "fd44::/64"),
                     pair("n3", "10.244.3.0/24")), [])
    for address, name in (("10.244.2.0", "n2"), ("10.244.3.9", "n3"), ("fd44::9", "n2")):
        found = find_behind(rows, ip_address(address))
        assert found is not None and found["name"] == name
    assert find_behind(rows, ip_address("10.244.9.9")) is None


def test_an_address_belongs_to_the_longest_of_several_prefixes() -> None:
    """As in the forwarder, which may have such routes without a node daemon."""
    wide, narrow = (PEERS[0] | {"endpoint": f"192.0.2.{i}:8285", "subnets": [subnet]}
                    for i, subnet in ((2, "10.0.0.0/8"), (3, "10.1.0.0/16")))
    rows = mesh(None, [wide, narrow])
    for address, endpoint in (("10.1.2.3", "192.0.2.3:8285"), ("10.2.2.3", "192.0.2.2:8285")):
        for order in (rows, rows[::-1]):
            found = find_behind(order, ip_address(address))
            assert found is not None and found["name"] == endpoint


def test_names_are_sorted_as_people_do() -> None:
    names = ["n10", "n2", "a", "10.5.9.0-24", "10.5.10.0-24", "n2b", "n", "n\u0661"]
    assert sorted(names, key=natural) == [
        "10.5.9.0-24", "10.5.10.0-24", "a", "n", "n2", "n2b", "n10", "n\u0661"]
