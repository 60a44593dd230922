"""Print the peers that do not answer. The exit code is 1 if there is one."""

import sys

from udptun import ControlClient, UdptunError


def main() -> int:
    try:
        with ControlClient() as client:
            peers = client.peers()
    except UdptunError as error:
        print(error, file=sys.stderr)
        return 2
    silent = [peer for peer in peers if peer.probe and peer.probe.state == "unreachable"]
    for peer in silent:
        print(f"{peer.endpoint} since {peer.probe.since}: {peer.probe.reason}")
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main())
