"""Pods with the plugins bridge and host-local: they are attached, checked, and removed.

The saved configurations are those that flannel's plugin gives to the delegate: the expected values
are written from its documentation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cni.runtime import Runtime, needs_plugins
from tests.own_netns import in_own_mount_namespace, in_own_netns, sh

pytestmark = needs_plugins
V6 = "fd00:10:244:1::1/64"


def interface(pod: str, name: str = "eth0") -> Any:
    return json.loads(sh(f"ip -n {pod} -j addr show {name}"))[0]


def global_addresses(pod: str) -> set[str]:
    return {one["local"] for one in interface(pod)["addr_info"] if one["scope"] == "global"}


@in_own_netns
def test_the_configuration_of_flannel_attaches_a_pod(tmp_path: Path) -> None:
    """flannel's own conflist, with the type flannel."""
    runtime = Runtime(tmp_path)
    runtime.write_subnet(masq=False)
    config = {
        "name": "cbr0", "cniVersion": "0.3.1", "type": "flannel",
        "delegate": {"hairpinMode": True, "isDefaultGateway": True},
        "subnetFile": str(runtime.subnet_file), "dataDir": str(runtime.data),
        "nodeSocket": runtime.config["nodeSocket"], "runtimeConfig": {"bandwidth": {}},
        "ipam": {"dataDir": str(runtime.addresses)},
    }
    with runtime.pod() as pod:
        answer = runtime.run("ADD", config)
        try:
            assert answer.code == 0, answer
            assert answer.json["cniVersion"] == "0.3.1"
            (address,) = answer.json["ips"]
            assert address["version"] == "4" and address["gateway"] == "10.244.1.1"
            assert interface(pod)["mtu"] == 1450
            assert {f"{one}/24" for one in global_addresses(pod)} == {address["address"]}
            assert "default via 10.244.1.1" in sh(f"ip -n {pod} route")
            assert "10.244.0.0/16 via 10.244.1.1" in sh(f"ip -n {pod} route")
            (saved,) = runtime.data.iterdir()
            assert saved.name == runtime.container_id
            assert saved.stat().st_mode & 0o777 == 0o600
            assert json.loads(saved.read_text()) == {
                "name": "cbr0", "type": "bridge", "cniVersion": "0.3.1", "hairpinMode": True,
                "isDefaultGateway": True, "isGateway": True, "ipMasq": True, "mtu": 1450,
                "runtimeConfig": {"bandwidth": {}},
                "ipam": {"dataDir": str(runtime.addresses), "type": "host-local",
                         "ranges": [[{"subnet": "10.244.1.0/24"}]],
                         "routes": [{"dst": "10.244.0.0/16"}]},
            }
        finally:
            for _ in range(2):
                answer = runtime.run("DEL", config)
                assert (answer.code, answer.output) == (0, "")
        assert "eth0" not in sh(f"ip -n {pod} link")
        assert runtime.saved() == []


@in_own_netns
def test_both_ip_versions_and_every_command_of_version_1_1(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path)
    runtime.write_subnet(subnet6=V6)
    runtime.config["ipam"]["routes"] = [{"dst": "192.0.2.0/24", "gw": "10.244.1.7"}]
    with runtime.pod() as pod:
        assert runtime.run("STATUS").code == 0
        answer = runtime.run("ADD")
        result = answer.json
        assert (answer.code, result["cniVersion"]) == (0, "1.1.0")
        assert [one["gateway"] for one in result["ips"]] == ["10.244.1.1", "fd00:10:244:1::1"]
        assert not any("version" in one for one in result["ips"])
        assert {f"{one['address']}" for one in result["ips"]} == {
            f"{one}/{64 if ':' in one else 24}" for one in global_addresses(pod)}
        assert [route["dst"] for route in result["routes"]] == [
            "192.0.2.0/24", "10.244.0.0/16", "fd00:10:244::/56"]
        assert runtime.saved() == [f"net1:{runtime.container_id}:eth0"]
        assert len(runtime.leased()) == 2

        assert runtime.run("CHECK", prevResult=result).code == 0
        sh(f"ip -n {pod} route del 10.244.0.0/16")
        broken = runtime.run("CHECK", prevResult=result)
        assert "10.244.0.0" in broken.error[1] and broken.json["cniVersion"] == "1.1.0"

        owned = runtime.attachments((runtime.container_id, "eth0"))
        assert runtime.run("GC", **owned).code == 0
        assert len(runtime.leased()) == 2
        assert runtime.run("DEL", prevResult=result).code == 0
        assert (runtime.leased(), runtime.saved()) == (set(), [])
        gone = runtime.run("CHECK", prevResult=result)
        assert gone.error[0] == 3


@in_own_netns
def test_an_overlay_with_ipv6_only(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path)
    runtime.write_subnet(subnet="", subnet6=V6)
    runtime.overlay_device(1280, "fd00:10:244:1::/128")
    with runtime.pod() as pod:
        answer = runtime.run("ADD")
        assert answer.code == 0, answer
        assert global_addresses(pod) == {answer.json["ips"][0]["address"].split("/")[0]}
        assert interface(pod)["mtu"] == 1280
        assert runtime.run("DEL").code == 0


