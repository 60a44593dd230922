"""A bad path: relays datagrams between two peers; drops, duplicates and reorders some.

    relay.py ADDRESS PORT PEER_A PEER_B SEED

Each of the two forwarders has the relay as its peer. The relay prints "ready", and when it is
terminated, one line of JSON with its counts.
"""

import json
import random
import signal
import socket
import sys

LOST, DOUBLED, DELAYED = 0.01, 0.01, 0.02
MAX_DELAY = 8  # datagrams that may overtake a delayed one


def main() -> None:
    address, port, peer_a, peer_b, seed = sys.argv[1:]
    rng = random.Random(int(seed))
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 25)  # SO_RCVBUFFORCE
    sock.bind((address, int(port)))
    other = {peer_a: (peer_b, int(port)), peer_b: (peer_a, int(port))}
    did = {"passed": 0, "lost": 0, "doubled": 0, "delayed": 0}
    held: list[tuple[int, bytes, tuple[str, int]]] = []

    def finish(*_: object) -> None:
        print(json.dumps(did), flush=True)
        sys.exit(0)

    signal.signal(signal.SIGTERM, finish)
    print("ready", flush=True)
    while True:
        data, (source, _) = sock.recvfrom(1 << 16)
        target = other[source]
        dice = rng.random()
        did["passed"] += 1
        if dice < LOST:
            did["lost"] += 1
        elif dice < LOST + DOUBLED:
            did["doubled"] += 1
            sock.sendto(data, target)
            sock.sendto(data, target)
        elif dice < LOST + DOUBLED + DELAYED:
            did["delayed"] += 1
            held.append((did["passed"] + rng.randrange(1, MAX_DELAY), data, target))
        else:
            sock.sendto(data, target)
        for entry in [e for e in held if e[0] <= did["passed"]]:
            held.remove(entry)
            sock.sendto(entry[1], entry[2])


main()
