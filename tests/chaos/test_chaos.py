"""The chaos itself: the acts can be listed and replayed, and the judge sees what is wrong.

`make chaos` runs the acts; these tests break things that udptun cannot repair, in a small way, and
check that the judge reports it.
"""

from random import Random

import pytest

from udptun.lab.cluster import etcd_obstacle

from .acts import ACTS, Act, Scene
from .judge import Judge
from .world import MODES, ClusterKind, World

needs_etcd = pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))
DEADLINE = 3.0  # of acts that must fail


@pytest.mark.unprivileged
def test_every_mode_has_enough_acts():
    for mode in MODES:
        assert sum(mode in act.modes for act in ACTS.values()) >= 25, mode


@pytest.mark.unprivileged
def test_acts_are_named_and_described():
    for name, act in ACTS.items():
        assert name == act.name
        assert act.modes
        assert act.modes <= MODES.keys()
        assert act.text


@pytest.fixture
def world(lab):
    made = World(lab, ClusterKind("udp"))
    made.start()
    assert Judge(made, DEADLINE).steady(60) == []
    yield made
    made.close()


def verdict(world, do, deadline=DEADLINE):
    told = []
    found = Judge(world, deadline).run(Act("test", "an act of this test", do), Random(1),
                                       told.append)
    assert len(told) == 1
    return "\n".join(found.wrong)


@needs_etcd
@pytest.mark.slow
def test_the_judge_finds_each_fault(world):
    a, b, c, *_ = world.members

    def harmless(world, rng):
        return Scene("nothing", [a])

    assert verdict(world, harmless, 60) == ""

    # A pair is cut where no node can detect this. According to the scene, the pair has a path.
    def hidden(world, rng):
        rule = f"add rule ip filter silent ip saddr {a.pod_v4} ip daddr {b.pod_v4} drop\n"
        a.pod.nft("table ip filter {\nchain silent {\ntype filter hook output priority 0\n}\n}\n"
                  + rule)
        return Scene("hidden", [a], undo=lambda: a.pod.nft("delete table ip filter\n"))

    found = verdict(world, hidden)
    assert ("while it lasts: n1 -> n2, n2 -> n1: small+full packets are lost, "
            "and a path exists") in found
    assert "n3" not in found
    assert "after it" not in found

    # The same, but according to the scene there is no path: one of the nodes must report this.
    def unreported(world, rng):
        scene = hidden(world, rng)
        scene.cut = {("n1", "n2"), ("n2", "n1")}
        return scene

    assert "n2 -> n1: small+full packets are lost, and neither node reports this" in verdict(
        world, unreported)

    # A node that the act does not concern becomes unready.
    def bystander(world, rng):
        c.daemon.kill()
        return Scene("bystander", [a])

    assert "n3 was not ready, and the act does not concern it" in verdict(world, bystander)
    assert Judge(world, DEADLINE).steady(60) == []

    # The host of a node stays changed; nothing is logged; a status does not say why.
    def changed(world, rng):
        a.host.ip("address add 198.51.100.7/32 dev udptun0")
        return Scene("changed", [a])

    assert "n1: the host differs: +udptun0 inet 198.51.100.7/32" in verdict(world, changed)
    a.host.ip("address del 198.51.100.7/32 dev udptun0")
    assert "n1: nothing was logged" in verdict(
        world, lambda world, rng: Scene("silent", [a], must_log=True))
    assert "no status of n1 says /no such text/" in verdict(
        world, lambda world, rng: Scene("silent", [a], says="no such text"))

    # A status names a peer whose packets all pass.
    health = world.health

    def wrong_name(member):
        found = health(member)
        if member is a:
            found.lost = {world.subnets["n2"]}
        return found

    world.health = wrong_name
    assert "n1 says that it does not reach n2, and all packets pass" in verdict(world, harmless)
    world.health = health


@pytest.mark.slow
def test_a_cluster_with_kubernetes_and_ipv6_passes_an_act(lab):
    world = World(lab, ClusterKind("mixed", "kubernetes", ipv6=True))
    world.start()
    try:
        judge = Judge(world, 60)
        assert judge.steady(60) == []
        assert "small IPv6" in {kind for pair in world.mesh.pairs()
                                for kind in world.mesh.kinds(pair[0])}
        found = judge.run(ACTS["route6-flush"], Random(1), lambda text: None)
    finally:
        world.close()
    assert found.wrong == []


@needs_etcd
@pytest.mark.slow
def test_an_act_can_be_replayed(lab):
    """The same seed makes the same choices."""
    world = World(lab, ClusterKind("udp"))
    world.start()
    try:
        texts = {ACTS["sighup"].do(world, Random("7.3 sighup")).text for _ in range(2)}
        others = {ACTS["sighup"].do(world, Random(f"{n} sighup")).text for n in range(20)}
    finally:
        world.close()
    assert len(texts) == 1
    assert len(others) > 1
