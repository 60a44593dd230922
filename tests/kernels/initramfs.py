"""The first files of the virtual machine: busybox, the modules for its file systems, ``init``.

Owns: what happens between the start of the kernel and the start of the tests. Does not depend on
QEMU, except for the names of the two file systems (``files``, ``share``). Any thread.
"""

import lzma
import shutil
from pathlib import Path

from .debs import Missing, Unpacked

MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")

# The host's files are below, a tmpfs above them: the machine changes no file of the host. Process 1
# changes the root, not a child, because the kernel runs modprobe in the root of process 1.
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules/order); do insmod /modules/$module || echo "insmod $module: $?"; done
options=trans=virtio,version=9p2000.L,msize=262144
mount -t 9p -o ro,cache=loose,$options files /below
mount -t tmpfs -o size=60% tmpfs /above
mkdir /above/files /above/work
mount -t overlay -o lowerdir=/below,upperdir=/above/files,workdir=/above/work overlay /root
mount -t tmpfs tmpfs /root/run
mkdir -p /root/run/lock /root/run/kernels
mount -t 9p -o cache=none,$options share /root/run/kernels
mount --move /dev /root/dev
mount --move /proc /root/proc
mount --move /sys /root/sys
exec switch_root /root /bin/sh /run/kernels/start
"""

# The first process in the host's files. It never ends: the kernel is told to power off.
START = """
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/cni
export HOME=/root LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
mkdir -p /dev/pts /dev/shm /lib/modules/{release}
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount --bind {modules} /lib/modules/{release}
ip link set lo up
hostname kernels
modprobe tun
touch /run/kernels/started
cd {checkout}
sh /run/kernels/command >/run/kernels/output 2>&1 </dev/null
echo $? >/run/kernels/exit
dmesg >/run/kernels/dmesg
sync
echo o >/proc/sysrq-trigger
while :; do sleep 60; done
"""


def build(kernel: Unpacked, target: Path) -> None:
    """Write the initramfs of the kernel."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise Missing("busybox: apt-get install -y busybox-static")
    modules = in_order(kernel.modules)
    archive = Archive()
    for folder in ("bin", "modules", "proc", "sys", "dev", "below", "above", "root"):
        archive.add(folder, 0o40755)
    archive.add("dev/console", 0o20600, device=(5, 1))
    archive.add("init", 0o100755, INIT.encode())
    archive.add("bin/busybox", 0o100755, Path(busybox).read_bytes())
    for path in modules:
        content = path.read_bytes()
        name = path.name.removesuffix(".xz")
        archive.add(f"modules/{name}", 0o100644,
                    lzma.decompress(content) if path.suffix == ".xz" else content)
    names = [path.name.removesuffix(".xz") for path in modules]
    archive.add("modules/order", 0o100644, "\n".join(names).encode())
    target.write_bytes(archive.content())


def in_order(modules: Path) -> list[Path]:
    """Return MODULES and the modules that they need, in the order in which to load them."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        needs[path] = needed.split()
    paths = {Path(path).name.split(".")[0]: path for path in needs}
    order: dict[str, None] = {}

    def add(path: str) -> None:
        for needed in needs[path]:
            add(needed)
        order.setdefault(path)

    for name in MODULES:
        if name in paths:  # otherwise it is part of the kernel
            add(paths[name])
    return [modules / path for path in order]


class Archive:
    """A cpio archive in the format that the kernel reads ("newc")."""

    def __init__(self) -> None:
        self._content = bytearray()
        self._entries = 0

    def add(self, name: str, mode: int, content: bytes = b"",
            device: tuple[int, int] = (0, 0)) -> None:
        self._entries += 1
        fields = (self._entries, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
        self._content += b"070701" + b"".join(b"%08X" % value for value in fields)
        self._content += name.encode() + b"\0"
        self._pad()
        self._content += content
        self._pad()

    def content(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self._content)

    def _pad(self) -> None:
        self._content += b"\0" * (-len(self._content) % 4)
