"""A virtual machine that runs one command on another kernel, in this host's files.

Owns: the command line of QEMU, the time limit, and the folder that the machine and the host share.
In this folder are ``output`` and ``exit`` of the command, the files that the command writes, and
``console``, the log of the kernel. Synchronous; one machine at a time.
"""

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import initramfs
from .debs import Missing, Unpacked

SHARE = "/run/kernels"  # the shared folder, in the machine
CHECKOUT = Path(__file__).parents[2]
STARTS_WITHIN = 120.0  # seconds, with KVM on a loaded host; without KVM, this takes longer


@dataclass(frozen=True)
class Ended:
    """``code``: the exit code of the command; None: the machine has ended without one."""

    code: int | None
    started: bool
    reason: str = ""


class Machine:
    """``kvm``: whether KVM runs the machine. Without KVM, QEMU translates every instruction."""

    def __init__(self, kernel: Unpacked, share: Path, kvm: bool) -> None:
        self._kernel = kernel
        self._share = share
        self._kvm = kvm

    def run(self, command: str, limit: float, tell: Callable[[str], None]) -> Ended:
        """Run a shell command in the checkout. ``tell`` gets its output, while it runs."""
        shutil.rmtree(self._share, ignore_errors=True)
        self._share.mkdir(parents=True)
        (self._share / "command").write_text(command)
        (self._share / "start").write_text(initramfs.START.format(
            release=self._kernel.release, modules=self._kernel.modules.resolve(),
            checkout=CHECKOUT))
        initramfs.build(self._kernel, self._share / "initramfs")
        with (self._share / "qemu").open("wb") as log:
            process = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL, stdout=log,
                                       stderr=subprocess.STDOUT)
        try:
            reason = self._follow(process, limit, tell)
        finally:
            process.kill()
            process.wait()
        started = (self._share / "started").exists()
        try:
            return Ended(int((self._share / "exit").read_text()), started)
        except (FileNotFoundError, ValueError):
            return Ended(None, started, reason or self._last_words())

    def _follow(self, process: subprocess.Popen[bytes], limit: float,
                tell: Callable[[str], None]) -> str:
        """Pass on the output until the machine ends. Return why it was ended; "" if by itself."""
        began = time.monotonic()
        output = self._share / "output"
        told = 0
        while True:
            ended = process.poll() is not None
            if output.exists():
                with output.open("rb") as file:
                    file.seek(told)
                    text = file.read()
                    told += len(text)
                    tell(text.decode(errors="replace"))
            if ended:
                return ""
            seconds = time.monotonic() - began
            if seconds > limit:
                return f"the time limit of {limit:.0f} s is over"
            if self._kvm and seconds > STARTS_WITHIN and not (self._share / "started").exists():
                return f"it has not started within {STARTS_WITHIN:.0f} s"
            time.sleep(0.5)  # a file of the machine's: no event says that it has grown

    def _last_words(self) -> str:
        for name in ("qemu", "console"):
            path = self._share / name
            lines = path.read_text(errors="replace").split("\n") if path.exists() else []
            if said := [line.strip() for line in lines if line.strip()]:
                return said[-1]
        return "the machine ended without a word"

    def _command(self) -> list[str]:
        qemu = shutil.which("qemu-system-x86_64")
        if qemu is None:
            raise Missing("QEMU: apt-get install -y qemu-system-x86")
        # Without KVM, the machine's clock counts instructions, 1 ns each. So the deadlines in the
        # tests do not depend on the speed and the load of this host. QEMU can do this only with
        # one CPU: a kernel that starts a second one waits forever.
        accel = ["-accel", "kvm", "-cpu", "host", "-smp", "2"] if self._kvm else [
            "-accel", "tcg", "-cpu", "max", "-smp", "1", "-icount", "shift=0"]
        return [
            "nice", "-n", "15", qemu, *accel, "-m", "3072",
            "-nodefaults", "-no-reboot", "-display", "none", "-monitor", "none", "-nic", "none",
            "-serial", f"file:{self._share / 'console'}",
            "-fsdev", "local,id=files,path=/,security_model=none,readonly=on,multidevs=remap",
            "-device", "virtio-9p-pci,fsdev=files,mount_tag=files",
            "-fsdev", f"local,id=share,path={self._share},security_model=none",
            "-device", "virtio-9p-pci,fsdev=share,mount_tag=share",
            "-device", "virtio-rng-pci",
            "-kernel", str(self._kernel.image), "-initrd", str(self._share / "initramfs"),
            "-append", "console=ttyS0 panic=-1 quiet loglevel=5",
        ]
