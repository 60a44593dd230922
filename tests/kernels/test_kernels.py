"""The parts of `make test-kernels` that need no virtual machine."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels import initramfs, table
from tests.kernels.__main__ import BASIC, PAGE, SAVED, TESTS, _command
from tests.kernels.debs import KERNELS, Kernel, Unpacked
from tests.kernels.features import FEATURES, YES

ROOT = Path(__file__).parents[2]


def test_every_chosen_test_exists():
    assert [name for name in (*BASIC, *TESTS) if not (ROOT / name).exists()] == []


def test_tests_on_the_command_line_replace_the_chosen_ones(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "tests/netns" in _command(["-k", "mtu"], features=False, kvm=True)
    assert "tests/netns" not in _command(["tests/net::test_x"], features=False, kvm=True)
    assert "pytest" not in _command([], features=True, kvm=False)


@pytest.mark.skipif(shutil.which("busybox") is None, reason="needs busybox")
def test_an_archive_contains_its_files(tmp_path):
    archive = initramfs.Archive()
    archive.add("bin", 0o40755)
    archive.add("bin/a", 0o100755, b"abc\n")
    archive.add("b", 0o100600, b"")
    subprocess.run(["busybox", "cpio", "-i"], input=archive.content(), cwd=tmp_path, check=True,
                   stderr=subprocess.DEVNULL)
    assert (tmp_path / "bin/a").read_text() == "abc\n"
    assert (tmp_path / "bin/a").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "b").read_bytes() == b""


def test_modules_are_loaded_after_those_that_they_need(tmp_path):
    kernel = Unpacked(Kernel("9.9", "none"), "9.9.0", "9.9.0-1", tmp_path)
    kernel.modules.mkdir(parents=True)
    (kernel.modules / "modules.dep").write_text(
        "kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs.ko.xz\n"
        "kernel/fs/netfs.ko.xz:\n"
        "kernel/net/9p/9pnet.ko.xz: kernel/fs/netfs.ko.xz\n"
        "kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz\n"
        "kernel/net/other.ko.xz: kernel/fs/netfs.ko.xz\n")
    assert [path.name.removesuffix(".ko.xz") for path in initramfs.in_order(kernel.modules)] == [
        "netfs", "9pnet", "9pnet_virtio", "9p"]


def test_the_page_numbers_the_reasons():
    found = dict.fromkeys(FEATURES, YES)
    rows = [table.Row("5.10", "5.10.1-1", found | {"tun-uso": "EINVAL", "udp-merge": "needs it"}),
            table.Row("6.1", "6.1.1-1", found | {"tun-uso": "EINVAL"})]
    text = table.page(rows)
    assert "| tun-uso |" in text
    assert "| no (1) | no (1) |\n" in text
    assert "| no (2) | yes |\n" in text
    assert text.endswith("\n1. EINVAL\n2. needs it\n")


def test_a_kernel_without_results_is_not_said_to_lack_anything():
    text = table.page([table.Row("5.10", "", {})])
    assert "| not tried |\n" in text
    assert "| no" not in text.replace("| not tried", "")


def test_the_page_in_the_documentation_is_that_of_the_saved_results():
    saved = json.loads(SAVED.read_text())
    assert saved.keys() <= KERNELS.keys()
    assert PAGE.read_text() == table.page(table.rows(KERNELS, saved))
