"""What is compared: each contender is a way between two hosts of its own.

Owns: the names they go by. Refuses to know: what is measured on them.

A contender is asked for by its words, as on a command line:

    direct                    the veth itself
    vxlan                     the kernel's VXLAN
    udptun [OPTION]...        udptun with options of `udptun forward`: "udptun --offload off"
    udptun@DIR [OPTION]...    the same from another checkout, built in place: for comparing changes
    onepacket                 bench/onepacket: one packet per system call, as flannel does it
    copylimit                 bench/copylimit: udptun's system calls without its work, P1 only
    NAME                      what bench/contenders/NAME.toml describes, e.g. fastd, tinc
"""

from .base import Contender, Road, find
from .external import DESCRIPTIONS

__all__ = ["DESCRIPTIONS", "Contender", "Road", "find"]
