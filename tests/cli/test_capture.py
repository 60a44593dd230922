"""``udptun capture``: its output, and the programs that read it. The forwarder is a fake one."""

import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import Udptun, fails, udptun
from tests.control.fakes import CAPTURED, PING, Served, status_of
from tests.reference import build_record
from tests.reference.capture import parse_records
from udptun.cli.capture import Lines, _by_endpoint, _endpoints, describe
from udptun.cli.captured import Counts, End, Packet, records
from udptun.cli.dropped import WIDTHS, _line, _row
from udptun.cli.lazy import Failure
from udptun.control.capture import counts_record, end_record
from udptun.errors import UdptunError

__all__ = ["udptun"]

HEAD = {"reasons": ["short_packet"], "clock_offset_ns": 10**18}
TCPDUMP = shutil.which("tcpdump")
TSHARK = shutil.which("tshark")


def blocks(path: Path) -> list[tuple[int, bytes]]:
    """Return the type and the content of each block of a pcapng file."""
    text, found = path.read_bytes(), []
    while text:
        kind, size = struct.unpack_from("<II", text)
        assert text[size - 4 : size] == text[4:8]
        found.append((kind, text[8 : size - 4]))
        text = text[size:]
    return found


def test_lines(udptun: Udptun) -> None:
    result = udptun("capture --text --seconds 1")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "01:46:40.000001  out  icmp 10.244.1.7 > 10.244.2.5, 28 bytes, peer 192.0.2.2:8285",
        "01:46:40.000002  out  icmp 10.244.1.7 > 10.244.2.5, 9000 bytes, dropped: too_big, "
        "peer 192.0.2.2:8285, super-packet of 7 packets, 1400 payload bytes each",
    ]
    assert result.stderr == "2 packets captured, 3 not captured: they came faster than they were " \
        "written\n"


def test_packets_that_pass_in_the_kernel_are_mentioned(udptun: Udptun, served: Served) -> None:
    state = status_of(1, 0)["accelerate"] | {"active": True, "devices": ["eth0"]}
    served.forwarder.other_status = {"accelerate": state}
    result = udptun("capture --text --seconds 1")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr.splitlines()[:2] == [
        "packets that pass in the kernel (--accelerate auto) are not captured. To see them within "
        "their datagrams:",
        "  tcpdump -ni eth0 udp port 8285"]