@in_own_netns
def test_gc_removes_what_no_container_owns(tmp_path: Path) -> None:
    """A saved configuration, an address without one, and an address of another network."""
    runtime = Runtime(tmp_path)
    runtime.write_subnet()
    with runtime.pod():
        kept, kept_netns = runtime.container_id, runtime.netns
        assert runtime.run("ADD").code == 0
        other = Runtime(tmp_path)
        with other.pod():
            assert other.run("ADD").code == 0
            assert other.run("ADD", environ={"CNI_IFNAME": "eth1"}).code == 0
            (runtime.data / f"net1:{other.container_id}:eth1").unlink()
        foreign = Runtime(tmp_path)
        with foreign.pod():
            assert foreign.run("ADD", name="net2").code == 0
        assert (len(runtime.leased()), len(runtime.saved())) == (4, 3)
        assert runtime.run("GC", **runtime.attachments((kept, "eth0"))).code == 0
        assert runtime.saved() == sorted(
            [f"net1:{kept}:eth0", f"net2:{foreign.container_id}:eth0"])
        assert len(runtime.leased()) == 2
        runtime.netns = kept_netns
        assert runtime.run("DEL").code == 0
    assert runtime.run("GC", name="net2", **{"cni.dev/valid-attachments": None}).code == 0
    assert (runtime.leased(), runtime.saved()) == (set(), [])


@in_own_netns
def test_gc_and_del_of_pods_that_flannels_plugin_has_attached(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path)
    runtime.config["type"] = "flannel"
    runtime.write_subnet()
    with runtime.pod() as pod:
        assert runtime.run("ADD").code == 0
        assert runtime.saved() == [runtime.container_id]  # flannel's name
        assert runtime.run("GC", **runtime.attachments((runtime.container_id, "eth0"))).code == 0
        assert interface(pod) and len(runtime.leased()) == 1
        other = json.loads((runtime.data / runtime.container_id).read_text()) | {"name": "net2"}
        (runtime.data / "other").write_text(json.dumps(other))
        (runtime.data / "without-address").write_text(json.dumps(other | {"name": "net1"}))
        assert runtime.run("GC", **runtime.attachments()).code == 0
    assert (runtime.leased(), runtime.saved()) == (set(), ["other"])


@in_own_netns
def test_a_pod_of_the_type_flannel_can_be_removed_with_the_type_udptun(tmp_path: Path) -> None:
    """The data directories are the default ones, on an empty file system."""
    in_own_mount_namespace()
    sh("mount -t tmpfs none /var/lib")
    runtime = Runtime(tmp_path)
    runtime.write_subnet()
    del runtime.config["dataDir"]
    with runtime.pod() as pod:
        assert runtime.run("ADD", type="flannel").code == 0
        saved = Path("/var/lib/cni/flannel") / runtime.container_id
        assert saved.exists()
        assert runtime.run("DEL", name="net2").code == 0  # another network
        assert saved.exists()
        assert runtime.run("DEL").code == 0
        assert not saved.exists()
        assert "eth0" not in sh(f"ip -n {pod} link")


@in_own_netns
def test_an_unreadable_saved_configuration_does_not_block_a_pod_for_ever(tmp_path: Path) -> None:
    """DEL then uses the configuration that ADD would use now."""
    runtime = Runtime(tmp_path)
    runtime.write_subnet()
    with runtime.pod() as pod:
        assert runtime.run("ADD").code == 0
        (saved,) = runtime.data.iterdir()
        saved.write_text(saved.read_text()[:20])
        assert runtime.run("DEL").code == 0
        assert "eth0" not in sh(f"ip -n {pod} link")
    assert (runtime.leased(), runtime.saved()) == (set(), [])


@in_own_netns
@pytest.mark.parametrize(("given", "expected"), [({}, 1400), ({"mtu": 1300}, 1300)])
def test_the_mtu_is_that_of_the_device_now(
    tmp_path: Path, given: dict[str, int], expected: int
) -> None:
    """subnet.env has an older value. The configuration's value takes precedence."""
    runtime = Runtime(tmp_path)
    runtime.write_subnet(mtu=1450)
    runtime.overlay_device(1400, "10.244.1.0/32")
    with runtime.pod() as pod:
        assert runtime.run("ADD", delegate=given).code == 0
        assert interface(pod)["mtu"] == expected
        assert runtime.run("DEL").code == 0


@in_own_netns
def test_after_a_failed_add_del_can_still_clean_up(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path)
    runtime.write_subnet()
    failed = runtime.run("ADD")  # the namespace does not exist
    assert failed.error[1].startswith("bridge: ")
    assert failed.json["cniVersion"] == "1.1.0"
    assert runtime.saved()
    assert runtime.run("DEL", environ={"CNI_NETNS": None}).code == 0
    assert runtime.saved() == []
