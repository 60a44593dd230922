"""Keep each flow on one queue of a multi-queue TUN device.

Owns a small eBPF program and its loading. Without the program, each write of a packet to a queue
makes the kernel move the opposite direction of the packet's flow to this queue. Another worker then
processes that flow, and packets of the flow are reordered. Threading: any thread; no shared state.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import struct
import sys

from . import bpf

log = logging.getLogger(__name__)

TUNSETSTEERINGEBPF = 0x800454E0  # linux/if_tun.h

# linux/bpf_common.h, linux/bpf.h
_LD_ABS, _LD_IND = 0x20, 0x40
_W, _H, _B = 0x00, 0x08, 0x10
_MOV64, _ADD32, _AND32, _MUL32, _LSH32, _RSH32 = 0xB7, 0x04, 0x54, 0x24, 0x64, 0x74
_BY_REGISTER = 0x08  # the second operand is a register, not the constant
_JA, _JEQ, _JNE, _EXIT = 0x05, 0x15, 0x55, 0x95
_GOLDEN = 0x9E3779B1 - (1 << 32)  # Knuth's multiplicative hash, as a signed constant

Step = tuple[int, int, int, int, str]  # opcode, destination, source, constant, jump label


def attach_steering(fd: int) -> str | None:
    """Attach the program to the device of this queue. It applies to all queues of the device.

    Loading needs CAP_BPF or CAP_SYS_ADMIN on most hosts. Returns None, or the cause of the failure,
    which is also logged here. After a failure the kernel's own queue selection stays active.
    """
    program = -1
    try:
        program = bpf.load_program(bpf.SOCKET_FILTER, _assemble(_program()))
        fcntl.ioctl(fd, TUNSETSTEERINGEBPF, struct.pack("i", program))
    except OSError as error:
        cause = errno.errorcode.get(error.errno or 0, str(error.errno))
        log.info("flows may move between TUN queues: the kernel refuses a steering program: %s",
                 cause)
        return cause
    finally:
        if program >= 0:
            os.close(program)  # the device has its own reference
    return None


def _program() -> list[Step | str]:
    """Return a program that hashes addresses, protocol and ports of the inner packet.

    Strings in the program are jump labels. Registers: r6 is the packet, as LD_ABS requires; r7 is
    the sum of addresses and ports; r8 is the protocol; r9 is the offset of the ports. The sum is
    the same for both directions of a flow. A load beyond the packet ends the program with 0.
    """
    def load(size: int, at: int) -> Step:
        return (_LD_ABS | size, 0, 0, at, "")

    def load_from_r9(size: int, at: int) -> Step:
        return (_LD_IND | size, 0, 9, at, "")

    def constant(opcode: int, register: int, value: int) -> Step:
        return (opcode, register, 0, value, "")

    def move(to: int, register: int) -> Step:
        return (_MOV64 | _BY_REGISTER, to, register, 0, "")

    def jump(opcode: int, register: int, value: int, label: str) -> Step:
        return (opcode, register, 0, value, label)

    add: Step = (_ADD32 | _BY_REGISTER, 7, 0, 0, "")
    leave: Step = (_EXIT, 0, 0, 0, "")
    return [
        move(6, 1),
        constant(_MOV64, 7, 0),
        load(_B, 0),
        constant(_RSH32, 0, 4),
        jump(_JEQ, 0, 6, "ipv6"),
        jump(_JNE, 0, 4, "other"),
        load(_W, 12), add, load(_W, 16), add,
        load(_B, 9), move(8, 0),
        load(_H, 6),
        constant(_AND32, 0, 0x3FFF),  # a fragment: do not use the ports
        jump(_JNE, 0, 0, "mix"),
        load(_B, 0),
        constant(_AND32, 0, 0x0F),
        constant(_LSH32, 0, 2),
        move(9, 0),
        jump(_JA, 0, 0, "ports"),
        "ipv6",
        *(step for at in range(8, 40, 4) for step in (load(_W, at), add)),
        load(_B, 6), move(8, 0),
        constant(_MOV64, 9, 40),
        "ports",
        jump(_JEQ, 8, socket.IPPROTO_TCP, "with_ports"),
        jump(_JNE, 8, socket.IPPROTO_UDP, "mix"),
        "with_ports",
        constant(_MUL32, 7, 31),
        load_from_r9(_H, 0), add, load_from_r9(_H, 2), add,
        "mix",
        (_ADD32 | _BY_REGISTER, 7, 8, 0, ""),
        constant(_MUL32, 7, _GOLDEN),
        constant(_RSH32, 7, 16),
        move(0, 7),
        leave,
        "other",
        constant(_MOV64, 0, 0),
        leave,
    ]


def _assemble(program: list[Step | str]) -> bytes:
    """Encode the program as an array of struct bpf_insn (linux/bpf.h), in native byte order."""
    labels: dict[str, int] = {}
    steps: list[Step] = []
    for item in program:
        if isinstance(item, str):
            labels[item] = len(steps)
        else:
            steps.append(item)
    code = bytearray()
    for at, (opcode, destination, source, value, label) in enumerate(steps):
        offset = labels[label] - at - 1 if label else 0
        if sys.byteorder == "little":  # two bit fields, ordered by the byte order
            registers = destination | source << 4
        else:
            registers = destination << 4 | source
        code += struct.pack("=BBhi", opcode, registers, offset, value)
    return bytes(code)
