/* Layouts of the maps that the express programs and user space share.
 *
 * udptun/forwarder/express.py and src_ext/table/express.pxd fill the maps: both follow this file.
 * Addresses are in network order; an IPv4 address is in the first 4 bytes, the others are zero.
 * Ports, sizes and flags are in host order. Unused bytes are zero, because they belong to the keys.
 *
 * The loader sets the address of each map in the program (the names are declared as "extern").
 */
#ifndef UDPTUN_EXPRESS_MAPS_H
#define UDPTUN_EXPRESS_MAPS_H

#include <linux/types.h>

/* "settings", array of 1: the device, the addresses and the options of the forwarder. */
struct settings {
	__u32 mark;		/* mark of sent datagrams; 0: none */
	__u32 listen4;		/* our address on the underlay; all zero: none */
	__u32 listen6[4];
	__u16 port4;
	__u16 port6;
	__u32 admit_own;	/* 1: deliver only to the prefixes of kind ADMIT */
	__u32 sending;		/* 1: the send program may send */
	__u32 receiving;	/* 1: the receive program may take datagrams */
	/* The traffic class of a datagram is class_set | (class of its packet & class_copied). */
	__u32 class_set;
	__u32 class_copied;
	__u64 beat_ns;		/* monotonic time when the forwarder has last shown that it runs */
};

/* "tun", array of 1 device: the index of the TUN. The kernel empties it when the TUN is gone. */

/* "table", array of 1 map: a trie (longest prefix match) of all addresses that the programs look
 * up. A change of the routes puts a new trie into the array, so all entries change at once. */
enum kind {
	ROUTE = 0x00,		/* a route; the key is its destination */
	OWN = 0x10,		/* an address of this host */
	ADMIT = 0x20,		/* a prefix to which packets are delivered */
	/* plus the IP version, 4 or 6 */
};

#define KIND_BITS 32

struct prefix {
	__u32 bits;		/* KIND_BITS, plus the length of the prefix */
	__u8 kind;
	__u8 zero[3];
	__u32 addr[4];
};

/* "peers" and "counters", hash tables: the key is the endpoint of a peer. */
struct endpoint {
	__u32 addr[4];
	__u16 port;
	__u8 family;		/* 4 or 6 */
	__u8 zero;
};

enum route_flags {
	ROUTE_EXPRESS = 1,	/* the peer receives in the kernel */
	ROUTE_ENDPOINT = 2,	/* contains the endpoint of a peer: user space decides */
	ROUTE_ECN = 4,		/* the peer applies congestion marks */
};

struct entry {			/* value of "table"; only routes use it */
	struct endpoint peer;
	__u16 mtu;		/* of the route; 0: none */
	__u8 flags;
	__u8 zero;
};

/* "peers": the peers for which the programs may work. User space removes the others. */
struct peer {
	__u32 ifindex;		/* of the underlay device towards the peer */
	__u16 limit;		/* largest inner packet */
	__u16 slow_bulk;	/* 1: user space sends bulk to this peer faster */
};

/* "counters", per CPU: of one peer. An entry exists for each peer of "peers". */
struct counters {
	__u64 sent_packets, sent_bytes;
	__u64 received_packets, received_bytes;
	__u64 last_seen_ns;	/* monotonic time of the last received packet */
};

/* "totals", array of 1 per CPU: packets, by direction and fate. */
enum total {
	SENT, RECEIVED,
	/* Dropped: the packet was changed already when the kernel refused a step. */
	SEND_DROPPED, RECEIVE_DROPPED,
	/* Left to user space, by the first reason that was found. */
	LEFT_FIRST,
	SEND_OTHER = LEFT_FIRST,	/* not IP, or a protocol or option that needs user space */
	SEND_NO_ROUTE,		/* no route, or the peer does not receive in the kernel */
	SEND_HOP_LIMIT,		/* hop limit 0 or 1 */
	SEND_SIZE,		/* larger than the path allows */
	SEND_PEER,		/* the peer is not in "peers" */
	SEND_FLOW,		/* user space sends this flow faster */
	SEND_REFUSED,		/* the kernel refused a step before the packet was changed */
	RECEIVE_OTHER,		/* sent by the kernel, but not a form that the program knows */
	RECEIVE_SOURCE,		/* the sender may not use this source address */
	RECEIVE_DESTINATION,	/* --admit own */
	RECEIVE_HOP_LIMIT,
	RECEIVE_REFUSED,
	RECEIVE_ECN,		/* the mark drops the packet, or its ECN field is unexpected */
	RECEIVE_MARKED,		/* not left: received packets that got a congestion mark */
	TOTALS
};

struct totals {
	__u64 n[TOTALS];
};

/* "flows", hash table that forgets the least recently used: flows of the send program. */
struct flow {
	__u64 addresses, ports;
};

struct flow_state {
	__u64 last_ns;		/* of the last packet */
	__u64 since_ns;		/* when packets and bytes were first counted */
	__u32 packets;		/* single packets with data */
	__u32 bytes;		/* in super-packets */
	__u32 in_user_space;	/* 1: user space has this flow until it is idle */
	__u32 zero;
};

#endif
