"""bench/copylimit must use the batch limits of udptun's worker. Otherwise the copy limit is not an
upper bound for the worker."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CORE = "\n".join(path.read_text() for path in (ROOT / "src_ext" / "path").glob("*.pxd"))
COPYLIMIT = (ROOT / "bench" / "copylimit.c").read_text()


def constant(text, name):
    return int(re.search(rf"\b{name} = (\d+)", text)[1])


def test_batches_have_the_same_limits():
    assert constant(COPYLIMIT, "SLOTS") == constant(CORE, "RX_SLOTS") == constant(CORE, "TX_MSGS")
    assert constant(COPYLIMIT, "RX_BATCH_BYTES") == constant(CORE, "RX_BATCH_BYTES")
    assert constant(COPYLIMIT, "TX_FLUSH_BYTES") == constant(CORE, "QUEUE_FULL_BYTES")
