/* The express path: two programs that carry packets between the TUN and the underlay in the kernel.
 *
 * "send" runs on the egress of the TUN, "receive" on the ingress of the underlay's interface. Each
 * takes the packets that it fully understands and leaves the others to user space. A packet that is
 * left is unchanged. docs/datapath.md describes both ways.
 *
 * A datagram from "send" has the outer UDP checksum 0; user space always sends a checksum. The
 * inner checksum of such a datagram may be unfinished (CHECKSUM_PARTIAL): if the link is a veth or
 * virtio, no device finishes it. So "receive" takes all datagrams with the checksum 0 that it can,
 * and user space finishes the inner checksum of the others.
 *
 * Compiled at development time (make express). Only UAPI headers are needed, and no BTF.
 */
#include "packet.h"

/* The values of the TC_ACT_* constants (linux/pkt_cls.h). "Unspecified" lets the next program at
 * this hook run, and then the kernel goes on as without programs. */
enum { NEXT = -1, DROP = 2 };

/* A flow that has sent nothing for this time belongs to no path: by then, none of its packets waits
 * in user space any more, so a change of the path does not reorder packets. */
#define FLOW_IDLE_NS 1000000000ULL
/* More single packets with data per RATE_NS than this: user space sends them faster, in batches.
 * More bytes in super-packets: bulk, and not the answers to single requests. */
#define RATE_NS 10000000ULL
#define RATE_PACKETS 500
#define RATE_BYTES 131072
/* A forwarder that has shown nothing for this time is dead: nobody reads the TUN. */
#define DEAD_NS 3000000000ULL

extern char settings, tun, table, peers, counters, totals, flows;

INLINE void count(__u32 what, __u64 n)
{
	__u32 zero = 0;
	struct totals *all = map_lookup(&totals, &zero);

	if (all)
		all->n[what] += n;
}

/* n  number of packets that the packet stands for */
INLINE int leave(__u32 reason, __u32 n)
{
	count(reason, n);
	return NEXT;
}

/* Return the entry of the longest prefix with this address. The kind has its IP version. */
INLINE struct entry *look_up(void *trie, __u8 kind, const __u32 *address)
{
	struct prefix key = { .kind = kind };

	key.bits = KIND_BITS + ((kind & 0xF) == 4 ? 32 : 128);
	copy_address(key.addr, address);
	return map_lookup(trie, &key);
}

/* Leave a flow to user space until it is idle, because user space has got a packet of it. */
INLINE void stay(const struct flow *key)
{
	struct flow_state *state = map_lookup(&flows, key), new = {};

	new.last_ns = new.since_ns = now_ns();
	new.in_user_space = 1;
	if (state)
		*state = new;
	else
		map_update(&flows, key, &new, BPF_ANY);
}

/* Return whether user space sends this flow. A flow with bulk moves to user space as a whole and
 * stays there until it is idle, so its packets stay in order: what the kernel has sent is ahead.
 *
 * n       number of packets; more than 1: a super-packet
 * length  of the packet
 * data    whether there is anything after the headers
 */
INLINE int in_user_space(const struct flow *key, const struct settings *own,
			 const struct peer *peer, __u32 n, __u32 length, int data)
{
	struct flow_state *state = map_lookup(&flows, key), new = {};
	__u64 now = now_ns(), idle;

	if (!state) {
		new.last_ns = new.since_ns = now;
		map_update(&flows, key, &new, BPF_ANY);
		state = map_lookup(&flows, key);
		if (!state)
			return 0;
	}
	idle = now - state->last_ns;
	state->last_ns = now;
	/* Some kernels cannot segment UDP super-packets in a tunnel: these go to user space. */
	if (n > 1 && (__u8)key->ports != TCP) {
		state->in_user_space = 1;
		return 1;
	}
	if (now > own->beat_ns && now - own->beat_ns > DEAD_NS)
		return 0;
	if (state->in_user_space && idle < FLOW_IDLE_NS)
		return 1;
	state->in_user_space = 0;
	if (now - state->since_ns > RATE_NS) {
		state->since_ns = now;
		state->packets = state->bytes = 0;
	}
	if (n > 1 && peer->slow_bulk)
		state->bytes += length;
	else if (n == 1 && data)
		state->packets++;
	if (state->bytes > RATE_BYTES || state->packets > RATE_PACKETS)
		state->in_user_space = 1;
	return state->in_user_space;
}

/* Return the number of packets that a packet stands for, as the kernel has counted them. */
INLINE __u32 frames(const struct __sk_buff *skb)
{
	return skb->gso_segs > 1 ? skb->gso_segs : 1;
}

