"""Connect this host with another one: two_hosts.py HERE THERE NUMBER

HERE and THERE are the addresses of the two hosts on the real network. NUMBER
is 1 on one host and 2 on the other. Each host gets the overlay network 10.244.NUMBER.0/24. Run the
program as root on both hosts, and end it with Ctrl-C.
"""

import asyncio
import contextlib
import sys

from udptun import Forwarder, ForwarderConfig


async def main(here: str, there: str, number: int) -> None:
    config = ForwarderConfig(
        here, addresses=f"10.244.{number}.0", networks="10.244.0.0/16",
        control="/run/udptun/udptun.sock")
    async with Forwarder(config) as forwarder:
        await forwarder.put_route(f"10.244.{3 - number}.0/24 via {there} probe")
        with forwarder.subscribe() as events:
            print(f"{forwarder.tun_name} is up, MTU {forwarder.mtu}", flush=True)
            async for event in events:
                if event["type"].startswith("peer_"):
                    print(event["endpoint"], event["type"].removeprefix("peer_"), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
