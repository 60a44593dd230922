"""Five exercises: a tunnel between two hosts is broken. Find out why, and repair it.

    python examples/ladder/ladder.py          list the exercises
    python examples/ladder/ladder.py 1        start exercise 1, as root

The hosts n1 and n2 are network namespaces of this machine. They are removed at the end.
docs/ladder.md explains how to work on an exercise.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from udptun.lab import Host, Lab, LabError, wait_for

ADDRESSES = {"n1": "192.0.2.1", "n2": "192.0.2.2"}
HELP = """\
  n1 COMMAND   run a command on host n1 (n2: on host n2)
  check        is the tunnel repaired?
  hint         where to look
  solution     what repairs it, and why
  quit         end, and remove the hosts"""

Steps = tuple[tuple[str, str], ...]  # (host, command)


@dataclass(frozen=True)
class Exercise:
    """``faults`` break the tunnel, ``solution`` repairs it. ``size`` is that of the test's ping."""

    title: str
    task: str
    hint: str
    faults: Steps
    solution: Steps
    why: str
    size: int = 56


EXERCISES = (
    Exercise(
        "A missing route",
        "On n1, ping 10.244.2.0 reports at once: Destination Net Unreachable.",
        "Ask the forwarder of n1 what it does with such a packet: udptun trace 10.244.2.0",
        (("n1", "udptun route del 10.244.2.0/24"),),
        (("n1", "udptun route add 10.244.2.0/24 via 192.0.2.2 probe"),),
        "The forwarder of n1 had no route to the subnet of n2. It dropped each packet as no_route, "
        "and sent an ICMP error to the sender.",
    ),
    Exercise(
        "A firewall",
        "On n1, a ping to 10.244.2.0 is not answered. Both routes are right.",
        "Find the direction that fails: udptun ping 192.0.2.2. Then list the rules of the host "
        "that does not receive: nft list ruleset",
        (("n2", "nft 'table inet lab { chain c { type filter hook input priority 0; "
                "udp dport 8285 drop; }; }'"),),
        (("n2", "nft delete table inet lab"),),
        "A rule of n2 dropped UDP port 8285, so the datagrams of n1 did not reach the forwarder.",
    ),
    Exercise(
        "An unknown sender",
        "On n1, a ping to 10.244.2.0 is not answered, although the packets reach n2.",
        "n2 drops them. See which, and who sent them: udptun drops --last",
        (("n2", "udptun route replace 10.244.1.0/24 via 192.0.2.9 probe"),),
        (("n2", "udptun route replace 10.244.1.0/24 via 192.0.2.1 probe"),),
        "The route of n2 had a wrong address. A forwarder accepts datagrams only from the "
        "addresses in its routes, so n2 dropped those of n1 as unknown_peer.",
    ),
    Exercise(
        "Large packets vanish",
        "On n1, ping 10.244.2.0 works, but ping -s 1300 10.244.2.0 does not. Something between the "
        "hosts, which you cannot change, drops large datagrams and reports nothing.",
        "Try sizes: ping -c 1 -W 1 -s 800 10.244.2.0. Then limit the size of the packets on both "
        "hosts: a route can have an mtu",
        (("n1", "udptun route replace 10.244.2.0/24 via 192.0.2.2"),
         ("n2", "udptun route replace 10.244.1.0/24 via 192.0.2.1"),
         *((name, "nft 'table inet path { chain c { type filter hook input priority -10; "
                  "udp dport 8285 udp length > 1008 drop; }; }'") for name in ADDRESSES)),
        (("n1", "udptun route replace 10.244.2.0/24 via 192.0.2.2 mtu 1000"),
         ("n2", "udptun route replace 10.244.1.0/24 via 192.0.2.1 mtu 1000")),
        "The path was a black hole for datagrams with more than 1000 bytes of payload. With an "
        "mtu, the forwarders make the packets fit. With probe in both routes, they find the size "
        "themselves, in some seconds.",
        size=1300,
    ),
    Exercise(
        "A route of another program",
        "On n1, ping 10.244.2.0 fails. The forwarders have all routes, and drop nothing.",
        "The kernel decides first. Compare what it does with another address of the overlay: "
        "udptun trace 10.244.2.0 and udptun trace 10.244.9.0",
        (("n1", "ip route add blackhole 10.244.2.0/24"),),
        (("n1", "ip route del blackhole 10.244.2.0/24"),),
        "The kernel of n1 had a route to 10.244.2.0/24 that is more specific than that of the TUN, "
        "10.244.0.0/16. The packets never reached the forwarder.",
    ),
)


