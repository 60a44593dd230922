/* onepacket: an IPv4 over UDP tunnel that moves one packet per system call.
 *
 * onepacket behaves like flannel's UDP backend. It was written from this description:
 * - The UDP payload is the raw inner IPv4 packet.
 * - There is one thread and one buffer. The thread polls the TUN, the UDP socket and the control
 *   socket. Each packet takes one read and one send.
 * - The routes are a linear list. The first route that matches is used, and moves to the front.
 * - Sender and receiver both decrement the TTL.
 * - A packet without a route is answered with ICMP net unreachable. No ICMP reports the MTU.
 * - The outer source address is not checked.
 *
 * The tests use onepacket as a peer that is not udptun. The benchmarks use it as the baseline of
 * all speed comparisons. So do not correct its behaviour, and do not change its speed.
 *
 *   onepacket --tun NAME --address A.B.C.D --network CIDR --listen IP:PORT --mtu N
 *             [--route CIDR=IP:PORT]... [--ctl PATH | --ctl-fd N]
 *
 * Prints "ready" when it forwards packets. SIGTERM and SIGINT end it with exit code 0.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void die(const char *doing) {
	perror(doing);
	exit(1);
}

static void usage(const char *format, ...) {
	va_list args;
	va_start(args, format);
	fprintf(stderr, "onepacket: ");
	vfprintf(stderr, format, args);
	fprintf(stderr, "\n");
	va_end(args);
	exit(2);
}

/* Routes. All addresses are in network byte order. */

struct route {
	in_addr_t net, mask;
	struct sockaddr_in next_hop;
};

static struct route *routes;
static size_t routes_n, routes_room;

static in_addr_t mask_of(int length) {
	return length == 0 ? 0 : htonl(~(uint32_t)0 << (32 - length));
}

static void set_route(in_addr_t net, int length, in_addr_t via, uint16_t port) {
	struct route route = {.mask = mask_of(length)};
	size_t i;

	route.net = net & route.mask;
	route.next_hop.sin_family = AF_INET;
	route.next_hop.sin_addr.s_addr = via;
	route.next_hop.sin_port = htons(port);
	for (i = 0; i < routes_n; i++)
		if (routes[i].net == route.net && routes[i].mask == route.mask)
			break;
	if (i == routes_n) {
		if (routes_n == routes_room) {
			routes_room = routes_room ? 2 * routes_room : 16;
			routes = realloc(routes, routes_room * sizeof *routes);
			if (!routes)
				die("realloc");
		}
		routes_n++;
	}
	routes[i] = route;
}

static void del_route(in_addr_t net, int length) {
	in_addr_t mask = mask_of(length);

	for (size_t i = 0; i < routes_n; i++)
		if (routes[i].net == (net & mask) && routes[i].mask == mask) {
			routes[i] = routes[--routes_n];
			return;
		}
}

static const struct sockaddr_in *find_route(in_addr_t dst) {
	for (size_t i = 0; i < routes_n; i++)
		if ((dst & routes[i].mask) == routes[i].net) {
			struct route hit = routes[i];
			routes[i] = routes[0];
			routes[0] = hit;
			return &routes[0].next_hop;
		}
	return NULL;
}

/* Packets. */

static uint16_t checksum(const void *data, size_t len) {
	const uint8_t *p = data;
	uint32_t sum = 0;

	for (; len > 1; len -= 2, p += 2)
		sum += (uint32_t)p[0] << 8 | p[1];
	if (len)
		sum += (uint32_t)p[0] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return htons((uint16_t)~sum);
}

/* Returns false if the TTL reaches 0. A TTL of 0 wraps around to 255, as in flannel. */
static bool decrement_ttl(struct iphdr *ip) {
	uint32_t sum;

	if (--ip->ttl == 0)
		return false;
	/* RFC 1624: the word with the TTL decreases by 0x0100; the checksum increases by 0x0100. */
	sum = (uint32_t)ntohs(ip->check) + 0x0100;
	ip->check = htons((uint16_t)(sum + (sum >> 16)));
	return true;
}

