"""Bugs to plant: for each harness, a check that is removed from the source.

Owns the list, and the patched copies of the source. The native program has all its bugs at once;
the environment variable FUZZ_PLANTED turns one of them on (kernel.h). A Python target runs in a
copy of the tree in which one check is always true or always false.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from .native import ROOT

_SWITCH = "cdef extern from *:\n    bint planted_is(int n) nogil\n\n"


@dataclass(frozen=True)
class Bug:
    """A check to remove: ``around`` is text of the file, with the condition in double braces."""

    harness: str
    file: str
    around: str
    without: bool  # the value of the condition without the check

    @property
    def check(self) -> str:
        return self.around[self.around.index("{{") + 2 : self.around.index("}}")]

    def plant(self, text: str, condition: str) -> str:
        """Replace the check by ``condition``, in which {} is the check."""
        old = self.around.replace("{{", "").replace("}}", "")
        changed = condition.format(f"({self.check})")
        new = self.around.replace("{{" + self.check + "}}", f"({changed})")
        if text.count(old) != 1:
            raise ValueError(f"{self.file}: found {text.count(old)} times: {old}")
        return text.replace(old, new)


NATIVE = (
    Bug("encap", "wire/cut.pxd", "if {{l4_hdr < TCP_MIN or l4_hdr > l4_len}}:", False),
    Bug("encap", "wire/packet.pxd", "if {{ip.hdr_len < IP4_MIN or ip.hdr_len > n}}:", False),
    Bug("decap", "path/capture.pxd", "visible and {{off + 4 <= n}} and (", True),
    Bug("decap", "wire/packet.pxd", "if {{ip.total_len < ip.hdr_len or ip.total_len > n}}:", False),
    Bug("decap", "wire/probe.pxd", "if {{n < PROBE_LEN}}:", False),
    Bug("merge", "wire/merge.pxd", "and {{c.payload_len <= out.gso_size}} and", True),
    Bug("merge", "wire/merge.pxd", "and {{out.total_len + c.payload_len <= IP_MAX}}\n", True),
    Bug("flush", "path/send.pxd", "or {{total + datagram.len > MAX_UDP_PAYLOAD}}:", False),
    Bug("errors", "path/send.pxd", "or {{c.cmsg_len < CMSG_LEN(sizeof(err))}}:", False),
    Bug("publish", "table/publish.pxd", "if {{item.generation > oldest}}:", False),
    Bug("text", "table/text.pxd", "while {{i < n}} and (text[i] == c' '", True),
    Bug("json", "table/json.pxd", "if {{p.pos < p.n}} else 0", True),
)

PYTHON = (
    Bug("step-cut", "tests/reference/cut.py", "if {{field + 2 > len(packet)}}:", False),
    Bug("step-packet", "tests/reference/packet.py",
        "if {{header.total_len < header.header_len or header.total_len > len(packet)}}:", False),
    Bug("step-fragment", "tests/reference/fragment.py",
        "if {{length < 2 or at + length > len(options)}}:", False),
    Bug("step-icmp", "tests/reference/icmp.py", "if {{at + length > len(packet)}}:", False),
    Bug("step-merge", "tests/reference/merge.py",
        "if {{len(transport) < (20 if header.protocol == PROTO_TCP else 8)}}:", False),
    Bug("probe", "udptun/probe/message.py", "if {{len(message) < HEADER_SIZE}}:", False),
    Bug("route-text", "udptun/model.py", "or {{not low <= value <= high}}:", False),
    Bug("route-json", "udptun/model.py", "or {{not low <= value <= high}}:", False),
    Bug("control", "udptun/control/protocol.py",
        "return {{digits.isascii() and digits.isdigit()}} and", True),
    Bug("flannel", "udptun/control/flannel.py", "if {{not 0 <= net_len <= 32}}:", False),
    Bug("lease", "udptun/leases/etcd/schema.py", "if {{not 0 < v4.prefixlen < 32}} or", False),
    Bug("node", "udptun/leases/kube/schema.py",
        "if isinstance(network, ipaddress.IPv4Network) and {{v4 is None}}:", True),
    Bug("advert", "udptun/leases/advert.py", "and {{low <= value <= high}}\n", True),
    Bug("hosts", "udptun/leases/file/schema.py",
        "if {{not items or len({item.version for item in items}) != len(items)}}:", False),
    Bug("net-conf", "udptun/leases/netconf.py", "if {{address not in network}}:", False),
    Bug("takeover", "udptun/takeover/document.py",
        "if address is None or {{len(address) not in sizes}}:", False),
)


def plant_python(bug: Bug, out: Path) -> Path:
    """Copy the tree with one bug to ``out``. Return the directory of the copy."""
    shutil.rmtree(out, ignore_errors=True)
    for part in ("udptun", "tests/fuzz", "tests/reference", "tests/steps"):
        ignored = shutil.ignore_patterns("*.c", "__pycache__")
        shutil.copytree(ROOT / part, out / part, ignore=ignored)
    (out / "tests" / "__init__.py").touch()
    path = out / bug.file
    path.write_text(bug.plant(path.read_text(), str(bug.without)))
    return out


def plant_native(out: Path) -> Path:
    """Copy the core with all native bugs to ``out``. Return the directory of the copy."""
    core = out / "src_ext"
    shutil.rmtree(core, ignore_errors=True)
    shutil.copytree(ROOT / "src_ext", core, ignore=shutil.ignore_patterns("*.c"))
    for number, bug in enumerate(NATIVE, start=1):
        path = core / bug.file
        text = path.read_text()
        value = "True" if bug.without else "False"
        text = bug.plant(text, f"{value} if planted_is({number}) else {{}}")
        if _SWITCH not in text:
            end = text.index('"""', 3) + 3
            text = f"{text[:end]}\n\n{_SWITCH}{text[end:]}"
        path.write_text(text)
    return core
