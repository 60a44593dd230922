/* copylimit: the upper bound for a tunnel with udptun's system calls. It does no other work of udptun.
 *
 * copylimit makes the same system calls in the same order as udptun's worker: recvmmsg with
 * UDP_GRO, one write to the TUN per datagram, reads until the TUN is empty, sendmmsg with
 * UDP_SEGMENT. copylimit does not parse, look up, checksum, cut or merge. It sends the frame (vnet
 * header and super-packet) unchanged, in slices of equal size that fit the MTU. So the slices on
 * the wire are not inner packets. The receiver writes each buffer from UDP_GRO to the TUN. This
 * buffer is the original frame only if super-packets cross the wire whole (profile P1 of the
 * benchmarks). copylimit is a bound for measurements, not a usable tunnel.
 *
 *   copylimit --tun NAME --listen IP:PORT --peer IP:PORT --slice BYTES
 *
 * Prints "ready" when the TUN exists and can be configured. SIGTERM and SIGINT end it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif
#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif

/* These limits are the same as in udptun. With them, the data of one batch fits the CPU cache. */
enum { SLOTS = 64, SLOTS_MIN = 4, RX_BATCH_BYTES = 262144, TX_FLUSH_BYTES = 262144 };
enum { BUF_SIZE = 65536 + 16, UDP_PAYLOAD_MAX = 65507, SOCKET_BUF_SIZE = 4 << 20 };

struct slot {
	struct iovec iov;
	struct sockaddr_in from;
	_Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(int))];
	uint8_t *data;
};

static struct slot rx[SLOTS], tx[SLOTS];
static struct mmsghdr rx_msgs[SLOTS], tx_msgs[SLOTS];
static struct sockaddr_in peer;
static int slice;

static void die(const char *doing) {
	perror(doing);
	exit(1);
}

static void usage(void) {
	fputs("usage: copylimit --tun NAME --listen IP:PORT --peer IP:PORT --slice BYTES (1023..65000)\n", stderr);
	exit(2);
}

static struct sockaddr_in parse_endpoint(const char *text) {
	struct sockaddr_in at = {.sin_family = AF_INET};
	char host[INET_ADDRSTRLEN + 1] = "";
	unsigned port = 0;

	if (sscanf(text, "%16[0-9.]:%u", host, &port) != 2 || !port || port > 65535 ||
	    inet_pton(AF_INET, host, &at.sin_addr) != 1)
		usage();
	at.sin_port = htons((uint16_t)port);
	return at;
}

static int open_tun(const char *name) {
	struct ifreq ifr = {.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR};
	unsigned offloads = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
	int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);

	snprintf(ifr.ifr_name, sizeof ifr.ifr_name, "%s", name);
	if (tun < 0 || ioctl(tun, TUNSETIFF, &ifr) < 0)
		die("create the TUN");
	if (ioctl(tun, TUNSETOFFLOAD, offloads | TUN_F_USO4 | TUN_F_USO6) < 0 &&
	    ioctl(tun, TUNSETOFFLOAD, offloads) < 0)
		die("TUNSETOFFLOAD");
	return tun;
}

static int open_udp(const struct sockaddr_in *at) {
	int on = 1, room = SOCKET_BUF_SIZE;
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0 || bind(fd, (const struct sockaddr *)at, sizeof *at) < 0)
		die("bind");
	if (setsockopt(fd, IPPROTO_UDP, UDP_GRO, &on, sizeof on) < 0)
		die("UDP_GRO");
	setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
	setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room);
	return fd;
}

static void prepare(struct slot *slot, struct mmsghdr *msg) {
	slot->data = malloc(BUF_SIZE);
	if (!slot->data)
		die("malloc");
	slot->iov = (struct iovec){slot->data, BUF_SIZE};
	msg->msg_hdr = (struct msghdr){.msg_iov = &slot->iov, .msg_iovlen = 1};
}

/* Addresses a message to the peer. A message longer than a slice is sent as several datagrams. */
static void address_message(struct slot *slot, struct msghdr *hdr, size_t len) {
	uint16_t size = (uint16_t)slice;
	struct cmsghdr *c;

	slot->iov.iov_len = len;
	hdr->msg_name = &peer;
	hdr->msg_namelen = sizeof peer;
	hdr->msg_control = NULL;
	hdr->msg_controllen = 0;
	if (len <= (size_t)slice)
		return;
	hdr->msg_control = slot->control;
	hdr->msg_controllen = CMSG_SPACE(sizeof size);
	c = CMSG_FIRSTHDR(hdr);
	c->cmsg_level = IPPROTO_UDP;
	c->cmsg_type = UDP_SEGMENT;
	c->cmsg_len = CMSG_LEN(sizeof size);
	memcpy(CMSG_DATA(c), &size, sizeof size);
}

