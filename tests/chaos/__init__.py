"""A cluster in the hands of administrators, packages and the network.

Five nodes with pods, and a store: a real etcd, or the small Kubernetes API server of the tests. The
overlay has IPv4, or IPv4 and IPv6. Every few seconds one random act: a deleted route, a flushed
rule set, a filtered port, a killed process. After each act either every pod reaches every other
again, or the status of the nodes concerned says why not.

    python -m tests.chaos --list                      # the acts
    python -m tests.chaos --seed 7 --minutes 10       # as `make chaos`
    python -m tests.chaos --act link-down --seed 7    # one act
    python -m tests.chaos --store kubernetes --ipv6   # another cluster

stores.py   the stores
world.py    the cluster, and what an operator can ask it
mesh.py     traffic between all pods: who reaches whom, and since when
acts/       the acts, by kind
judge.py    one act: do it, watch, undo it, watch; the verdict
run.py      the sequence of acts, and the report

Needs root.
"""
