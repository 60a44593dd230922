"""The contenders: the tunnels that are compared, each with two hosts of its own.

    base       the contract: a Contender sets up a PathUnderTest between two linked hosts
    builtin    the contenders of this repository and of the kernel
    external   contenders described by a TOML file: any tunnel that shell commands can start
    registry   finds the contender for a specification; the only module that imports the others

Owns: their names and how each is set up. Independent of what is measured.

A contender's specification, as on the command line:

    direct                    no tunnel: the veth pair itself
    vxlan                     the kernel's VXLAN
    udptun [OPTION]...        udptun with options of `udptun forward`: "udptun --offload off"
    udptun@DIR [OPTION]...    the udptun of another checkout, built in place: to compare changes
    onepacket                 bench/onepacket: one packet per system call, like flannel's udp
    copylimit                 bench/copylimit: udptun's system calls without its work; profile P1
                              only, where super-packets pass the wire whole
    NAME                      the tunnel that bench/contenders/NAME.toml describes: fastd, tinc

Main thread only, like udptun.lab.
"""

from .base import Contender, PathUnderTest
from .external import DESCRIPTIONS
from .registry import find, program

__all__ = ["DESCRIPTIONS", "Contender", "PathUnderTest", "find", "program"]