struct unreachable {
	struct iphdr ip;
	struct icmphdr icmp;
	uint8_t offender[15 * 4 + 8];
} __attribute__((packed));

static void send_net_unreachable(int tun, in_addr_t source, const struct iphdr *offender,
				 size_t len) {
	struct unreachable out = {0};
	size_t header_len = offender->ihl * 4u, quoted = header_len + 8;
	size_t total = sizeof out.ip + sizeof out.icmp + quoted;

	if (offender->protocol == IPPROTO_ICMP || (ntohs(offender->frag_off) & IP_OFFMASK) ||
	    offender->ihl == 15 || quoted > len)
		return;
	out.ip.version = 4;
	out.ip.ihl = 5;
	out.ip.tot_len = htons((uint16_t)total);
	out.ip.ttl = 8;
	out.ip.protocol = IPPROTO_ICMP;
	out.ip.saddr = source;
	out.ip.daddr = offender->saddr;
	out.ip.check = checksum(&out.ip, sizeof out.ip);
	out.icmp.type = ICMP_DEST_UNREACH;
	out.icmp.code = ICMP_NET_UNREACH;
	memcpy(out.offender, offender, quoted);
	out.icmp.checksum = checksum(&out.icmp, sizeof out.icmp + quoted);
	if (write(tun, &out, total) < 0 && errno != EAGAIN)
		perror("write ICMP to the TUN");
}

/* Forwards one packet. Returns true if there was a packet to read. */

static bool tun_to_udp(int tun, int sock, in_addr_t address, uint8_t *buf, size_t room) {
	struct iphdr *ip = (struct iphdr *)buf;
	const struct sockaddr_in *next_hop;
	ssize_t len = read(tun, buf, room);

	if (len < 0) {
		if (errno != EAGAIN && errno != EINTR)
			perror("read from the TUN");
		return false;
	}
	if ((size_t)len < sizeof *ip)
		return true;
	next_hop = find_route(ip->daddr);
	if (!next_hop) {
		send_net_unreachable(tun, address, ip, (size_t)len);
		return true;
	}
	if (decrement_ttl(ip) && sendto(sock, buf, (size_t)len, 0, (const struct sockaddr *)next_hop,
					sizeof *next_hop) < 0 && errno != EAGAIN && errno != ECONNREFUSED)
		perror("send over UDP");
	return true;
}

static bool udp_to_tun(int sock, int tun, uint8_t *buf, size_t room) {
	struct iphdr *ip = (struct iphdr *)buf;
	ssize_t len = recv(sock, buf, room, 0);

	if (len < 0) {
		if (errno != EAGAIN && errno != EINTR && errno != ECONNREFUSED)
			perror("receive over UDP");
		return false;
	}
	if ((size_t)len < sizeof *ip)
		return true; /* a keepalive, or not an IP packet */
	if (decrement_ttl(ip) && write(tun, buf, (size_t)len) < 0 && errno != EAGAIN && errno != EINVAL)
		perror("write to the TUN");
	return true;
}

/* A control message has 20 bytes. Its addresses are in network byte order, other fields in host
 * byte order. */

enum { SET_ROUTE = 1, DEL_ROUTE = 2, STOP = 3 };

struct command {
	int32_t cmd;
	in_addr_t dest_net;
	int32_t dest_net_len;
	in_addr_t next_hop_ip;
	int16_t next_hop_port;
	uint8_t pad[2];
};
_Static_assert(sizeof(struct command) == 20, "the wire format of the control messages");

static const char *ctl_path;
static bool stopping;

/* The kernel removes the TUN when the process exits. */
static void on_signal(int number) {
	(void)number;
	if (ctl_path)
		unlink(ctl_path);
	_exit(0);
}

