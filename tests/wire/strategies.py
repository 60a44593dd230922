"""Hypothesis strategies: flows, super-packets, arrivals in any order, corrupted bytes."""

from dataclasses import replace

from hypothesis import strategies as st

from tests.reference.probe import REPLY, REQUEST, Probe, build_probe
from tests.wire.craft import (
    ACK,
    CWR,
    DESTINATION_OPTIONS,
    ECE,
    FIN,
    HOP_BY_HOP,
    ICMP,
    PLAIN,
    PSH,
    ROUTING,
    RST,
    SYN,
    TIMESTAMPS,
    URG,
    Flow,
    ip4,
    ip6,
)

NOISE = bytes((i * i + 7 * i) % 251 for i in range(4096))
tcp_options = st.sampled_from([b"", TIMESTAMPS, b"\x01" * 4, b"\x01" * 40])


def payloads(max_size=2000, min_size=0):
    """Bytes of a chosen length; their values matter little, and long random ones are slow."""
    return st.builds(
        lambda start, length: (NOISE * (1 + length // len(NOISE) + 1))[start : start + length],
        st.integers(0, 250), st.integers(min_size, max_size),
    )


@st.composite
def extensions(draw, room=56):
    """IPv6 extension headers that Linux keeps in a super-packet, in at most room bytes:
    options of any content, and routes that have come to their end."""
    found = []
    while room >= 8 and draw(st.booleans()):
        number = draw(st.sampled_from([HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS]))
        size = draw(st.sampled_from([size for size in (6, 14, 22, 54) if size + 2 <= room]))
        body = draw(st.binary(min_size=size, max_size=size))
        if number == ROUTING:
            body = body[:1] + b"\0" + body[2:]
        found.append((number, body))
        room -= 2 + size
    return tuple(found)


@st.composite
def flows(draw, more_headers=False):
    """more_headers: IPv4 options or IPv6 extension headers too."""
    version = draw(st.sampled_from([4, 6]))
    size = 4 if version == 4 else 16
    return Flow(
        version,
        src=draw(st.binary(min_size=size, max_size=size)),
        dst=draw(st.binary(min_size=size, max_size=size)),
        sport=draw(st.integers(0, 65535)),
        dport=draw(st.integers(0, 65535)),
        tos=draw(st.integers(0, 255)),
        ttl=draw(st.integers(0, 255)),
        label=draw(st.integers(0, 0xFFFFF)),
        flags=draw(st.sampled_from([0, 0x4000, 0x8000, 0xC000])),
        ip_options=draw(st.sampled_from([b"", b"\x94\x04\0\0", b"\x01" * 40]))
        if more_headers and version == 4 else b"",
        extensions=draw(extensions(16)) if more_headers and version == 6 else (),
    )


@st.composite
def super_frames(draw):
    """A frame that the kernel may deliver: any flags, IPv4 options or IPv6 extension headers, any
    gso_size."""
    flow = draw(flows(more_headers=True))
    payload = draw(payloads())
    gso_size = draw(st.one_of(st.integers(1, 65535), st.integers(20, 1500)))
    if len(payload) // gso_size > 300:
        gso_size = 17
    ident = draw(st.integers(0, 65535))
    if draw(st.booleans()):
        return flow.udp_super(payload, gso_size, ident=ident)
    return flow.tcp_super(
        payload, gso_size, ident=ident,
        seq=draw(st.integers(0, 2**32 - 1)), ack=draw(st.integers(0, 2**32 - 1)),
        flags=draw(st.integers(0, 255)), window=draw(st.integers(0, 65535)),
        urgent=draw(st.integers(0, 65535)), reserved=draw(st.integers(0, 15)),
        options=draw(tcp_options), ecn=draw(st.booleans()),
    )


@st.composite
def mergeable_frames(draw):
    """A super-packet as merging would write it: two segments or more."""
    flow = draw(flows())
    gso_size = draw(st.integers(1, 1460))
    payload = draw(payloads(min_size=gso_size + 1, max_size=gso_size * draw(st.integers(2, 20))))
    ident = draw(st.integers(0, 65535))
    if draw(st.booleans()):
        return flow.udp_super(payload, gso_size, ident=ident)
    return flow.tcp_super(
        payload, gso_size, ident=ident,
        seq=draw(st.integers(0, 2**32 - 1)), ack=draw(st.integers(0, 2**32 - 1)),
        flags=draw(st.sampled_from([ACK, ACK | PSH])), window=draw(st.integers(0, 65535)),
        urgent=draw(st.sampled_from([0, 0, 9])), options=draw(tcp_options),
    )


# Few flows with similar addresses and ports, so that their packets often meet.
FLOWS = [
    Flow(4), Flow(4, sport=1), Flow(6), Flow(6, dport=1),
    Flow(4, src=b"\xfd\0\0\1", dst=b"\xfd\0\0\2"),
    Flow(6, src=b"\xfd\0\0\1" * 4, dst=b"\xfd\0\0\2" * 4),
]
# Changes that prevent a merge: of TCP fields, of the flow's IP header, of numbers.
ODD_FIELDS = [
    *({"flags": flags} for flags in (
        0, SYN, ACK | FIN, ACK | RST, ACK | ECE, ACK | CWR, ACK | URG, ACK | PSH | FIN,
    )),
    *({"flags": ACK | PSH} for _ in range(4)),
    {"window": 3}, {"urgent": 3}, {"ack": 3}, {"reserved": 1}, {"options": TIMESTAMPS},
]
ODD_HEADERS = [
    {"tos": 3}, {"ttl": 65}, {"label": 5}, {"flags": 0}, {"flags": 0x8000}, {"flags": 0xC000},
    {"ip_options": b"\x94\x04\0\0"},
]
ODD_NUMBERS = [(1, 0), (-1, 0), (1400, 0), (0, 1), (0, -1), (0, 1000)]  # of seq and IPv4 id
# Packets of no flow above, or with hidden ports.
OUTSIDERS = [
    *(ip4(NOISE[:64], proto, flags=word)
      for proto in (6, 17, ICMP) for word in (0x2000, 1, 0x2001)),
    *(ip4(NOISE[:64], proto) for proto in (ICMP, 47)),
    *(ip4(NOISE[:length], proto) for length in (0, 4, 7, 19) for proto in (6, 17)),
    *(ip6(NOISE[:64], proto) for proto in (0, 43, 44, 50, 51, 60, 58)),
    ip6(b"", 6), ip4(b"padded", ICMP) + b"\0",
    Flow(4).udp(NOISE[:100], no_checksum=True),
    Flow(4).udp(NOISE[:99], no_checksum=True),
]


@st.composite
def arrivals(draw, max_size=40):
    """Packets of some flows as a tunnel delivers them: mostly adjacent segments of one size,
    with any other packets between them. All pass check_packet."""
    chosen = draw(st.lists(st.sampled_from(FLOWS), min_size=1, max_size=3))
    size = draw(st.sampled_from([1, 2, 99, 100, 1400]))
    odd = st.sampled_from([None] * 12 + ["field", "header", "number", "size", "outsider"])
    expected = {}  # the seq and id that continue a flow
    arrived = []
    for _ in range(draw(st.integers(0, max_size))):
        flow, tcp, event = draw(st.sampled_from(chosen)), draw(st.booleans()), draw(odd)
        seq, ident = expected.get((flow, tcp), (2**32 - 500, 65530))
        key, fields, length = (flow, tcp), {}, size
        if event == "outsider":
            arrived.append(draw(st.sampled_from(OUTSIDERS)))
            continue
        if event == "field":
            fields = draw(st.sampled_from(ODD_FIELDS))
            length = draw(st.sampled_from([0, size, size]))
        elif event == "header":
            change = draw(st.sampled_from(ODD_HEADERS))
            flow = replace(flow, **({} if flow.version == 6 and "ip_options" in change else change))
        elif event == "number":
            more_seq, more_ident = draw(st.sampled_from(ODD_NUMBERS))
            seq, ident = seq + more_seq, ident + more_ident
        elif event == "size":
            length = draw(st.sampled_from([0, 0, max(1, size // 2), size + 1]))
        data = NOISE[seq % 250 :][:length]
        if tcp:
            arrived.append(flow.tcp(data, seq=seq, ident=ident, **fields))
        else:
            arrived.append(flow.udp(data, ident=ident))
        expected[key] = (seq + length) % 2**32, (ident + 1) % 65536
    return arrived


@st.composite
def mutated(draw, source):
    """Valid bytes with some changed, removed or added."""
    data = bytearray(draw(source))
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        # mostly in the headers
        at = draw(st.one_of(st.integers(0, min(99, len(data) - 1)), st.integers(0, len(data) - 1)))
        kind = draw(st.sampled_from(["byte", "byte", "byte", "bit", "word", "truncate", "extend"]))
        if kind == "byte":
            data[at] = draw(st.integers(0, 255))
        elif kind == "bit":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "word":
            data[at : at + 2] = draw(st.sampled_from([b"\0\0", b"\xff\xff", b"\0\1", b"\x7f\xff"]))
        elif kind == "truncate":
            del data[at:]
        else:
            data += bytes(draw(st.integers(1, 9)))
    return bytes(data)


@st.composite
def packets(draw):
    """One valid IP packet."""
    flow = draw(flows(more_headers=True))
    data = draw(payloads())
    if draw(st.booleans()):
        return flow.udp(data)
    return flow.tcp(data, flags=draw(st.integers(0, 255)), options=draw(tcp_options))


@st.composite
def probes(draw):
    return Probe(
        draw(st.sampled_from([REQUEST, REPLY])), draw(st.integers(0, 2**64 - 1)),
        draw(st.integers(0, 2**32 - 1)), draw(st.integers(24, 1472)),
    )


def probe_bytes():
    """One valid probe."""
    return probes().map(build_probe)


@st.composite
def chained_frames(draw):
    """IPv6 super-packets with valid and invalid extension header chains."""
    numbers = st.sampled_from([0, 43, 60, 60, 60, 60, 44, 50, 51, 59, 135])
    bodies = st.one_of(
        st.just(bytes(6)), st.sampled_from([6, 14, 22, 40 * 8 - 2]).map(bytes),
        st.binary(min_size=6, max_size=6),
    )
    flow = Flow(6, extensions=tuple(draw(st.lists(st.tuples(numbers, bodies), max_size=10))))
    payload = draw(payloads(100))
    if draw(st.booleans()):
        frame = flow.udp_super(payload, draw(st.integers(1, 40)))
    else:
        frame = flow.tcp_super(payload, draw(st.integers(1, 40)), options=draw(tcp_options))
    return frame[: draw(st.integers(0, len(frame)))] if draw(st.booleans()) else frame


plain_frames = st.builds(lambda packet: PLAIN + packet, packets())
frames = st.one_of(super_frames(), plain_frames)
noise = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda first, rest: bytes([first]) + rest,
        st.sampled_from([0x45, 0x46, 0x4F, 0x60]), st.binary(max_size=200),
    ),
)
noisy_frames = st.builds(
    lambda flags, kind, rest, packet: bytes([flags, kind]) + rest + packet,
    st.integers(0, 3), st.sampled_from([0, 1, 4, 5, 0x81, 0x84, 3]),
    st.binary(min_size=8, max_size=8), noise,
)
