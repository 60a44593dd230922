"""Print every second which packets the forwarder drops: drop_rates.py [SECONDS]"""

import sys
import time

from udptun import ControlClient


def main(seconds: int) -> None:
    with ControlClient() as client:
        before = {(row.reason, row.direction): row.packets for row in client.drops()}
        for _ in range(seconds):
            time.sleep(1)
            for row in client.drops():
                new = row.packets - before[row.reason, row.direction]
                if new:
                    last = row.last[-1] if row.last else None
                    count = "1 packet" if new == 1 else f"{new} packets"
                    packet = f", last to {last.dst}" if last else ""
                    print(f"{row.reason} ({row.direction}): {count}{packet}", flush=True)
                before[row.reason, row.direction] = row.packets


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
