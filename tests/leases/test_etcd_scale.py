"""Five thousand leases in a real etcd: the snapshot, one change, and the memory for the leases."""

import json
import subprocess
import sys

from tests.leases.etcd_server import needs_etcd

pytestmark = needs_etcd

LEASES_N = 5000
MEMORY_MAX_KIB = 70_000  # a complete daemon may use 80 MB

# This program runs in a separate process, so that only its memory is measured.
FOLLOW = """
import asyncio, json, sys, time
from udptun.leases.etcd.config import EtcdConfig
from udptun.leases.etcd.source import EtcdSource

async def follow(url):
    source = EtcdSource(EtcdConfig((url,)))
    updates = source.updates()
    began = time.monotonic()
    snapshot = await anext(updates)
    took = time.monotonic() - began
    print("listed", flush=True)
    changes = await anext(updates)
    lines = open("/proc/self/status").read().splitlines()
    peak = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    await updates.aclose()
    await source.aclose()
    print(json.dumps({"leases": len(snapshot.leases), "peak_kib": int(peak), "seconds": took,
                      "changed": [change.key for change in changes.changes]}))

asyncio.run(follow(sys.argv[1]))
"""


async def test_five_thousand_leases(etcd, record_property):
    await etcd.put_many({
        f"subnets/10.{i >> 8}.{i & 255}.0-24": json.dumps({
            "PublicIP": f"192.168.{i >> 8}.{i & 255}", "PublicIPv6": None, "BackendType": "vxlan",
            "BackendData": {"VNI": 1, "VtepMAC": f"aa:bb:cc:dd:{i >> 8:02x}:{i & 255:02x}",
                            "udptun": {"port": 8285, "mtu": 1450}},
        }) for i in range(LEASES_N)
    })
    with subprocess.Popen([sys.executable, "-c", FOLLOW, etcd.url], stdout=subprocess.PIPE,
                          text=True) as process:
        try:
            assert process.stdout.readline() == "listed\n"
            await etcd.put("subnets/10.0.7.0-24", '{"PublicIP":"192.0.2.7"}')
            seen = json.loads(process.stdout.readline())
        finally:
            process.kill()
    record_property("snapshot_seconds", seen["seconds"])
    assert seen["leases"] == LEASES_N and seen["changed"] == ["10.0.7.0-24"]
    assert seen["peak_kib"] < MEMORY_MAX_KIB