def test_a_file_is_complete_and_private(udptun: Udptun, tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    result = udptun(f"capture -w {path} --count 2")
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    assert path.stat().st_mode & 0o777 == 0o600
    assert [kind for kind, _ in blocks(path)] == [0x0A0D0D0A, 1, 6, 6, 5]


@pytest.mark.parametrize("mode", [0o1777, 0o755], ids=["shared", "of another user"])
@pytest.mark.parametrize("plant", ["link", "name", "fifo", "file"])
def test_what_others_put_into_their_directory_is_not_written(
    udptun: Udptun, tmp_path: Path, plant: str, mode: int
) -> None:
    """Root captures into /tmp, or into a user's directory, and the user was there first."""
    if (plant == "file" or mode == 0o755) and os.geteuid() != 0:
        pytest.skip("only root can make a file of another user")
    shared, precious = tmp_path / "shared", tmp_path / "precious"
    shared.mkdir()
    shared.chmod(mode)
    if mode == 0o755:
        os.chown(shared, 65534, 65534)
    precious.write_text("precious")
    path = shared / "x.pcapng"
    if plant == "link":
        path.symlink_to(precious)
    elif plant == "name":
        path.hardlink_to(precious)
    elif plant == "fifo":
        os.mkfifo(path)
    else:
        path.touch(0o666)
        os.chown(path, 65534, 65534)
    result = udptun(f"capture -w {path} --count 2")
    assert result.exit_code == 1, result.output
    assert f"cannot write {path}" in result.stderr
    assert precious.read_text() == "precious"
    assert plant != "file" or path.read_bytes() == b""
    own = shared / "y.pcapng"
    for _ in range(2):  # our own file is replaced
        assert udptun(f"capture -w {own} --count 2").exit_code == 0
    link = tmp_path / "z.pcapng"  # nobody else can have made this link
    link.symlink_to(own)
    assert udptun(f"capture -w {link} --count 2").exit_code == 0


def test_options_become_the_filter(udptun: Udptun, served: Served) -> None:
    udptun("capture --text --seconds 1 --peer 192.0.2.2 --route 10.244.2.0/24 --host 10.244.2.1 "
           "--host fd00::1 --port 53 --protocol udp --dropped --direction in -s 96 --sample 1/7")
    [(wanted, _)] = served.forwarder.captures
    assert [str(address) for address, _ in wanted.peers] == ["192.0.2.2"]
    assert [str(network) for network in wanted.networks] == ["10.244.2.0/24"]
    assert [str(host) for host in wanted.hosts] == ["10.244.2.1", "fd00::1"]
    assert (wanted.ports, wanted.protocols, wanted.dropped) == ((53,), (17,), True)
    assert (wanted.direction, wanted.snaplen, wanted.sample) == ("in", 96, 7)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("--peer n9", 1, "n9: there is no peer of this name"),
        ("--peer 192.0.2.300", 2, "for --peer: '192.0.2.300' is not valid"),
        ("--route 10.0.0.1/8", 2, "for --route: '10.0.0.1/8' is not valid"),
        ("--port 1 --port 2 --port 3", 2, "for --port: [1, 2, 3] is not valid"),
        ("--protocol quic", 2, "for --protocol: 'quic' is not valid"),
        ("--sample 2/3", 2, "'2/3' is not valid: expected 1/N"),
        ("-w x --text", 2, "exclude each other"),
        ("--file-size 1", 2, "needs --write FILE"),
        ("-w x --files 2", 2, "--files needs --file-size"),
        ("-w /nowhere/x --count 1", 1, "cannot write /nowhere/x: No such file or directory"),
    ],
)
def test_a_wrong_argument_is_named(udptun: Udptun, words: str, code: int, text: str) -> None:
    output = "" if "-w" in words else "--text "
    fails(udptun(f"capture {output}--seconds 1 {words}"), code, text)


