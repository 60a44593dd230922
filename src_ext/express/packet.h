/* The packets of the express path: parse them, add the outer headers, remove them.
 *
 * Every function checks the bounds of what it reads. The parsers accept a packet only if user space
 * would forward it without any special treatment. Sources: RFC 791, RFC 8200, RFC 6935 (no UDP
 * checksum over IPv6), bpf-helpers(7).
 */
#ifndef UDPTUN_EXPRESS_PACKET_H
#define UDPTUN_EXPRESS_PACKET_H

#include "helpers.h"
#include "maps.h"

enum { ETHERNET = 14, UDP = 8, OUTER4 = 20 + UDP, OUTER6 = 40 + UDP };
enum { ECN = 3, ECT0 = 2, CE = 3 };	/* the ECN field of a traffic class, and its values */
enum { ICMP = 1, TCP = 6, UDP_PROTOCOL = 17, ICMP6 = 58 };
enum { PACKET_HOST = 0 };		/* linux/if_packet.h */
enum { UNCHANGED = 1, CHANGED = 2 };	/* results of encapsulate and decapsulate */

#define ETHERTYPE4 BE16(0x0800)
#define ETHERTYPE6 BE16(0x86DD)
#define DONT_FRAGMENT 0x4000
#define FRAGMENT 0x3FFF			/* more fragments, or an offset */
#define HOP_LIMIT 64

struct ip4 {
	__u8 version_length, tos;
	__u16 total_length, id, fragment;
	__u8 hops, protocol;
	__u16 checksum;
	__u32 source, destination;
};

struct ip6 {
	__u8 version_class, class_label[3];
	__u16 payload_length;
	__u8 next_header, hops;
	__u32 source[4], destination[4];
};

struct udp {
	__u16 source, destination, length, checksum;
};

struct addresses {
	__u32 version;
	__u32 source[4], destination[4];	/* IPv4: in the first word, the others are zero */
};

struct packet {
	struct addresses addrs;
	struct flow flow;		/* only of a sent packet */
	__u32 length;			/* that the IP header declares */
	__u32 header;			/* IP header, and the transport header of a sent packet */
	__u8 hops;
	__u8 traffic_class;
	__u8 second;			/* second byte of the IP header: it has the ECN field */
};

INLINE void copy_address(__u32 *to, const __u32 *from)
{
	for (int i = 0; i < 4; i++)
		to[i] = from[i];
}