static void flush(int fd, int n) {
	int done = 0;

	while (done < n) {
		int sent = sendmmsg(fd, tx_msgs + done, (unsigned)(n - done), 0);
		if (sent > 0) {
			done += sent;
		} else if (errno == EAGAIN) {
			struct pollfd p = {.fd = fd, .events = POLLOUT};
			poll(&p, 1, 10);
		} else if (errno == ECONNREFUSED) {
			continue; /* the error belongs to a datagram sent before the peer had started */
		} else {
			perror("sendmmsg");
			done++;
		}
	}
}

/* Reads a limited number of frames, because received datagrams may be waiting in the socket.
 * Returns false if the TUN is empty. */
static bool tun_to_udp(int tun, int fd) {
	size_t waiting = 0;
	ssize_t len = 0;
	int n = 0;

	for (int reads = 0; reads < SLOTS && (len = read(tun, tx[n].data, BUF_SIZE)) >= 0; reads++) {
		if (len > UDP_PAYLOAD_MAX)
			continue;
		address_message(&tx[n], &tx_msgs[n].msg_hdr, (size_t)len);
		waiting += (size_t)len;
		if (++n == SLOTS || waiting >= TX_FLUSH_BYTES) {
			flush(fd, n);
			n = 0;
			waiting = 0;
		}
	}
	flush(fd, n);
	return len >= 0;
}

static bool udp_to_tun(int fd, int tun) {
	static int slots = SLOTS_MIN;
	size_t bytes = 0;
	int n;

	for (int i = 0; i < slots; i++) {
		rx[i].iov.iov_len = BUF_SIZE;
		rx_msgs[i].msg_hdr.msg_name = &rx[i].from;
		rx_msgs[i].msg_hdr.msg_namelen = sizeof rx[i].from;
		rx_msgs[i].msg_hdr.msg_control = rx[i].control;
		rx_msgs[i].msg_hdr.msg_controllen = sizeof rx[i].control;
	}
	n = recvmmsg(fd, rx_msgs, (unsigned)slots, MSG_DONTWAIT, NULL);
	for (int i = 0; i < n; i++) {
		bytes += rx_msgs[i].msg_len;
		if (write(tun, rx[i].data, rx_msgs[i].msg_len) < 0 && errno != EAGAIN && errno != EIO)
			perror("write to the TUN");
	}
	if (n > 0) {
		size_t fitting = RX_BATCH_BYTES / (bytes / (size_t)n + 1);
		slots = fitting > SLOTS ? SLOTS : fitting < SLOTS_MIN ? SLOTS_MIN : (int)fitting;
	}
	return n > 0;
}

int main(int argc, char **argv) {
	enum { TUN = 1, LISTEN, PEER, SLICE };
	static const struct option options[] = {
		{"tun", required_argument, NULL, TUN},   {"listen", required_argument, NULL, LISTEN},
		{"peer", required_argument, NULL, PEER}, {"slice", required_argument, NULL, SLICE},
		{0},
	};
	struct sockaddr_in local = {0};
	const char *name = NULL;
	int option, tun, fd;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
		switch (option) {
		case TUN: name = optarg; break;
		case LISTEN: local = parse_endpoint(optarg); break;
		case PEER: peer = parse_endpoint(optarg); break;
		case SLICE: slice = atoi(optarg); break;
		default: usage();
		}
	/* Some kernels accept only 64 segments in one send. So 64 slices must hold the largest send. */
	if (!name || !local.sin_port || !peer.sin_port || slice < UDP_PAYLOAD_MAX / 64 || slice > 65000)
		usage();
	for (int i = 0; i < SLOTS; i++) {
		prepare(&rx[i], &rx_msgs[i]);
		prepare(&tx[i], &tx_msgs[i]);
	}
	tun = open_tun(name);
	fd = open_udp(&local);
	puts("ready");
	fflush(stdout);
	for (;;) {
		struct pollfd fds[] = {{.fd = fd, .events = POLLIN}, {.fd = tun, .events = POLLIN}};
		bool active;
		if (poll(fds, 2, -1) < 0)
			die("poll");
		do {
			active = udp_to_tun(fd, tun);
			active |= tun_to_udp(tun, fd);
		} while (active);
	}
}
