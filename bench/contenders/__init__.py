"""The contenders: the tunnels that are compared. Each contender has its own two hosts.

    base       the contract: a Contender sets up a PathUnderTest between two linked hosts
    builtin    the contenders of this repository and of the kernel
    external   contenders described by a TOML file: any tunnel that shell commands can start
    registry   finds the contender for a specification; only this module imports builtin and
               external

Owns: the names of the contenders and the set-up of each. Independent of the metrics.

A contender's specification, as on the command line:

    direct                    no tunnel: the veth pair itself
    vxlan                     the kernel's VXLAN
    udptun [OPTION]...        udptun with options of `udptun forward`: "udptun --offload off"
    udptun@DIR [OPTION]...    udptun from the checkout DIR, built in place; used to compare changes
    onepacket                 bench/onepacket: one packet per system call, like flannel's udp
    copylimit                 bench/copylimit: udptun's system calls without udptun's own work. It
                              runs on profile P1 only, where super-packets cross the wire whole
    NAME                      the tunnel that bench/contenders/NAME.toml describes: fastd, tinc

Main thread only, like udptun.lab.
"""

from .base import Contender, PathUnderTest
from .external import DESCRIPTIONS
from .registry import find, program

__all__ = ["DESCRIPTIONS", "Contender", "PathUnderTest", "find", "program"]
