"""The flame graph: the parser of perf's output, the shares, and the nested boxes."""

import xml.etree.ElementTree as ET

import pytest

from bench import cli, flame

SCRIPT = """\
udptun-worker-0
\tffffffff81234567 rep_movs_alternative ([kernel.kallsyms])
\tffffffff81234000 tun_do_read ([kernel.kallsyms])
\t    7f0000001234 __pyx_f_5encap_drain_tun (/x/udptun/_core.cpython-311-x86_64-linux-gnu.so)

udptun-worker-0
\t    7f0000001235 udptun_csum_avx2 (/x/udptun/_core.cpython-311-x86_64-linux-gnu.so)
\t    7f0000001234 __pyx_f_5encap_drain_tun (/x/udptun/_core.cpython-311-x86_64-linux-gnu.so)

swapper
\tffffffff81000000 pv_native_safe_halt ([kernel.kallsyms])

iperf3
\t    7f0000001111 [unknown] (/usr/lib/libc.so.6)

"""


def test_stacks_begin_at_the_root():
    samples = list(flame.stacks(SCRIPT))
    assert [comm for comm, _ in samples] == [
        "udptun-worker-0", "udptun-worker-0", "swapper", "iperf3",
    ]
    assert samples[0][1] == [
        ("__pyx_f_5encap_drain_tun", "core"), ("tun_do_read", "kernel"),
        ("rep_movs_alternative", "kernel"),
    ]


def test_shares_are_of_the_busy_time():
    found, idle = flame.shares(flame.stacks(SCRIPT))
    assert idle == 1
    assert found == {"copying": 1, "checksums": 1, flame.OTHER: 1}
    text = flame.table(found, idle, "one")
    assert "3 samples, 25% of the time idle" in text
    assert "| copying | 33.3% |" in text


def test_a_box_is_as_wide_as_its_children_together():
    root = flame.Node("all")
    for comm, frames in flame.stacks(SCRIPT):
        root.add([(comm, "thread"), *frames])
    drawn = ET.fromstring(flame.draw(root, "a < b"))
    boxes = {
        g.find("{*}title").text: g.find("{*}rect").attrib for g in drawn.iter() if
        g.tag.endswith("}g")
    }
    assert float(boxes["all: 100.0%"]["width"]) == pytest.approx(1200, abs=1)
    worker, drain = boxes["udptun-worker-0: 50.0%"], boxes["__pyx_f_5encap_drain_tun: 50.0%"]
    assert (worker["x"], worker["width"]) == (drain["x"], drain["width"])
    assert int(drain["y"]) > int(worker["y"])
    assert float(boxes["rep_movs_alternative: 25.0%"]["width"]) == pytest.approx(300, abs=1)


@pytest.mark.parametrize("argv", [["--help"], ["cpu", "--help"], ["flame", "--help"]])
def test_help_is_printed(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out
