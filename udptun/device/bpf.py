"""Create BPF maps and load BPF programs with bpf(2).

Owns the calls and the layout of their arguments, and the reader of object files. Does not depend on
what a program does. An object file has one section for each program; each map that a program uses
is an undefined symbol. Most calls need CAP_BPF. Threading: any thread; no shared state.
Source: bpf(2), linux/bpf.h, elf(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

BPF_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}

NUMBER = BPF_SYSCALL.get(os.uname().machine)
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
LIBC.syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_char_p, ctypes.c_long]

# enum bpf_cmd
MAP_CREATE, MAP_LOOKUP, MAP_UPDATE, MAP_DELETE, PROG_LOAD = 0, 1, 2, 3, 5
OBJ_GET_INFO, PROG_QUERY, MAP_LOOKUP_BATCH, MAP_UPDATE_BATCH = 15, 16, 24, 26
# enum bpf_prog_type
SOCKET_FILTER, SCHED_CLS = 1, 3
# enum bpf_map_type
HASH, ARRAY, PERCPU_HASH, PERCPU_ARRAY, LRU_HASH, LPM_TRIE, ARRAY_OF_MAPS = 1, 2, 5, 6, 9, 11, 12
DEVMAP = 14
NO_PREALLOC = 1  # BPF_F_NO_PREALLOC
NO_EXIST = 1  # BPF_NOEXIST
ENOTSUPP = 524  # an errno of the kernel only
TCX_INGRESS, TCX_EGRESS = 46, 47  # enum bpf_attach_type; Linux 6.6

BATCH_BYTES = 1 << 18  # of the keys and values that one call reads
BATCH_MIN_N = 64  # entries; the kernel refuses a call that has no room for all of one bucket

LICENSE = b"Apache-2.0"
LOG_BYTES = 1 << 20  # for the verifier's reasons
INSTRUCTION = 8  # bytes
ATTRIBUTES_BYTES = 128  # more than the attributes of all calls here
PSEUDO_MAP_FD = 1  # BPF_PSEUDO_MAP_FD: the constant of the instruction is the descriptor of a map
# ELF: offsets in the file header, section headers, symbols and relocations of a 64-bit file
ELF_MAGIC, ELF64, LITTLE_ENDIAN = b"\x7fELF", 2, 1
SECTION = struct.Struct("<IIQQQQIIQQ")
SYMBOL = struct.Struct("<IBBHQQ")
RELOCATION = struct.Struct("<QQ")
SYMBOLS, RELOCATIONS, R_BPF_64_64 = 2, 9, 1


@dataclass(frozen=True, slots=True)
class Program:
    """The instructions of a program. ``maps`` has the map that an instruction uses, by the offset
    of the instruction."""

    code: bytes
    maps: Mapping[int, str]

    def linked(self, fds: Mapping[str, int]) -> bytes:
        """Return the instructions with the descriptors of the maps."""
        code = bytearray(self.code)
        for at, name in self.maps.items():
            code[at + 1] = code[at + 1] & 0x0F | PSEUDO_MAP_FD << 4  # the source register
            struct.pack_into("<i", code, at + 4, fds[name])
        return bytes(code)


def read_object(path: Path) -> dict[str, Program]:
    """Return the programs of an object file by the name of their section. Raises OSError.

    The file is part of this package, so its content is trusted.
    """
    if sys.byteorder != "little":
        raise OSError(errno.ENOSYS, "the programs are compiled for little-endian machines only")
    data = path.read_bytes()
    if data[:4] != ELF_MAGIC or data[4] != ELF64 or data[5] != LITTLE_ENDIAN:
        raise OSError(errno.ENOEXEC, f"{path} is not a 64-bit little-endian ELF file")
    (table_at,) = struct.unpack_from("<Q", data, 40)
    sections_n, names_index = struct.unpack_from("<HH", data, 60)
    sections = [SECTION.unpack_from(data, table_at + i * SECTION.size) for i in range(sections_n)]

    def text(table: int, at: int) -> str:
        start = sections[table][4] + at
        return data[start : data.index(b"\0", start)].decode()

    maps: dict[int, dict[int, str]] = {}
    for _, kind, _, _, at, size, symbols, target, *_ in sections:
        if kind != RELOCATIONS:
            continue
        strings = sections[symbols][6]
        for start in range(at, at + size, RELOCATION.size):
            offset, info = RELOCATION.unpack_from(data, start)
            if info & 0xFFFFFFFF != R_BPF_64_64:
                raise OSError(errno.ENOEXEC, f"{path} has a relocation of type {info & 0xFFFFFFFF}")
            symbol = SYMBOL.unpack_from(
                data, sections[symbols][4] + (info >> 32) * SYMBOL.size)
            maps.setdefault(target, {})[offset] = text(strings, symbol[0])
    return {
        text(names_index, section[0]): Program(
            data[section[4] : section[4] + section[5]], maps[index])
        for index, section in enumerate(sections) if index in maps
    }


def load_program(kind: int, code: bytes, name: str = "") -> int:
    """Load a program. Returns its descriptor. Raises OSError with the end of the verifier's log."""
    instructions = ctypes.create_string_buffer(code, len(code))
    license_text = ctypes.create_string_buffer(LICENSE)

    def load(log: ctypes.Array[ctypes.c_char] | None) -> int:
        return bpf(PROG_LOAD, struct.pack(
            "=IIQQIIQII16s", kind, len(code) // INSTRUCTION, ctypes.addressof(instructions),
            ctypes.addressof(license_text), 0 if log is None else 1,
            0 if log is None else len(log), 0 if log is None else ctypes.addressof(log), 0, 0,
            name.encode()[:15]))

    try:
        return load(None)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES):
            raise
        log = ctypes.create_string_buffer(LOG_BYTES)
        with contextlib.suppress(OSError):
            return load(log)
        lines = log.value.decode("utf-8", "replace").strip().splitlines()
        reason = "; ".join(lines[-3:-1] or lines)
        raise OSError(error.errno, f"the verifier refuses {name or 'the program'}: {reason}") \
            from None


