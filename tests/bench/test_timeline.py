"""The timeline of a request: the filter of the packet sockets, and the stages."""

import socket
import struct

from bench import timeline
from bench.load import PORT

REQUEST = struct.pack("!HHHH", 40000, PORT, 72, 0) + bytes(64)
REPLY = struct.pack("!HHHH", PORT, 40000, 72, 0) + bytes(64)
HEADERS = bytes(28)


def passes(port_at, packet):
    """Attach the filter to a socket of this program, and send the packet to this socket."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.setblocking(False)
        timeline.attach_filter(receiver, timeline.tail_filter(port_at))
        sender.send(packet)
        try:
            return receiver.recv(1 << 17) == packet
        except BlockingIOError:
            return False


def test_the_filter_takes_packets_that_end_with_a_request():
    for packet in (REQUEST, HEADERS + REQUEST, bytes(60000) + REQUEST, REQUEST + bytes(52)):
        assert passes(timeline.REQUEST, packet)
        assert not passes(timeline.REPLY, packet)
    assert passes(timeline.REPLY, HEADERS + REPLY)


def test_the_filter_refuses_other_packets():
    for packet in (b"x", REQUEST[:-1], REQUEST + b"x", HEADERS, bytes(1500), HEADERS + REPLY):
        assert not passes(timeline.REQUEST, packet)


def test_the_stages_are_those_of_requests_that_were_seen_everywhere():
    taps = [{1: 10 * i + 1000, 2: 5} for i in range(len(timeline.PLACES))]
    del taps[3][2]
    stages = timeline.stages_of(taps, {1: (990, 1077), 2: (0, 9), 3: (1, 2)})
    assert stages == [[10]] * 8 + [[7]]
    assert len(stages) == len(timeline.STAGES)
    *_, whole = timeline.Timeline(stages, 3, []).rows()
    assert whole == ("round trip", [87])