/* Returns false if the other side has closed the connection. */
static bool process_command(int ctl) {
	struct command c;
	ssize_t len = recv(ctl, &c, sizeof c, MSG_TRUNC | MSG_DONTWAIT);

	if (len < 0)
		return errno == EAGAIN || errno == EINTR;
	if (len == 0)
		return false;
	if (len != sizeof c || (c.cmd != STOP && (c.dest_net_len < 0 || c.dest_net_len > 32))) {
		fprintf(stderr, "invalid control message: %zd bytes, expected %zu bytes and a prefix length "
				"of 0..32\n", len, sizeof c);
		return true;
	}
	if (c.cmd == SET_ROUTE)
		set_route(c.dest_net, c.dest_net_len, c.next_hop_ip, (uint16_t)c.next_hop_port);
	else if (c.cmd == DEL_ROUTE)
		del_route(c.dest_net, c.dest_net_len);
	else if (c.cmd == STOP)
		stopping = 1;
	return true;
}

/* Set-up. */

static void parse_cidr(const char *text, in_addr_t *net, int *length) {
	char host[INET_ADDRSTRLEN + 1] = "", extra;

	if (sscanf(text, "%16[0-9.]/%d%c", host, length, &extra) != 2 || *length < 0 || *length > 32 ||
	    inet_pton(AF_INET, host, net) != 1)
		usage("%s: expected a prefix such as 10.244.0.0/16", text);
}

static struct sockaddr_in parse_endpoint(const char *text) {
	struct sockaddr_in at = {.sin_family = AF_INET};
	char host[INET_ADDRSTRLEN + 1] = "", extra;
	unsigned port = 0;

	if (sscanf(text, "%16[0-9.]:%u%c", host, &port, &extra) != 2 || port < 1 || port > 65535 ||
	    inet_pton(AF_INET, host, &at.sin_addr) != 1)
		usage("%s: expected an endpoint such as 192.0.2.1:8285", text);
	at.sin_port = htons((uint16_t)port);
	return at;
}

static void add_route_option(char *text) {
	char *equals = strchr(text, '=');
	struct sockaddr_in via;
	in_addr_t net;
	int length;

	if (!equals)
		usage("--route %s: expected CIDR=IP:PORT", text);
	*equals = 0;
	parse_cidr(text, &net, &length);
	via = parse_endpoint(equals + 1);
	set_route(net, length, via.sin_addr.s_addr, ntohs(via.sin_port));
}

static void put_address(struct sockaddr *at, in_addr_t address) {
	struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = address};
	memcpy(at, &in, sizeof in);
}

static void configure(int request, const struct ifreq *ifr, int fd, const char *doing) {
	struct ifreq copy = *ifr;
	if (ioctl(fd, (unsigned long)request, &copy) < 0)
		die(doing);
}

static int open_tun(const char *name, in_addr_t address, int mtu, const char *network) {
	struct ifreq ifr = {0};
	struct rtentry route = {0};
	in_addr_t net;
	int length, config = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);

	if (tun < 0 || config < 0)
		die("open /dev/net/tun");
	snprintf(ifr.ifr_name, sizeof ifr.ifr_name, "%s", name);
	ifr.ifr_flags = IFF_TUN | IFF_NO_PI;
	if (ioctl(tun, TUNSETIFF, &ifr) < 0)
		die("create the TUN");
	put_address(&ifr.ifr_addr, address);
	configure(SIOCSIFADDR, &ifr, config, "set the TUN's address");
	put_address(&ifr.ifr_netmask, mask_of(32));
	configure(SIOCSIFNETMASK, &ifr, config, "set the TUN's netmask");
	ifr.ifr_mtu = mtu;
	configure(SIOCSIFMTU, &ifr, config, "set the TUN's MTU");
	ifr.ifr_flags = IFF_UP | IFF_RUNNING;
	configure(SIOCSIFFLAGS, &ifr, config, "set the TUN up");
	parse_cidr(network, &net, &length);
	put_address(&route.rt_dst, net & mask_of(length));
	put_address(&route.rt_genmask, mask_of(length));
	route.rt_flags = RTF_UP;
	route.rt_dev = ifr.ifr_name;
	if (ioctl(config, SIOCADDRT, &route) < 0 && errno != EEXIST)
		die("add the network's route");
	close(config);
	return tun;
}

