"""What of the cluster's test can be tested without a cluster."""

import re
import subprocess
import sys
from types import SimpleNamespace

import yaml

from . import migration  # noqa: F401 - it fills the table of steps
from .cluster import MANIFESTS, Cluster
from .plane import POD_V6
from .step import STEPS, with_needed


def test_the_list_has_each_step_with_its_text():
    out = subprocess.run([sys.executable, "-m", "tests.e2e", "--list"], check=True, text=True,
                         capture_output=True).stdout
    assert len(out.splitlines()) == len(STEPS)
    assert all(re.search(rf"^{name} +\w", out, re.M) for name in STEPS)


def test_a_step_runs_after_those_that_it_needs():
    assert next(iter(STEPS)) == "install"
    assert with_needed(["pods"]) == ["install", "pods"]
    assert with_needed(["to-flannel"]) == ["flannel", "from-flannel", "to-flannel"]
    assert with_needed(STEPS) == [*STEPS]


def test_the_manifests_get_the_image_and_both_families(tmp_path):
    cluster = SimpleNamespace(lab=SimpleNamespace(folder=tmp_path), image_name="x/udptun:1.2.3")
    folder = Cluster.manifests(cluster)
    for path in (folder / "kustomization.yaml", folder / "cleanup/kustomization.yaml"):
        images = yaml.safe_load(path.read_text())["images"]
        assert [image["newTag"] for image in images] == ["1.2.3"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert yaml.safe_load(config["data"]["net-conf.json"])["IPv6Network"] == POD_V6
    assert Cluster.manifests(cluster) == folder
    assert (MANIFESTS / "daemonset.yaml").read_text() == (folder / "daemonset.yaml").read_text()