INLINE int same_address(const __u32 *a, const __u32 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

INLINE void set_addresses4(struct addresses *to, const struct ip4 *ip)
{
	__builtin_memset(to, 0, sizeof(*to));
	to->version = 4;
	to->source[0] = ip->source;
	to->destination[0] = ip->destination;
}

INLINE void set_addresses6(struct addresses *to, const struct ip6 *ip)
{
	to->version = 6;
	copy_address(to->source, ip->source);
	copy_address(to->destination, ip->destination);
}

INLINE void set_class4(struct packet *to, const struct ip4 *ip)
{
	to->second = to->traffic_class = ip->tos;
}

INLINE __u8 class6(const struct ip6 *ip)
{
	return ip->version_class << 4 | ip->class_label[0] >> 4;
}

INLINE void set_class6(struct packet *to, const struct ip6 *ip)
{
	to->second = ip->class_label[0];
	to->traffic_class = class6(ip);
}

/* Return whether an IPv4 header has no options, belongs to no fragment, and declares this length to
 * be that of the packet; and whether the destination is a single host. */
INLINE int is_plain4(const struct ip4 *ip, __u32 length)
{
	return ip->version_length == 0x45 && BE16(ip->total_length) == length &&
	       !(BE16(ip->fragment) & FRAGMENT) && *(__u8 *)&ip->destination < 224;
}

INLINE int is_extension(__u8 next_header)
{
	/* hop-by-hop, routing, fragment, ESP, AH, no next header, destination options, mobility, HIP,
	 * shim6 */
	return next_header == 0 || next_header == 43 || next_header == 44 || next_header == 50 ||
	       next_header == 51 || next_header == 59 || next_header == 60 || next_header == 135 ||
	       next_header == 139 || next_header == 140;
}

INLINE int is_plain6(const struct ip6 *ip, __u32 length)
{
	return ip->version_class >> 4 == 6 && BE16(ip->payload_length) + 40U == length &&
	       !is_extension(ip->next_header) && *(__u8 *)ip->destination != 0xFF;
}

/* Make the first n bytes readable and writable through pointers. Return 0, or -1 if the packet is
 * shorter. n is a constant. */
#define READABLE(skb, n) \
	(AT(data_of(skb), n) <= end_of(skb) ? 0 : pull_data(skb, n) < 0 ? -1 : 0)

/* Return the number of packets that a super-packet stands for; 1 for any other packet. */
INLINE __u32 packets_of(const struct __sk_buff *skb, __u32 length, __u32 header)
{
	__u32 size = skb->gso_size;

	if (size == 0 || length <= header + size)
		return 1;
	return (length - header + size - 1) / size;
}

/* Set the flow of a sent packet. The first 8 bytes of its transport header are readable. */
INLINE void set_flow(struct packet *to, __u8 protocol, const __u8 *l4)
{
	__u64 mixed = 0;

	for (int i = 0; i < 4; i++) {
		mixed = (mixed ^ to->addrs.source[i]) * 0x9E3779B97F4A7C15ULL;
		mixed = (mixed ^ to->addrs.destination[i]) * 0xD6E8FEB86659FD93ULL;
		if (to->addrs.version == 4)
			break;
	}
	to->flow.addresses = mixed;
	to->flow.ports = protocol;
	if (protocol == TCP || protocol == UDP_PROTOCOL)
		to->flow.ports |= (__u64)*(__u32 *)l4 << 32;
}

/* Parse a packet at the egress of the TUN. Return 0 if it is TCP, UDP or ICMP, without anything
 * unusual. */
INLINE int parse_sent(struct __sk_buff *skb, struct packet *to)
{
	__u32 header = 8;		/* of UDP and of an ICMP echo */
	__u8 protocol, *data, *l4;

	if (skb->protocol == ETHERTYPE4) {
		struct ip4 *ip;

		if (READABLE(skb, 20 + 8))
			return -1;
		data = data_of(skb);
		if (AT(data, 20 + 8) > end_of(skb))
			return -1;
		ip = (void *)data;
		if (!is_plain4(ip, skb->len))
			return -1;
		protocol = ip->protocol;
		if (protocol == TCP) {
			if (READABLE(skb, 20 + 20))
				return -1;
			data = data_of(skb);
			if (AT(data, 20 + 20) > end_of(skb))
				return -1;
			ip = (void *)data;
			l4 = AT(data, 20);
			header = (l4[12] >> 4) * 4;
			if (header < 20)
				return -1;
		} else if (protocol != UDP_PROTOCOL && protocol != ICMP) {
			return -1;
		}
		set_addresses4(&to->addrs, ip);
		set_class4(to, ip);
		to->hops = ip->hops;
		to->header = 20 + header;
		l4 = AT(data, 20);
	} else if (skb->protocol == ETHERTYPE6) {
		struct ip6 *ip;

		if (READABLE(skb, 40 + 8))
			return -1;
		data = data_of(skb);
		if (AT(data, 40 + 8) > end_of(skb))
			return -1;
		ip = (void *)data;
		if (!is_plain6(ip, skb->len))
			return -1;
		protocol = ip->next_header;
		if (protocol == TCP) {
			if (READABLE(skb, 40 + 20))
				return -1;
			data = data_of(skb);
			if (AT(data, 40 + 20) > end_of(skb))
				return -1;
			ip = (void *)data;
			l4 = AT(data, 40);
			header = (l4[12] >> 4) * 4;
			if (header < 20)
				return -1;
		} else if (protocol != UDP_PROTOCOL && protocol != ICMP6) {
			return -1;
		}
		set_addresses6(&to->addrs, ip);
		set_class6(to, ip);
		to->hops = ip->hops;
		to->header = 40 + header;
		l4 = AT(data, 40);
	} else {
		return -1;
	}
	to->length = skb->len;
	set_flow(to, protocol, l4);
	return to->header > skb->len ? -1 : 0;
}

/* Parse the outer headers at the ingress of the underlay. Return their length and set the sender,
 * the length of the UDP payload and the ECN field, if this is a datagram for us that the kernel of a
 * peer has sent; else 0. */
INLINE int parse_outer(struct __sk_buff *skb, const struct settings *own, struct endpoint *sender,
		       __u32 *payload, __u8 *ecn)
{
	struct udp *udp;
	__u8 *data;
	__u32 length;

	if (skb->pkt_type != PACKET_HOST || skb->vlan_present)
		return 0;
	if (skb->protocol == ETHERTYPE4) {
		struct ip4 *ip;
		__u32 sum = 0;
		__u16 *word;

		if (READABLE(skb, ETHERNET + OUTER4 + 20))
			return 0;
		data = data_of(skb);
		if (AT(data, ETHERNET + OUTER4 + 20) > end_of(skb))
			return 0;
		ip = AT(data, ETHERNET);
		udp = AT(data, ETHERNET + 20);
		if (ip->protocol != UDP_PROTOCOL || udp->checksum != 0 ||
		    udp->destination != BE16(own->port4))
			return 0;
		length = BE16(ip->total_length);
		if (!is_plain4(ip, length) || length + ETHERNET > skb->len ||
		    BE16(udp->length) + 20U != length || length < OUTER4 + 20 ||
		    ip->destination != own->listen4)
			return 0;
		word = (void *)ip;
		for (int i = 0; i < 10; i++)
			sum += word[i];
		sum = (sum >> 16) + (sum & 0xFFFF);
		if (sum != 0xFFFF)
			return 0;
		sender->family = 4;
		sender->addr[0] = ip->source;
		sender->port = BE16(udp->source);
		*payload = length - OUTER4;
		*ecn = ip->tos & ECN;
		return OUTER4;
	}
	if (skb->protocol == ETHERTYPE6) {
		struct ip6 *ip;

		if (READABLE(skb, ETHERNET + OUTER6 + 20))
			return 0;
		data = data_of(skb);
		if (AT(data, ETHERNET + OUTER6 + 20) > end_of(skb))
			return 0;
		ip = AT(data, ETHERNET);
		udp = AT(data, ETHERNET + 40);
		if (ip->next_header != UDP_PROTOCOL || udp->checksum != 0 ||
		    udp->destination != BE16(own->port6))
			return 0;
		length = BE16(ip->payload_length) + 40U;
		if (!is_plain6(ip, length) || length + ETHERNET > skb->len ||
		    BE16(udp->length) + 40U != length || length < OUTER6 + 20 ||
		    !same_address(ip->destination, own->listen6))
			return 0;
		sender->family = 6;
		copy_address(sender->addr, ip->source);
		sender->port = BE16(udp->source);
		*payload = length - OUTER6;
		*ecn = class6(ip) & ECN;
		return OUTER6;
	}
	return 0;
}

/* Parse the inner packet of a received datagram, whose payload has this length. The packet must
 * have the same length: if the kernel has joined several datagrams, it is shorter. Return 0 if there
 * is nothing unusual. Only a TCP packet may be a super-packet. The four functions differ in the
 * offsets, which must be constants. */
#define PARSE_RECEIVED4(name, outer) \
INLINE int name(struct __sk_buff *skb, __u32 length, struct packet *to) \
{ \
	__u8 *data = data_of(skb), *l4; \
	struct ip4 *ip; \
\
	if (AT(data, ETHERNET + (outer) + 20) > end_of(skb)) \
		return -1; \
	ip = AT(data, ETHERNET + (outer)); \
	if (!is_plain4(ip, length)) \
		return -1; \
	set_addresses4(&to->addrs, ip); \
	set_class4(to, ip); \
	to->hops = ip->hops; \
	to->header = 20; \
	if (skb->gso_size == 0) \
		return 0; \
	if (ip->protocol != TCP || READABLE(skb, ETHERNET + (outer) + 20 + 20)) \
		return -1; \
	data = data_of(skb); \
	if (AT(data, ETHERNET + (outer) + 20 + 20) > end_of(skb)) \
		return -1; \
	l4 = AT(data, ETHERNET + (outer) + 20); \
	to->header += (l4[12] >> 4) * 4; \
	return 0; \
}

#define PARSE_RECEIVED6(name, outer) \
INLINE int name(struct __sk_buff *skb, __u32 length, struct packet *to) \
{ \
	__u8 *data, *l4; \
	struct ip6 *ip; \
\
	if (READABLE(skb, ETHERNET + (outer) + 40)) \
		return -1; \
	data = data_of(skb); \
	if (AT(data, ETHERNET + (outer) + 40) > end_of(skb)) \
		return -1; \
	ip = AT(data, ETHERNET + (outer)); \
	if (!is_plain6(ip, length)) \
		return -1; \
	set_addresses6(&to->addrs, ip); \
	set_class6(to, ip); \
	to->hops = ip->hops; \
	to->header = 40; \
	if (skb->gso_size == 0) \
		return 0; \
	if (ip->next_header != TCP || READABLE(skb, ETHERNET + (outer) + 40 + 20)) \
		return -1; \
	data = data_of(skb); \
	if (AT(data, ETHERNET + (outer) + 40 + 20) > end_of(skb)) \
		return -1; \
	l4 = AT(data, ETHERNET + (outer) + 40); \
	to->header += (l4[12] >> 4) * 4; \
	return 0; \
}

PARSE_RECEIVED4(parse_received44, OUTER4)
PARSE_RECEIVED4(parse_received46, OUTER6)
PARSE_RECEIVED6(parse_received64, OUTER4)
PARSE_RECEIVED6(parse_received66, OUTER6)

INLINE int parse_received(struct __sk_buff *skb, int outer, __u32 length, struct packet *to)
{
	__u8 *data = data_of(skb), *inner;

	to->length = length;
	if (outer == OUTER4) {
		if (AT(data, ETHERNET + OUTER4 + 1) > end_of(skb))
			return -1;
		inner = AT(data, ETHERNET + OUTER4);
		return *inner >> 4 == 4 ? parse_received44(skb, length, to) :
			parse_received64(skb, length, to);
	}
	if (AT(data, ETHERNET + OUTER6 + 1) > end_of(skb))
		return -1;
	inner = AT(data, ETHERNET + OUTER6);
	return *inner >> 4 == 4 ? parse_received46(skb, length, to) :
		parse_received66(skb, length, to);
}

INLINE int same_endpoint(const struct endpoint *a, const struct endpoint *b)
{
	return a->port == b->port && a->family == b->family &&
	       same_address(a->addr, b->addr);
}

/* Decrement the hop limit of the packet at this offset of the data. The change of the IPv4 checksum
 * (RFC 1624) makes up for the change of the hop limit. So the sum over all bytes stays the same, and
 * a sum that the device has stored in the skb (CHECKSUM_COMPLETE) stays valid. */
#define DECREMENT4(name, at) \
INLINE int name(struct __sk_buff *skb) \
{ \
	__u8 *data = data_of(skb); \
	struct ip4 *ip; \
	__u32 sum; \
\
	if (AT(data, (at) + sizeof(*ip)) > end_of(skb)) \
		return -1; \
	ip = AT(data, at); \
	sum = ip->checksum + (__u32)BE16(0x0100); \
	ip->checksum = sum + (sum >= 0xFFFF); \
	ip->hops--; \
	return 0; \
}

DECREMENT4(decrement4_in4, OUTER4)
DECREMENT4(decrement4_in6, OUTER6)
DECREMENT4(decrement4_received, ETHERNET)

INLINE int decrement6(struct __sk_buff *skb, __u32 at, __u8 hops)
{
	hops--;
	return store_bytes(skb, at + __builtin_offsetof(struct ip6, hops), &hops, 1,
			   BPF_F_RECOMPUTE_CSUM);
}

/* Set the ECN field of a received packet, which is not 0, to CE. The change of the IPv4 checksum
 * makes up for it, as above. */
INLINE int mark(struct __sk_buff *skb, const struct packet *inner)
{
	__u8 *data = data_of(skb), second = inner->second | CE << 4;
	struct ip4 *ip;
	__u32 sum;

	if (inner->addrs.version == 6)
		return store_bytes(skb, ETHERNET + 1, &second, 1, BPF_F_RECOMPUTE_CSUM);
	if (AT(data, ETHERNET + sizeof(*ip)) > end_of(skb))
		return -1;
	ip = AT(data, ETHERNET);
	sum = ip->checksum + 0xFFFFU - BE16(CE - (inner->second & ECN));
	ip->checksum = sum + (sum >= 0xFFFF);
	ip->tos |= CE;
	return 0;
}

/* Put the outer headers before the packet. Return 0, or -1 if the packet is unchanged. The inner
 * checksum may stay unfinished: the device, or the peer's receive program, expects that. */
INLINE int encapsulate(struct __sk_buff *skb, const struct settings *own,
		       const struct endpoint *peer, const struct packet *inner, __u32 length,
		       __u8 traffic_class)
{
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L4_UDP;

	if (peer->family == 4) {
		struct { struct ip4 ip; struct udp udp; } outer = {};
		__u16 *word = (void *)&outer;
		__u32 sum = 0;

		flags |= BPF_F_ADJ_ROOM_ENCAP_L3_IPV4;
		if (adjust_room(skb, OUTER4, BPF_ADJ_ROOM_MAC, flags) < 0)
			return -1;
		outer.ip.version_length = 0x45;
		outer.ip.tos = traffic_class;
		outer.ip.total_length = BE16(length + OUTER4);
		outer.ip.fragment = BE16(DONT_FRAGMENT);
		outer.ip.hops = HOP_LIMIT;
		outer.ip.protocol = UDP_PROTOCOL;
		outer.ip.source = own->listen4;
		outer.ip.destination = peer->addr[0];
		for (int i = 0; i < 10; i++)
			sum += word[i];
		sum = (sum >> 16) + (sum & 0xFFFF);
		outer.ip.checksum = ~(sum + (sum >> 16));
		outer.udp.source = BE16(own->port4);
		outer.udp.destination = BE16(peer->port);
		outer.udp.length = BE16(length + UDP);
		store_bytes(skb, 0, &outer, sizeof(outer), 0);
		if (inner->addrs.version == 4)
			decrement4_in4(skb);
		else
			decrement6(skb, OUTER4, inner->hops);
	} else {
		struct { struct ip6 ip; struct udp udp; } outer = {};

		flags |= BPF_F_ADJ_ROOM_ENCAP_L3_IPV6;
		if (adjust_room(skb, OUTER6, BPF_ADJ_ROOM_MAC, flags) < 0)
			return -1;
		outer.ip.version_class = 0x60 | traffic_class >> 4;
		outer.ip.class_label[0] = traffic_class << 4;
		outer.ip.payload_length = BE16(length + UDP);
		outer.ip.next_header = UDP_PROTOCOL;
		outer.ip.hops = HOP_LIMIT;
		copy_address(outer.ip.source, own->listen6);
		copy_address(outer.ip.destination, peer->addr);
		outer.udp.source = BE16(own->port6);
		outer.udp.destination = BE16(peer->port);
		outer.udp.length = BE16(length + UDP);
		store_bytes(skb, 0, &outer, sizeof(outer), 0);
		if (inner->addrs.version == 4)
			decrement4_in6(skb);
		else
			decrement6(skb, OUTER6, inner->hops);
	}
	return 0;
}

/* Remove the outer headers. Return 0, UNCHANGED if the kernel refused to, or CHANGED if a later step
 * failed. Without BPF_F_ADJ_ROOM_NO_CSUM_RESET: what the device has said about the checksums
 * concerns the outer packet, so the kernel verifies those of the inner packet. */
INLINE int decapsulate(struct __sk_buff *skb, int outer, const struct packet *inner)
{
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;

	/* The packet has another IP version now. */
	if (outer == OUTER4 && inner->addrs.version == 6)
		flags |= DECAP_L3_IPV6;
	else if (outer == OUTER6 && inner->addrs.version == 4)
		flags |= DECAP_L3_IPV4;
	if (adjust_room(skb, -outer, BPF_ADJ_ROOM_MAC, flags) < 0)
		return UNCHANGED;
	if (inner->addrs.version == 4)
		return decrement4_received(skb) < 0 ? CHANGED : 0;
	return decrement6(skb, ETHERNET, inner->hops) < 0 ? CHANGED : 0;
}

#endif