class Map:
    """A map. Owns its descriptor.

    kind, capacity  type of the map; the largest number of entries
    inner           a map like those that an ARRAY_OF_MAPS contains
    """

    def __init__(
        self, name: str, kind: int, key_size: int, value_size: int, capacity: int,
        inner: Map | None = None,
    ) -> None:
        """Raises OSError."""
        flags = NO_PREALLOC if kind in (HASH, PERCPU_HASH, LPM_TRIE) else 0
        self.fd: int = bpf(MAP_CREATE, struct.pack(
            "=IIIIIII16s", kind, key_size, value_size, capacity, flags,
            0 if inner is None else inner.fd, 0, name.encode()[:15]))
        self._set_layout(kind, key_size, value_size)

    @classmethod
    def adopt(cls, fd: int, kind: int, key_size: int, value_size: int, capacity: int) -> Map:
        """Use a map that another process has made. Closes ``fd`` and raises OSError if this is not
        a map of this kind and layout."""
        try:
            info = ctypes.create_string_buffer(256)  # struct bpf_map_info
            bpf(OBJ_GET_INFO, struct.pack("=IIQ", fd, 80, ctypes.addressof(info)))
            found_kind, _, *found = struct.unpack_from("=5I", info)
            if [found_kind, *found] != [kind, key_size, value_size, capacity]:
                raise OSError(errno.EINVAL, "the map has another layout")
        except BaseException:
            os.close(fd)
            raise
        adopted = cls.__new__(cls)
        adopted.fd = fd
        adopted._set_layout(kind, key_size, value_size)
        return adopted

    def _set_layout(self, kind: int, key_size: int, value_size: int) -> None:
        self._key_size, self._value_size = key_size, value_size
        self._read_size = value_size
        if kind in (PERCPU_HASH, PERCPU_ARRAY):
            self._read_size = (value_size + 7 & ~7) * cpus_n()

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __setitem__(self, key: bytes, value: bytes) -> None:
        """Raises OSError."""
        buffers = _buffer(key, len(key)), _buffer(value, self._read_size)
        bpf(MAP_UPDATE, self._element(*buffers))

    def add(self, key: bytes, value: bytes) -> None:
        """Add an entry, with the value on all CPUs. Raises FileExistsError, OSError."""
        buffers = _buffer(key, len(key)), _buffer(value, self._read_size)
        bpf(MAP_UPDATE, self._element(*buffers, NO_EXIST))

    def __getitem__(self, key: bytes) -> bytes:
        """Return the value; of a map per CPU, the values of all CPUs. Raises KeyError, OSError."""
        buffer, value = _buffer(key, len(key)), ctypes.create_string_buffer(self._read_size)
        try:
            bpf(MAP_LOOKUP, self._element(buffer, value))
        except FileNotFoundError:
            raise KeyError(key) from None
        return value.raw

    def __delitem__(self, key: bytes) -> None:
        """Raises OSError; nothing if the key is absent."""
        buffer = _buffer(key, len(key))
        with contextlib.suppress(FileNotFoundError):
            bpf(MAP_DELETE, struct.pack("=I4xQQQ", self.fd, ctypes.addressof(buffer), 0, 0))

    def fill(self, keys: bytes, values: bytes) -> None:
        """Set many entries: the keys and the values one after the other. Raises OSError.

        This can take long. It does not hold the GIL.
        """
        n = len(keys) // self._key_size
        if n == 0:
            return
        key_buffer, value_buffer = _buffer(keys, len(keys)), _buffer(values, len(values))
        try:
            bpf(MAP_UPDATE_BATCH, struct.pack(
                "=QQQQIIQQ", 0, 0, ctypes.addressof(key_buffer), ctypes.addressof(value_buffer), n,
                self.fd, 0, 0))
        except OSError as error:
            if error.errno not in (errno.EINVAL, ENOTSUPP):  # before Linux 5.13
                raise
            for at in range(n):
                self[keys[at * self._key_size :][: self._key_size]] = \
                    values[at * self._value_size :][: self._value_size]

    def items(self) -> tuple[bytes, bytes]:
        """Return the keys and the values of all entries, one after the other; of a map per CPU, the
        values of all CPUs. Raises OSError: EINVAL or ENOTSUPP if the kernel does not have this.

        A call of bpf(2) reads many entries. An entry that another thread adds or deletes at the
        same time may be missing, or be there twice.
        """
        n = max(BATCH_BYTES // (self._key_size + self._read_size), BATCH_MIN_N)
        places = [ctypes.create_string_buffer(4), ctypes.create_string_buffer(4)]
        keys = ctypes.create_string_buffer(n * self._key_size)
        values = ctypes.create_string_buffer(n * self._read_size)
        found: list[tuple[bytes, bytes]] = []
        start = 0
        while True:
            attributes = ctypes.create_string_buffer(struct.pack(
                "=QQQQIIQQ", start, ctypes.addressof(places[1]), ctypes.addressof(keys),
                ctypes.addressof(values), n, self.fd, 0, 0), ATTRIBUTES_BYTES)
            last = False
            try:
                _call(MAP_LOOKUP_BATCH, attributes)
            except FileNotFoundError:  # these were the last ones
                last = True
            (got,) = struct.unpack_from("=I", attributes, 32)
            found.append((keys.raw[: got * self._key_size], values.raw[: got * self._read_size]))
            if last:
                return b"".join(key for key, _ in found), b"".join(value for _, value in found)
            places.reverse()
            start = ctypes.addressof(places[0])

    def per_cpu(self, key: bytes) -> list[tuple[int, ...]]:
        """Return each 64-bit word of a value per CPU, as a tuple of its values on the CPUs.

        Raises KeyError, OSError.
        """
        words = self._value_size // 8
        values = struct.unpack(f"={self._read_size // 8}Q", self[key])
        return [values[word::words] for word in range(words)]

    def id(self) -> int:
        """Return the number that the kernel has given to the map. Raises OSError."""
        return _id(self.fd)

    def _element(
        self, key: ctypes.Array[ctypes.c_char], value: ctypes.Array[ctypes.c_char], flags: int = 0
    ) -> bytes:
        return struct.pack(
            "=I4xQQQ", self.fd, ctypes.addressof(key), ctypes.addressof(value), flags)


def program_id(fd: int) -> int:
    """Return the number that the kernel has given to a program. Raises OSError."""
    return _id(fd)


def _id(fd: int) -> int:
    info = ctypes.create_string_buffer(256)  # struct bpf_map_info or bpf_prog_info
    bpf(OBJ_GET_INFO, struct.pack("=IIQ", fd, 80, ctypes.addressof(info)))
    number: int = struct.unpack_from("=I", info, 4)[0]  # the second word of both
    return number


def attached_n(ifindex: int, hook: int) -> int:
    """Return the number of programs at a TCX hook of a device; 0 also if the kernel has no TCX.

    Raises OSError.
    """
    # The kernel also writes behind the fields that it reads.
    attributes = ctypes.create_string_buffer(
        struct.pack("=IIIIQI4x", ifindex, hook, 0, 0, 0, 0), ATTRIBUTES_BYTES)
    try:
        _call(PROG_QUERY, attributes)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0
    number: int = struct.unpack_from("=I", attributes, 24)[0]
    return number


def cpus_n() -> int:
    """Return the number of possible CPUs. A value per CPU has this number of parts."""
    text = Path("/sys/devices/system/cpu/possible").read_text()
    return max(_ends(text)) + 1


def _ends(text: str) -> Iterator[int]:
    for part in text.strip().split(","):
        yield int(part.rpartition("-")[2])


def _buffer(data: bytes, size: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, size)


def bpf(command: int, attributes: bytes) -> int:
    """Call bpf(2). Buffers whose addresses are in the attributes must outlive the call.

    Raises OSError.
    """
    return _call(command, ctypes.create_string_buffer(attributes, ATTRIBUTES_BYTES))


def _call(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    if NUMBER is None:
        raise OSError(errno.ENOSYS, "bpf(2) has no known number on this machine")
    result: int = LIBC.syscall(NUMBER, command, attributes, len(attributes))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