class Hosts:
    """The two hosts with their forwarders. Each host has a /run of its own."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.hosts: dict[str, Host] = {name: lab.host(name) for name in ADDRESSES}
        for end in lab.segment(*self.hosts.values()):
            # The rules of exercise 4 must see single datagrams.
            end.offloads({"tx-udp-segmentation": "off", "gro": "off"})
        for number, name in enumerate(ADDRESSES, 1):
            self._start(name, number)
        for name in ADDRESSES:
            socket = lab.folder / f"run-{name}" / "udptun" / "udptun.sock"
            wait_for(socket.exists, f"the forwarder of {name}")
        self.run("n1", "udptun route add 10.244.2.0/24 via 192.0.2.2 probe")
        self.run("n2", "udptun route add 10.244.1.0/24 via 192.0.2.1 probe")
        wait_for(lambda: self.works(56), "a ping through the tunnel")

    def _start(self, name: str, number: int) -> None:
        host = self.hosts[name]
        host.ip(f"address add {ADDRESSES[name]}/24 dev {host.interfaces[0].name}")
        (self.lab.folder / f"run-{name}").mkdir()
        host.start(self._argv(
            name, f"exec udptun forward --listen {ADDRESSES[name]} --address 10.244.{number}.0 "
                  "--network 10.244.0.0/16"), env=self._env())

    def _argv(self, name: str, command: str) -> list[str]:
        return ["sh", "-c", f"mount --bind {self.lab.folder}/run-{name} /run\n{command}"]

    def _env(self) -> dict[str, str]:
        return {"PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"}

    def run(self, name: str, command: str) -> str:
        done = self.hosts[name].run(self._argv(name, command), check=False, env=self._env())
        return done.stdout + done.stderr

    def works(self, size: int) -> bool:
        """Whether a ping is answered. The first one may only tell the sender the right size."""
        output = self.run("n1", f"ping -c 6 -i 0.2 -W 1 -s {size} 10.244.2.0")
        received = re.search(r"(\d+) received", output)
        return received is not None and int(received[1]) > 0


def answer(hosts: Hosts, exercise: Exercise, line: str) -> str:
    word, _, rest = line.strip().partition(" ")
    if word in ADDRESSES and rest:
        return hosts.run(word, rest).rstrip()
    if word == "check":
        works = hosts.works(exercise.size)
        return "The tunnel works. Well done." if works else "Not yet: a ping is not answered."
    if word == "hint":
        return exercise.hint
    if word == "solution":
        steps = "\n".join(f"  {name} {command}" for name, command in exercise.solution)
        return f"{steps}\n{exercise.why}"
    return HELP


def work_on(exercise: Exercise) -> None:
    print("starting two hosts ...", flush=True)
    with Lab() as lab:
        hosts = Hosts(lab)
        for name, command in exercise.faults:
            if mistake := hosts.run(name, command).strip():
                print(mistake)
        print(f"\n{exercise.title}\n\n{exercise.task}\n\n{HELP}\n")
        print("> ", end="", flush=True)
        for line in sys.stdin:
            if line.strip() in ("quit", "exit"):
                break
            if line.strip():
                print(answer(hosts, exercise, line))
            print("> ", end="", flush=True)
    print("removed the hosts")


def main(words: list[str]) -> int:
    if len(words) != 1 or words[0] not in [str(n) for n in range(1, len(EXERCISES) + 1)]:
        for number, exercise in enumerate(EXERCISES, 1):
            print(f"{number}  {exercise.title}")
        return 2 if words else 0
    try:
        work_on(EXERCISES[int(words[0]) - 1])
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nremoved the hosts")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
