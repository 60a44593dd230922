"""The names of the kernel's settings."""

import pytest

from tests.own_netns import in_own_netns, sh
from udptun.node.host.forwarding import sysctl, value_of


@in_own_netns
@pytest.mark.parametrize("device", ["udptun0", "flannel.1"])
async def test_sysctl_understands_the_name_of_a_setting_of_a_device(device):
    setting = f"ipv4/conf/{device}/rp_filter"
    sh("ip link add name udptun0 type veth peer name flannel.1",
       f"sysctl -qw {sysctl(setting)}=2")
    assert value_of(setting) == "2"
