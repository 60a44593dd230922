"""``udptun top`` in a terminal: what a person sees and presses, signals, other programs' names."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.scene import HOSTILE, Scene, scene
from tests.cli.tty import UDPTUN, Tty

# Everything that top may send: the screen, the cursor, text attributes. Nothing of a foreign name.
ALLOWED = re.compile(rb"\x1b\[(\?1049[hl]|\?25[hl]|\?7[hl]|[HKJ]|(0|1|2|7|31|33|1;4)m)")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("node"), 30) as running:
        yield running


def command(running: Scene, *words: str) -> list[str]:
    return [*UDPTUN, "--socket", str(running.path), "top", "-d", "0.2", *words]


def once(running: Scene, *words: str, **env: str) -> str:
    return subprocess.run(
        command(running, "--once", *words), check=True, capture_output=True, text=True,
        env={**os.environ, **env}).stdout


def test_keys(node: Scene) -> None:
    with Tty(command(node)) as tty:
        text = tty.until("n2 ")
        assert "30 peers: 3 unreachable, 1 limited, 26 reachable" in text
        assert re.search(r"^n2 +reachable +udp +0\.30 ms", text, re.MULTILINE)
        tty.until(lambda: "█" in tty.text and "OUT/S*" in tty.text)
        tty.until(lambda: re.search(r"no_route encap .*/s", tty.text))
        tty.until(lambda: re.search(r"CPU of 2 workers \d+% \d+% +packets per call: sent \d",
                                    tty.text))
        tty.press("s")
        tty.until("IN/S*")
        tty.press("\x1b[D\x1b[D")
        tty.until("STATE*")
        assert re.search(r"STATE\*.*\nn\d+ +unreachable", tty.text)
        tty.press("r")
        tty.until("STATE^")
        tty.press("d")
        tty.until(lambda: "IN/S" not in tty.text and "direction: out" in tty.text)
        tty.press("/10.244.2.")
        tty.until("filter: 10.244.2._")
        tty.until(lambda: len(re.findall(r"^n\d+ ", tty.text, re.MULTILINE)) == 1)
        tty.press("\rq")
        assert tty.ended() == 0
        assert tty.modes() == tty.at_start
        assert tty.raw.endswith(b"\x1b[?1049l")
        # Clearing after a full line would remove its last character.
        assert not re.search(rb"[^\nH]\x1b\[K", tty.raw)


def test_details_scrolling_help_and_pause(node: Scene) -> None:
    with Tty(command(node, "--sort", "name")) as tty:
        tty.until("n2: reachable")
        tty.press("\x1b[F")
        tty.until("n31: unreachable")
        tty.press("\x1b[A")
        tty.until("n30: reachable")
        tty.press("\x1b[H\x1b[B\x1b[B\x1b[B")
        tty.until("n5: unreachable for 3 min: no answer to 3 probes in a row")
        tty.press("?")
        tty.until("this page; any key closes it")
        tty.press("xp")
        tty.until("PAUSED")
        answers, picture = node.forwarder.answers, tty.text
        tty.until(lambda: node.forwarder.answers >= answers + 3)  # the measurement goes on
        tty.press("j")
        tty.until("n6: reachable")
        assert tty.text.splitlines()[:5] == picture.splitlines()[:5]
        tty.press("p")
        tty.until(lambda: "PAUSED" not in tty.text)


def test_a_new_size(node: Scene) -> None:
    with Tty(command(node)) as tty:
        tty.until("n2 ")
        for columns, lines, title in ((120, 40, "REASON"), (40, 10, "OUT/S"), (80, 24, "RTT")):
            tty.resize(columns, lines)
            tty.until(lambda n=lines, t=title: tty.screen.display[n - 1].startswith("q quit")
                      and t in tty.text)
        assert "REASON" not in tty.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_restores_the_terminal(node: Scene, number: signal.Signals) -> None:
    with Tty(command(node)) as tty:
        tty.until("n2 ")
        assert tty.modes() != tty.at_start
        if number == signal.SIGINT:
            tty.press("\x03")  # by the terminal itself
        else:
            tty.process.send_signal(number)
        assert tty.ended() == 128 + number
        assert tty.modes() == tty.at_start
        assert b"Traceback" not in tty.raw and tty.raw.endswith(b"\x1b[?1049l")


def test_a_shell_stops_and_continues_it(node: Scene) -> None:
    with Tty(["bash", "--norc", "-i"], env={"PS1": "shell> "}) as tty:
        tty.until("shell>")
        tty.press(" ".join(command(node)) + "\r")
        tty.until("q quit")
        tty.press("\x1a")
        tty.until("Stopped")
        # The emulator has no alternate screen.
        assert tty.raw.count(b"\x1b[?1049h") == tty.raw.count(b"\x1b[?1049l") == 1
        tty.press("echo an$((1 + 1))swer\r")
        tty.until("an2swer")
        tty.press("fg\r")
        tty.until(lambda: tty.raw.count(b"\x1b[?1049h") > 1)
        tty.press("s")
        tty.until("order: in")
        tty.press("q")
        tty.until(lambda: tty.text.rstrip().endswith("shell>"))
        tty.press("exit\r")
        tty.ended()


def test_a_failure_restores_the_terminal(tmp_path: Path) -> None:
    with scene(tmp_path, 2) as broken, Tty(command(broken)) as tty:
        tty.until("n2 ")
        broken.forwarder.drops = lambda: [{}]  # type: ignore[method-assign]  # lacks its keys
        assert tty.ended() == 1
        assert tty.modes() == tty.at_start
        assert "KeyError" in tty.text and b"\x1b[?1049l" in tty.raw


def test_the_forwarder_restarts_and_ends(tmp_path: Path) -> None:
    with scene(tmp_path, 3) as running, Tty(command(running)) as tty:
        tty.until("UDP out")
        running.forwarder.pid = 2000
        running.forwarder.peers[0]["encap"]["bytes"] = 0
        tty.until(lambda: re.search(r"another process at [\d:]+: 1000 -> 2000", tty.text))
        tty.until(lambda: re.search(r"UDP out \d.*iB/s", tty.text))
        running.close()
        tty.until("the forwarder does not answer; trying again")
        assert "n2 " in tty.text  # what the node daemon knows
        running.stop_node()
        tty.until("no forwarder answers on")
        tty.press("q")
        assert tty.ended() == 0


def test_foreign_names_cannot_control_the_terminal(tmp_path: Path) -> None:
    with scene(tmp_path, HOSTILE) as running, Tty(command(running), 120, 40) as tty:
        tty.until("\\x1b]0;owned\\x07")
        tty.until("日本語")
        tty.press("/evil\r")
        tty.until("limited for")
        tty.press("q")
        tty.ended()
        rest = ALLOWED.sub(b"", tty.raw).decode()
        assert re.sub(r"[\r\n]", "", rest).isprintable()


@pytest.mark.slow  # much CPU time
def test_five_hundred_peers(tmp_path: Path) -> None:
    with scene(tmp_path, 500) as running, Tty(command(running, "--sort", "name")) as tty:
        tty.until("n2 ")
        tty.press("\x1b[F")
        tty.until("n501: ")
        tty.press("\x1b[5~")
        tty.until(lambda: "n501: " not in tty.text and re.search(r"n48\d: ", tty.text))
        assert len(once(running).splitlines()) == 506


def test_a_snapshot(node: Scene) -> None:
    text = once(node)
    assert "\x1b" not in text and len(text.splitlines()) == 36
    assert re.search(r"^n2 +reachable .* KiB", text, re.MULTILINE)
    assert "n5" not in once(node, "--filter", "reachable") or "n5 " in text
    two = subprocess.run(command(node, "-n", "2", "--filter", "n2"), check=True,
                         capture_output=True, text=True).stdout
    assert two.count("udptun top") == 2 and "\n\n" in two


def test_without_unicode_the_bars_are_ascii(node: Scene) -> None:
    assert once(node, LC_ALL="C").isascii()
    assert "█" in once(node, LC_ALL="C.UTF-8")


def test_no_colour(node: Scene) -> None:
    with Tty(command(node), env={"NO_COLOR": "1"}) as tty:
        tty.until("unreachable")
        tty.press("q")
        tty.ended()
    assert b"\x1b[31m" not in tty.raw


def test_without_a_usable_terminal_it_says_what_to_do(node: Scene) -> None:
    done = subprocess.run(command(node), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not a terminal. `udptun top --once` prints a snapshot" in done.stderr
    with Tty(command(node), env={"TERM": "dumb"}) as tty:
        assert tty.ended() == 1
        assert "TERM is dumb" in tty.text and b"\x1b" not in tty.raw


def test_a_node_with_vxlan_only(tmp_path: Path) -> None:
    with scene(tmp_path, 4) as running:
        running.close()
        text = once(running)
        assert "no forwarder on this host" in text and "4 peers: 1 unreachable" in text
        assert re.search(r"^n3 +reachable", text, re.MULTILINE)
        running.stop_node()
        done = subprocess.run(command(running, "--once"), capture_output=True, text=True,
                              check=False)
        assert done.returncode == 1 and "no forwarder answers on" in done.stderr
