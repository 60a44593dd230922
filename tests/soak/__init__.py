"""Everything at once, for a long time, on a cluster with a real etcd.

Four nodes with IPv4 and IPv6. Between the pods of three of them: UDP with numbers, and TCP. All the
time, leases of other nodes come and go, so the tables change. A seed decides when: a forwarder
takes over, a forwarder is killed, etcd is away, a flood of forged ICMP errors arrives, the fourth
node leaves or comes back.

n2 and n3 have --accelerate auto, the others not: so each kind of pair is there, also across kills
and take-overs. `--accelerate off|all` changes this.

Every SAMPLE_SECONDS the traffic pauses. Then each forwarder's packet counters must add up exactly.
At the end: the memory and the descriptors of each process have not grown beyond a bound, all TCP
bytes have arrived unchanged, and each lost datagram is explained by name: the interval of a kill,
or a counter of drops. The express path has moved packets on the nodes that have it, and on no
other.

    python -m tests.soak --seconds 600 --seed 7       # as `make soak`

traffic.py  the flows between the pods
events.py   what happens to the cluster
counts.py   what is read of each process, and what must hold
run.py      the loop, the progress, the report

Needs root.
"""
