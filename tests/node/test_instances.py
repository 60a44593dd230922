"""Several instances on one host: each has its own names, and removes nothing of another instance.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Network

import pytest

from tests.node.daemon_host import Node, Store, underlay, use_folder
from tests.own_netns import in_own_mount_namespace, in_own_netns, sh
from tests.wait import until
from udptun.errors import FieldError
from udptun.instance import Instance, InstanceRunning
from udptun.leases.base import SourceHealth, Subnets
from udptun.leases.etcd.config import EtcdConfig
from udptun.leases.netconf import NetConfig
from udptun.net.netlink import Netlink
from udptun.node.backends.active import ActiveBackends
from udptun.node.backends.base import InstanceConflict
from udptun.node.config import InterfaceOptions, NodeConfig
from udptun.node.daemon import Daemon, run
from udptun.node.locks import Locks
from udptun.node.process import handover
from udptun.node.status.report import NodeReport


class InstanceNode(Node):
    """A node whose names are all derived from its instance, with its own overlay network."""

    def __init__(self, name, network, vni, monkeypatch):
        self.monkeypatch = monkeypatch
        self.store = Store()
        self.store.network_answer = NetConfig.parse(
            f'{{"Network": "10.{network}.0.0/16", "Backend": {{"Type": "vxlan", "VNI": {vni}}}}}')
        self.store.acquire_answer = Subnets(IPv4Network(f"10.{network}.1.0/24"))
        self.config = NodeConfig(
            EtcdConfig(prefix=f"/{name}"), InterfaceOptions(names=("under0",)), Instance(name),
            backend="auto", ip_masq=True, forwarder="external",
        )

    def files(self):
        config = self.config
        return {path: path.read_bytes() for path in (
            config.subnet_file, config.forward_file, config.state_dir / "leases.json")}


def names():
    """Return the names of the nftables tables and VXLAN devices in this namespace."""
    tables = {line.split()[-1] for line in sh("nft list tables").splitlines()}
    devices = {line.split(": ")[1] for line in sh("ip -o link show type vxlan").splitlines()}
    return tables, devices


@in_own_netns
async def test_two_instances_do_not_change_each_others_devices_and_files(tmp_path, monkeypatch):
    underlay()
    use_folder(tmp_path, monkeypatch)
    red = InstanceNode("red", 244, 1, monkeypatch)
    blue = InstanceNode("blue", 245, 2, monkeypatch)
    async with red.running(), blue.running():
        for node in (red, blue):
            await until(lambda node=node: node.store.published, "the lease")
            node.store.send()
            await until(node.config.forward_file.exists, "the forwarder's options")
            await until((node.config.state_dir / "leases.json").exists, "the cache")
            # No forwarder runs here, so the daemon does not write this file yet.
            assert not node.config.subnet_file.exists()
            node.config.subnet_file.write_text("an older one")
        assert names() == ({"red-ipv4", "blue-ipv4"}, {"red.1", "blue.2"})
        assert {path.parent.name for path in (*red.files(), *blue.files())} == {"red", "blue"}
        assert (red.config.tun, blue.config.tun) == ("red0", "blue0")
    before, rules = red.files(), sh("nft list table ip red-ipv4")
    await run(replace(blue.config, cleanup=True))
    assert names() == ({"red-ipv4"}, {"red.1"})
    assert red.files() == before
    assert sh("nft list table ip red-ipv4") == rules
    assert not any(path.exists() for path in (
        blue.config.subnet_file, blue.config.forward_file, blue.config.state_dir / "leases.json"))


@in_own_netns
async def test_the_same_instance_twice_is_refused(tmp_path, monkeypatch):
    use_folder(tmp_path, monkeypatch)
    red = InstanceNode("red", 244, 1, monkeypatch)
    elsewhere = replace(red.config, state_dir=tmp_path / "other")
    with red.config.instance.locked("node"), pytest.raises(InstanceRunning, match="red"):
        await run(elsewhere)


def readonly(folder):
    in_own_mount_namespace()
    folder.mkdir(parents=True)
    sh(f"mount --bind {folder} {folder}", f"mount -o remount,bind,ro {folder}")


@in_own_netns
async def test_a_daemon_without_its_lock_ends_if_another_one_has_taken_it(tmp_path, monkeypatch):
    use_folder(tmp_path, monkeypatch)
    underlay()
    red = InstanceNode("red", 244, 1, monkeypatch)
    run_dir = red.config.instance.run_dir
    readonly(run_dir)
    with pytest.raises(InstanceRunning, match="red"):
        async with red.running() as daemon:
            await until(lambda: "the instance red" in daemon.report.troubles, "the report")
            sh(f"mount -o remount,bind,rw {run_dir}")
            with red.config.instance.locked("node"):
                await until(lambda: red.store.closed, "the end of the daemon")


@in_own_netns
async def test_a_take_over_on_a_readonly_disk_finds_that_no_daemon_runs(tmp_path, monkeypatch):
    use_folder(tmp_path, monkeypatch)
    red = Instance("red")
    readonly(red.run_dir)
    await handover.take_over(red, red.control_socket())


@pytest.mark.parametrize("field", ["subnet_file", "state_dir", "control"])
def test_a_file_of_another_instance_is_refused(tmp_path, monkeypatch, field):
    use_folder(tmp_path, monkeypatch)
    red = InstanceNode("red", 244, 1, monkeypatch).config
    blue = InstanceNode("blue", 245, 2, monkeypatch).config
    path = getattr(red, field)
    with Locks(red), Locks(blue):
        pass
    with Locks(red), pytest.raises(InstanceRunning) as caught, \
            Locks(replace(blue, **{field: path})):
        pass
    option = f"--{field.replace('_', '-')}"
    assert str(path) in str(caught.value)
    assert f"in use by the instance red: give the instance blue another {option}" in \
        str(caught.value)
    with Locks(replace(blue, **{field: path})):  # red has ended
        pass
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@in_own_netns
async def test_a_vni_of_another_instance_is_refused(tmp_path, monkeypatch):
    """The daemon does not fall back to UDP, because the configuration is wrong."""
    underlay()
    use_folder(tmp_path, monkeypatch)
    red = InstanceNode("red", 244, 7, monkeypatch)
    blue = InstanceNode("blue", 245, 7, monkeypatch)
    async with red.running():
        await until(lambda: red.store.published, "the lease")
        blue.serve_store()
        with Netlink() as netlink, pytest.raises(InstanceConflict) as caught:
            await Daemon(blue.config, netlink).run()
        assert "red.7 has VNI 7" in str(caught.value)
        assert "the instance red" in str(caught.value)
    assert not blue.store.published


@in_own_netns
async def test_a_vni_of_an_unknown_device_leaves_udp(tmp_path, monkeypatch):
    """If an operator's device has the VNI, --backend auto continues without VXLAN."""
    underlay()
    use_folder(tmp_path, monkeypatch)
    sh("ip link add Mine type vxlan id 7 dev under0 dstport 8472")
    blue = InstanceNode("blue", 245, 7, monkeypatch)
    async with blue.running() as daemon:
        await until(lambda: blue.store.published, "the lease")
        assert "Mine has VNI 7" in daemon.report.unavailable["VXLAN"]
        assert blue.store.published[0].backend_type == ""


def test_a_name_too_long_for_a_device_matters_only_with_vxlan(monkeypatch):
    node = InstanceNode("longname", 245, 1234567, monkeypatch)
    with Netlink() as netlink:
        backends = ActiveBackends(node.config, netlink, NodeReport("etcd", SourceHealth()))
        names = backends.device_names(node.store.network_answer)
    assert "longname0" in names
    assert not any("1234567" in name for name in names)
    with pytest.raises(FieldError, match="1234567"):
        node.config.instance.vxlan_device(1234567, 4)