def test_files_rotate(
    udptun: Udptun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("udptun.cli.capture.MEGABYTE", 10)
    path = tmp_path / "x.pcapng"
    assert udptun(f"capture -w {path} --file-size 1 --files 2 --count 2").exit_code == 0
    assert {file.name for file in tmp_path.glob("x*")} == {"x.pcapng.1", "x.pcapng.2"}
    assert [kind for kind, _ in blocks(tmp_path / "x.pcapng.1")] == [0x0A0D0D0A, 1, 6]


def test_records_in_pieces_of_any_size() -> None:
    whole = CAPTURED + b"".join((counts_record(7, 2), end_record("why")))
    [expected] = records(HEAD, [whole])
    assert expected[-2:] == [Counts(7, 2), End("why")]
    for size in (1, 7, 64, 100):
        pieces = (whole[at : at + size] for at in range(0, len(whole), size))
        assert [one for batch in records(HEAD, pieces) for one in batch] == expected
    assert [one.data for one in expected[:2]] == [one.data for one in parse_records(CAPTURED)]


def test_unknown_records_are_ignored_and_invalid_ones_refused() -> None:
    record = bytearray(build_record(next(parse_records(CAPTURED))))
    record[36] = 9  # a kind of a later version
    [[only]] = records(HEAD, [bytes(record) + counts_record(1, 0)])
    assert only == Counts(1, 0)
    struct.pack_into("<I", record, 0, 8)
    with pytest.raises(UdptunError, match="an invalid record of 8 bytes"):
        [*records(HEAD, [bytes(record)])]


def test_what_the_forwarder_knows_of_a_packet() -> None:
    [[packet, *_]] = records(HEAD, [CAPTURED])
    named = _by_endpoint([row("n2\x1b", "192.0.2.2:8285")])
    assert [*describe(packet, named)] == ["peer 192.0.2.2:8285 (n2\\x1b)"]
    assert [*describe(packet._replace(generated=True, endpoint=""), named)] == [
        "made by the forwarder"]
    assert [*describe(packet._replace(packets=4, reason="slow_peer", endpoint=""), named)] == [
        "dropped: slow_peer", "the first of 4 packets"]


@pytest.mark.skipif(TCPDUMP is None, reason="tcpdump is not installed")
def test_tcpdump_reads_the_file(udptun: Udptun, tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    udptun(f"capture -w {path} --count 2")
    done = subprocess.run([TCPDUMP or "", "-nr", str(path)], capture_output=True, text=True,
                          check=True)
    assert done.stdout.count("10.244.1.7 > 10.244.2.5: ICMP echo request") == 2
    assert "link-type RAW" in done.stderr


@pytest.mark.skipif(TSHARK is None, reason="tshark is not installed")
def test_wireshark_reads_the_file(udptun: Udptun, tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    udptun(f"capture -w {path} --count 2")
    fields = ("frame.time_epoch", "frame.len", "frame.cap_len", "frame.packet_flags_direction",
              "frame.drop_count", "frame.comment")
    arguments = [word for field in fields for word in ("-e", field)]
    done = subprocess.run([TSHARK or "", "-r", str(path), "-T", "fields", *arguments],
                          capture_output=True, text=True, check=True)
    assert [line.split("\t") for line in done.stdout.splitlines()] == [
        ["1000000000.000001000", "28", "28", "0x00000002", "", "peer 192.0.2.2:8285"],
        ["1000000000.000002000", "9000", str(len(PING)), "0x00000002", "3",
         "dropped: too_big; peer 192.0.2.2:8285; "
         "super-packet of 7 packets, 1400 payload bytes each"],
    ]


def test_a_name_means_all_addresses_of_the_peer() -> None:
    names = [row("n2", "192.0.2.2:8285", "[2001:db8::2]:8285"), row("n3")]
    assert _endpoints("n2", names) == ["192.0.2.2", "2001:db8::2"]
    for text in ("192.0.2.2", "192.0.2.2:8285", "2001:db8::2", "198.51.100.1"):
        assert _endpoints(text, names) == [text]
    with pytest.raises(Failure, match="n3 has no path through the forwarder"):
        _endpoints("n3", names)


def row(name: str, *endpoints: str) -> dict[str, Any]:
    return {"name": name, "subnets": [], "endpoint": endpoints[0] if endpoints else None,
            "endpoints": dict.fromkeys(endpoints, ())}


def test_a_packet_is_shown_completely_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("udptun.cli.capture.terminal_width", lambda: 60)
    Lines([]).packet(Packet(0, "out", "no_route", 84, 1, 0, False, "192.0.2.2:8285", 0, b""))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= 60
    assert " ".join(" ".join(lines).split()).endswith("dropped: no_route, peer 192.0.2.2:8285")


def test_a_line_of_drops_fits_into_the_terminal(served: Served) -> None:
    (drop,) = [drop for drop in served.forwarder.drops() if drop["last"]]
    packet = {"reason": "source_not_routed", "direction": "decap", **drop["last"][0],
              "endpoint": "192.0.2.123:8285"}
    cells = _row(packet, [])
    assert _line(cells, 80) == \
        "13:05:24.921 source_not_routed 192.0.2.123:8285 udp 10.244.1.7:40000 >\n" \
        "             10.244.9.9:53"
    packet["reason"] = "no_route"
    assert _line(_row(packet, []), 80).endswith(" 10.244.1.7:40000 > 10.244.9.9:53")
    assert _line(cells, 100).endswith("udp 10.244.1.7:40000 > 10.244.9.9:53")
    assert _line(cells, None) == _line(cells, 130)
    assert len(_line(cells, 130)) > sum(WIDTHS)