static int listen_for_control(const char *path) {
	struct sockaddr_un at = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (strlen(path) >= sizeof at.sun_path)
		usage("--ctl %s: expected a path shorter than %zu bytes", path, sizeof at.sun_path);
	strcpy(at.sun_path, path);
	unlink(path);
	if (fd < 0 || bind(fd, (struct sockaddr *)&at, sizeof at) < 0 || listen(fd, 1) < 0)
		die(path);
	return fd;
}

static void run(int tun, int sock, int ctl, int listener, in_addr_t address, size_t room) {
	enum { TUN, SOCK, CTL, LISTENER, FDS };
	uint8_t *buf = malloc(room);
	bool active;

	if (!buf)
		die("malloc");
	puts("ready");
	fflush(stdout);
	while (!stopping) {
		struct pollfd fds[FDS] = {
			[TUN] = {.fd = tun, .events = POLLIN},
			[SOCK] = {.fd = sock, .events = POLLIN},
			[CTL] = {.fd = ctl, .events = POLLIN},
			[LISTENER] = {.fd = ctl < 0 ? listener : -1, .events = POLLIN},
		};
		if (poll(fds, FDS, -1) < 0)
			die("poll");
		if (fds[CTL].revents && !process_command(ctl)) {
			close(ctl);
			ctl = -1;
		}
		if (fds[LISTENER].revents)
			ctl = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		/* Loops until the TUN and the socket are empty. Under constant load the loop does not
		 * end, and the control socket is not served, as in flannel. */
		do {
			active = tun_to_udp(tun, sock, address, buf, room);
			active |= udp_to_tun(sock, tun, buf, room);
		} while (active);
	}
	free(buf);
}

int main(int argc, char **argv) {
	enum { OPT_TUN = 1, ADDRESS, NETWORK, LISTEN, MTU, ROUTE, CTL, CTL_FD };
	static const struct option options[] = {
		{"tun", required_argument, NULL, OPT_TUN},  {"address", required_argument, NULL, ADDRESS},
		{"network", required_argument, NULL, NETWORK}, {"listen", required_argument, NULL, LISTEN},
		{"mtu", required_argument, NULL, MTU},      {"route", required_argument, NULL, ROUTE},
		{"ctl", required_argument, NULL, CTL},      {"ctl-fd", required_argument, NULL, CTL_FD},
		{0},
	};
	const char *name = NULL, *network = NULL, *at = NULL;
	struct sockaddr_in local;
	in_addr_t address = 0;
	int option, mtu = 0, ctl = -1, listener = -1, tun, sock;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
		switch (option) {
		case OPT_TUN: name = optarg; break;
		case NETWORK: network = optarg; break;
		case LISTEN: at = optarg; break;
		case MTU: mtu = atoi(optarg); break;
		case ROUTE: add_route_option(optarg); break;
		case CTL: ctl_path = optarg; break;
		case CTL_FD: ctl = atoi(optarg); break;
		case ADDRESS:
			if (inet_pton(AF_INET, optarg, &address) != 1)
				usage("--address %s: expected an IPv4 address", optarg);
			break;
		default: return 2;
		}
	if (!name || !network || !at || !address || mtu < 68 || mtu > 65535 || optind != argc)
		usage("--tun, --address, --network, --listen and --mtu (68..65535) are required");

	local = parse_endpoint(at);
	sock = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (sock < 0 || bind(sock, (struct sockaddr *)&local, sizeof local) < 0)
		die(at);
	tun = open_tun(name, address, mtu, network);
	if (ctl_path)
		listener = listen_for_control(ctl_path);
	signal(SIGTERM, on_signal);
	signal(SIGINT, on_signal);
	run(tun, sock, ctl, listener, address, (size_t)mtu);
	if (ctl_path)
		unlink(ctl_path);
	return 0;
}