SECTION("tc/send") int send(struct __sk_buff *skb)
{
	__u32 zero = 0, header, n, size, limit;
	struct settings *own = map_lookup(&settings, &zero);
	void *trie = map_lookup(&table, &zero);
	struct counters *counted;
	struct packet inner;
	struct entry *route;
	struct peer *peer;
	__u8 copied;
	int outer;

	if (!own || !trie)
		return NEXT;
	if (parse_sent(skb, &inner))
		return own->sending ? leave(SEND_OTHER, frames(skb)) : NEXT;
	if (!own->sending) {
		stay(&inner.flow);
		return NEXT;
	}
	header = inner.header;
	n = packets_of(skb, skb->len, header);
	route = look_up(trie, ROUTE | inner.addrs.version, inner.addrs.destination);
	if (!route || !(route->flags & ROUTE_EXPRESS) || route->flags & ROUTE_ENDPOINT)
		return leave(SEND_NO_ROUTE, n);
	peer = map_lookup(&peers, &route->peer);
	counted = map_lookup(&counters, &route->peer);
	if (!peer || !counted) {
		stay(&inner.flow);
		return leave(SEND_PEER, n);
	}
	if (inner.hops < 2)
		return leave(SEND_HOP_LIMIT, n);

	limit = peer->limit;
	if (route->mtu && route->mtu < limit)
		limit = route->mtu;
	size = n > 1 ? header + skb->gso_size : skb->len;
	outer = route->peer.family == 4 ? OUTER4 : OUTER6;
	if (size > limit || skb->len + outer > 0xFFFF) {
		stay(&inner.flow);
		return leave(SEND_SIZE, n);
	}
	if (in_user_space(&inner.flow, own, peer, n, skb->len, skb->len > header))
		return leave(SEND_FLOW, n);

	size = skb->len;
	copied = own->class_copied | (route->flags & ROUTE_ECN ? ECN : 0);
	if (encapsulate(skb, own, &route->peer, &inner, size,
			own->class_set | (inner.traffic_class & copied)) < 0) {
		stay(&inner.flow);
		return leave(SEND_REFUSED, n);
	}
	if (change_head(skb, ETHERNET, 0) < 0) {
		count(SEND_DROPPED, n);
		return DROP;
	}
	counted->sent_packets += n;
	counted->sent_bytes += size + (__u64)(n - 1) * header;
	count(SENT, n);
	skb->mark = own->mark;
	/* No next hop is passed, so the kernel looks up and stores the route of the outer packet. Else a
	 * packet that waits for ARP or NDP would later leave by the stored route of the inner packet. */
	return redirect_neigh(peer->ifindex, 0, 0, 0);
}

SECTION("tc/receive") int receive(struct __sk_buff *skb)
{
	__u32 zero = 0, n, size = 0, *device;
	struct settings *own = map_lookup(&settings, &zero);
	void *trie = map_lookup(&table, &zero);
	struct counters *counted;
	struct endpoint sender = {};
	struct packet inner;
	struct entry *route;
	struct peer *peer;
	__u8 ecn = 0, inner_ecn;
	int outer, marked;

	/* Without the TUN, the datagrams belong to whoever listens now. */
	device = map_lookup(&tun, &zero);
	if (!own || !trie || !device || !own->receiving)
		return NEXT;
	outer = parse_outer(skb, own, &sender, &size, &ecn);
	if (outer == 0)
		return NEXT;
	if (parse_received(skb, outer, size, &inner))
		return leave(RECEIVE_OTHER, frames(skb));
	n = packets_of(skb, size, inner.header);

	if (look_up(trie, OWN | inner.addrs.version, inner.addrs.source))
		return leave(RECEIVE_SOURCE, n);
	/* User space accepts more senders. Those that are refused here are left to it. */
	route = look_up(trie, ROUTE | inner.addrs.version, inner.addrs.source);
	if (!route || !(route->flags & ROUTE_EXPRESS) || !same_endpoint(&route->peer, &sender))
		return leave(RECEIVE_SOURCE, n);
	peer = map_lookup(&peers, &route->peer);
	counted = map_lookup(&counters, &route->peer);
	/* On another interface, the kernel checks the sender's address (rp_filter). */
	if (!peer || !counted || peer->ifindex != skb->ifindex)
		return leave(RECEIVE_SOURCE, n);
	if (own->admit_own &&
	    !look_up(trie, ADMIT | inner.addrs.version, inner.addrs.destination))
		return leave(RECEIVE_DESTINATION, n);
	if (inner.hops < 2)
		return leave(RECEIVE_HOP_LIMIT, n);
	/* RFC 6040. The unusual combinations are left to user space, which counts them. */
	inner_ecn = inner.traffic_class & ECN;
	marked = ecn == CE && inner_ecn != CE;
	if (marked ? inner_ecn == 0 : ecn && ecn != inner_ecn && !(inner_ecn == CE && ecn == ECT0))
		return leave(RECEIVE_ECN, n);

	switch (decapsulate(skb, outer, &inner)) {
	case 0:
		break;
	case UNCHANGED:
		return leave(RECEIVE_REFUSED, n);
	default:
		count(RECEIVE_DROPPED, n);
		return DROP;
	}
	if (marked) {
		if (mark(skb, &inner) < 0) {
			count(RECEIVE_DROPPED, n);
			return DROP;
		}
		count(RECEIVE_MARKED, n);
	}
	counted->received_packets += n;
	counted->received_bytes += size + (__u64)(n - 1) * inner.header;
	counted->last_seen_ns = now_ns();
	count(RECEIVED, n);
	return redirect(*device, BPF_F_INGRESS);
}
