/* udpload: a load generator for measurements between two hosts that iperf3 does not support.
 *
 *   udpload echo ADDRESS PORT
 *       Returns every UDP datagram, and every byte of TCP connections to the same port.
 *   udpload ping ADDRESS PORT --seconds S [--size N] [--interval-us U] [--tcp] [--record FILE]
 *       Measures round trips to "udpload echo". Without --interval-us, each request is sent when
 *       the previous reply has arrived. With --interval-us, requests are sent at fixed times. A
 *       request does not wait for earlier replies, so a slow reply does not delay the next request.
 *       For each reply, it writes three 64-bit numbers in host byte order to FILE: sequence number,
 *       time sent, time received. Times are CLOCK_MONOTONIC in ns.
 *   udpload receive ADDRESS PORT --run ID [--record FILE] [--seconds S]
 *       Counts the datagrams of one run by their sequence numbers. For each datagram, it writes
 *       three 64-bit numbers in host byte order to FILE: sequence number, time sent, time arrived.
 *       Times are CLOCK_REALTIME in ns. The kernel timestamps the arrival. The command ends when
 *       the sender has ended, or after S seconds.
 *   udpload send ADDRESS PORT --run ID --seconds S [--size N] [--rate PPS] [--spread COUNT]
 *       Sends datagrams with N bytes of payload. Each datagram is its own packet (sendmmsg without
 *       UDP_SEGMENT). The sender sends at ticks of 50 us and sleeps between two ticks, because
 *       generator and tunnel may share the CPU cores. If the sender is late, it sends the overdue
 *       packets of at most 1 ms (at least two packets) and skips the rest. "forgiven_seconds" in
 *       the result is the time of the skipped packets. Without --rate, the sender sends at full
 *       rate.
 *       --spread sends to COUNT addresses: ADDRESS, ADDRESS + 4, ADDRESS + 8, and so on. Of COUNT
 *       consecutive datagrams, each address gets one, in a scattered order.
 *
 * IPv4 only. The result is one line of JSON on standard output. The commands echo and receive first
 * print "ready". The receiver does not use UDP_GRO, so it receives each packet separately.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#ifndef SO_MEMINFO
#define SO_MEMINFO 55
#endif

enum { BATCH = 64, ROOM = 2048, SOCKET_ROOM = 4 << 20, END_MARKS = 20 };
#define TICK_NS 50000ll
#define BURST_NS 1000000ll
#define SECOND_NS 1000000000ll
#define END_SEQ UINT32_MAX

struct mark {
	uint32_t run, seq;
	int64_t sent_ns;
};
_Static_assert(sizeof(struct mark) == 16, "the first bytes of every datagram");

static struct {
	const char *record;
	double seconds;
	long size, rate, spread, interval_us;
	uint32_t run;
	bool tcp;
} opt = {.seconds = 1, .size = 64, .spread = 1};

static FILE *record;
static volatile sig_atomic_t stopping;

static void on_signal(int number) {
	(void)number;
	stopping = 1;
}

static void die(const char *doing) {
	perror(doing);
	exit(1);
}

static int64_t now_on(clockid_t clock) {
	struct timespec t;
	clock_gettime(clock, &t);
	return (int64_t)t.tv_sec * SECOND_NS + t.tv_nsec;
}

static int64_t now_ns(void) {
	return now_on(CLOCK_MONOTONIC);
}

static void sleep_until(int64_t at) {
	struct timespec t = {.tv_sec = at / SECOND_NS, .tv_nsec = at % SECOND_NS};
	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

static void set_int(int fd, int level, int name, int value) {
	if (setsockopt(fd, level, name, &value, sizeof value) < 0)
		die("setsockopt");
}

static int open_socket(int type, bool big) {
	int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);

	if (fd < 0)
		die("socket");
	if (big) {
		/* Only the tunnel may lose packets, so the socket buffer must be large. */
		int room = SOCKET_ROOM;
		if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room) < 0)
			set_int(fd, SOL_SOCKET, SO_RCVBUF, room);
	}
	return fd;
}

static void bind_to(int fd, const struct sockaddr_in *at) {
	if (bind(fd, (const struct sockaddr *)at, sizeof *at) < 0)
		die("bind");
}

static void open_record(void) {
	if (opt.record && !(record = fopen(opt.record, "w")))
		die(opt.record);
}

static void close_record(void) {
	if (record && fclose(record))
		die(opt.record);
}

static void ready(void) {
	puts("ready");
	fflush(stdout);
}

/* Echo. */

static bool echo_tcp(int fd) {
	char buf[1 << 16];
	ssize_t len = recv(fd, buf, sizeof buf, 0);

	for (ssize_t done = 0, n; done < len; done += n)
		if ((n = send(fd, buf + done, (size_t)(len - done), MSG_NOSIGNAL)) <= 0)
			return false;
	return len > 0;
}

static void run_echo(const struct sockaddr_in *at) {
	int udp = open_socket(SOCK_DGRAM, true), listener = open_socket(SOCK_STREAM, false), tcp = -1;

	set_int(listener, SOL_SOCKET, SO_REUSEADDR, 1);
	bind_to(udp, at);
	bind_to(listener, at);
	if (listen(listener, 1) < 0)
		die("listen");
	ready();
	while (!stopping) {
		struct pollfd fds[] = {
			{.fd = udp, .events = POLLIN},
			{.fd = tcp < 0 ? listener : tcp, .events = POLLIN},
		};
		if (poll(fds, 2, -1) < 0)
			continue;
		if (fds[0].revents) {
			char buf[ROOM];
			struct sockaddr_in from;
			socklen_t room = sizeof from;
			ssize_t len = recvfrom(udp, buf, sizeof buf, 0, (struct sockaddr *)&from, &room);
			if (len >= 0)
				sendto(udp, buf, (size_t)len, 0, (struct sockaddr *)&from, room);
		}
		if (!fds[1].revents)
			continue;
		if (tcp < 0) {
			tcp = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
			if (tcp >= 0)
				set_int(tcp, IPPROTO_TCP, TCP_NODELAY, 1);
		} else if (!echo_tcp(tcp)) {
			close(tcp);
			tcp = -1;
		}
	}
}

/* Round trips. */

static int64_t *times;
static size_t times_n, times_room;

static void keep(int64_t ns) {
	if (times_n == times_room) {
		times_room = times_room ? 2 * times_room : 1 << 14;
		times = realloc(times, times_room * sizeof *times);
		if (!times)
			die("realloc");
	}
	times[times_n++] = ns;
}

static int by_value(const void *a, const void *b) {
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
	return (x > y) - (x < y);
}

static int64_t quantile(double q) {
	return times_n ? times[(size_t)(q * (double)(times_n - 1) + 0.5)] : -1;
}

/* Prints the distribution of the sorted times: pairs of a quantile and its time. */
static void print_quantiles(void) {
	static const double shown[] = {
		0, .01, .05, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95, .98, .99, .995, .999, 1,
	};

	printf("\"quantiles_ns\":[");
	for (size_t i = 0; times_n && i < sizeof shown / sizeof *shown; i++)
		printf("%s[%g,%lld]", i ? "," : "", shown[i], (long long)quantile(shown[i]));
	printf("]");
}

/* Reads one reply and records its round-trip time. Returns false if there is no reply to read. */
static bool read_reply(int fd, uint8_t *buf, size_t *have) {
	size_t want = opt.tcp ? (size_t)opt.size - *have : ROOM;
	ssize_t len = recv(fd, buf + *have, want, 0);
	struct mark mark;

	if (len <= 0)
		return false;
	*have += (size_t)len;
	if (opt.tcp && *have < (size_t)opt.size)
		return true;
	memcpy(&mark, buf, sizeof mark);
	if (*have == (size_t)opt.size && mark.run == opt.run) {
		int64_t row[] = {mark.seq, mark.sent_ns, now_ns()};
		keep(row[2] - row[1]);
		if (record)
			fwrite(row, sizeof row, 1, record);
	}
	*have = 0;
	return true;
}

static void run_ping(const struct sockaddr_in *to) {
	static uint8_t out[ROOM], in[ROOM];
	int fd = open_socket(opt.tcp ? SOCK_STREAM : SOCK_DGRAM, true);
	struct mark mark = {.run = (uint32_t)getpid()};
	int64_t begin, end, next_send, give_up = SECOND_NS / 5;
	uint64_t sent = 0, lost = 0;
	size_t have = 0;

	opt.run = mark.run;
	if (connect(fd, (const struct sockaddr *)to, sizeof *to) < 0)
		die("connect");
	if (opt.tcp)
		set_int(fd, IPPROTO_TCP, TCP_NODELAY, 1);
	if (fcntl(fd, F_SETFL, O_NONBLOCK) < 0)
		die("fcntl");
	open_record();
	begin = next_send = now_ns();
	end = begin + (int64_t)(opt.seconds * 1e9);
	for (;;) {
		int64_t now = now_ns(), wait;
		struct pollfd p = {.fd = fd, .events = POLLIN};
		struct timespec timeout;
		bool sending = now < end && !stopping;

		if (sending && (now >= next_send || (!opt.interval_us && times_n + lost >= sent))) {
			if (!opt.interval_us)
				lost = sent - times_n; /* requests without a reply within give_up */
			mark.sent_ns = now;
			memcpy(out, &mark, sizeof mark);
			if (send(fd, out, (size_t)opt.size, MSG_NOSIGNAL) == opt.size)
				sent++;
			else if (opt.tcp)
				break; /* after a partial send, the reader cannot find the next request */
			mark.seq++;
			next_send = opt.interval_us ? next_send + opt.interval_us * 1000 : now + give_up;
		}
		if (!sending && (times_n >= sent || now > end + give_up))
			break;
		wait = (sending ? next_send : end + give_up) - now_ns();
		if (wait < 0)
			wait = 0;
		timeout = (struct timespec){.tv_sec = wait / SECOND_NS, .tv_nsec = wait % SECOND_NS};
		if (ppoll(&p, 1, &timeout, NULL) > 0)
			while (read_reply(fd, in, &have))
				;
	}
	close_record();
	qsort(times, times_n, sizeof *times, by_value);
	printf("{\"sent\":%llu,\"received\":%zu,\"seconds\":%.6f,\"p50_ns\":%lld,\"p99_ns\":%lld,"
	       "\"p999_ns\":%lld,\"min_ns\":%lld,\"max_ns\":%lld,",
	       (unsigned long long)sent, times_n, (double)(now_ns() - begin) / 1e9,
	       (long long)quantile(.5), (long long)quantile(.99), (long long)quantile(.999),
	       (long long)quantile(0), (long long)quantile(1));
	print_quantiles();
	puts("}");
}

/* Counting. */

static uint8_t *seen; /* one bit per sequence number */
static size_t seen_bytes;

static bool first_time(uint32_t seq) {
	size_t at = seq / 8, bytes = seen_bytes;

	if (at >= bytes) {
		while (at >= bytes)
			bytes = bytes ? 2 * bytes : 1 << 16;
		seen = realloc(seen, bytes);
		if (!seen)
			die("realloc");
		memset(seen + seen_bytes, 0, bytes - seen_bytes);
		seen_bytes = bytes;
	}
	if (seen[at] & 1 << seq % 8)
		return false;
	seen[at] |= (uint8_t)(1 << seq % 8);
	return true;
}

static int64_t arrival(struct msghdr *msg) {
	for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c))
		if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_TIMESTAMPNS) {
			struct timespec t;
			memcpy(&t, CMSG_DATA(c), sizeof t);
			return (int64_t)t.tv_sec * SECOND_NS + t.tv_nsec;
		}
	return now_on(CLOCK_REALTIME);
}

static void run_receive(const struct sockaddr_in *at) {
	static uint8_t bufs[BATCH][ROOM];
	static struct mmsghdr msgs[BATCH];
	static struct iovec iov[BATCH];
	static uint8_t control[BATCH][64];
	int fd = open_socket(SOCK_DGRAM, true);
	uint64_t received = 0, bytes = 0, repeated = 0, late = 0;
	uint32_t highest = 0, info[SK_MEMINFO_VARS] = {0};
	socklen_t info_len = sizeof info;
	int64_t give_up = now_ns() + (int64_t)(opt.seconds * 1e9);
	struct timeval slice = {.tv_usec = 100000};
	bool ended = false;

	open_record();
	if (record)
		set_int(fd, SOL_SOCKET, SO_TIMESTAMPNS, 1);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &slice, sizeof slice);
	bind_to(fd, at);
	ready();
	while (!stopping && !ended && now_ns() < give_up) {
		for (int i = 0; i < BATCH; i++) {
			iov[i] = (struct iovec){bufs[i], ROOM};
			msgs[i].msg_hdr = (struct msghdr){.msg_iov = &iov[i], .msg_iovlen = 1};
			if (record) {
				msgs[i].msg_hdr.msg_control = control[i];
				msgs[i].msg_hdr.msg_controllen = sizeof control[i];
			}
		}
		int n = recvmmsg(fd, msgs, BATCH, MSG_WAITFORONE, NULL);
		for (int i = 0; i < n; i++) {
			struct mark mark;
			if (msgs[i].msg_len < sizeof mark)
				continue;
			memcpy(&mark, bufs[i], sizeof mark);
			if (mark.run != opt.run)
				continue;
			if (mark.seq == END_SEQ) {
				ended = true;
				continue;
			}
			if (record) {
				int64_t row[] = {mark.seq, mark.sent_ns, arrival(&msgs[i].msg_hdr)};
				fwrite(row, sizeof row, 1, record);
			}
			if (!first_time(mark.seq)) {
				repeated++;
				continue;
			}
			received++;
			bytes += msgs[i].msg_len;
			if (mark.seq < highest)
				late++;
			else
				highest = mark.seq;
		}
	}
	getsockopt(fd, SOL_SOCKET, SO_MEMINFO, info, &info_len);
	close_record();
	printf("{\"received\":%llu,\"bytes\":%llu,\"repeated\":%llu,\"late\":%llu,"
	       "\"dropped_at_receiver\":%u,\"ended\":%s}\n",
	       (unsigned long long)received, (unsigned long long)bytes, (unsigned long long)repeated,
	       (unsigned long long)late, info[SK_MEMINFO_DROPS], ended ? "true" : "false");
}

/* Sending. */

/* Scatters the targets: consecutive datagrams use distant table entries. The factor is prime. */
static uint32_t nth_target(uint64_t seq) {
	return (uint32_t)(seq * 2654435761u % (uint64_t)opt.spread);
}

static void run_send(const struct sockaddr_in *to) {
	static uint8_t bufs[BATCH][ROOM];
	static struct mmsghdr msgs[BATCH];
	static struct iovec iov[BATCH];
	static struct sockaddr_in targets[BATCH];
	int fd = open_socket(SOCK_DGRAM, false);
	int64_t begin, end, base, now, forgiven = 0;
	double ns_each = opt.rate ? 1e9 / (double)opt.rate : 0;
	int64_t burst = 2 * ns_each > BURST_NS ? (int64_t)(2 * ns_each) : BURST_NS;
	uint64_t sent = 0, refused = 0, since_base = 0;
	struct mark mark = {.run = opt.run, .seq = END_SEQ};
	/* Connecting saves a route look-up per packet. It fails if there is no route yet. */
	bool connected = opt.spread == 1 && !connect(fd, (const struct sockaddr *)to, sizeof *to);

	for (int i = 0; i < BATCH; i++) {
		iov[i] = (struct iovec){bufs[i], (size_t)opt.size};
		targets[i] = *to;
		msgs[i].msg_hdr = (struct msghdr){.msg_iov = &iov[i], .msg_iovlen = 1};
		if (!connected) {
			msgs[i].msg_hdr.msg_name = &targets[i];
			msgs[i].msg_hdr.msg_namelen = sizeof targets[i];
		}
	}
	begin = base = now = now_ns();
	end = begin + (int64_t)(opt.seconds * 1e9);
	while (now < end && !stopping) {
		int64_t pending = BATCH;
		if (opt.rate) {
			int64_t behind = now - base - (int64_t)(ns_each * (double)since_base);
			if (behind > burst) {
				base += behind - burst;
				forgiven += behind - burst;
				behind = burst;
			}
			pending = behind < 0 ? 0 : (int64_t)((double)behind / ns_each) + 1;
		}
		for (int64_t left = pending; left > 0;) {
			int n = left < BATCH ? (int)left : BATCH, done;
			int64_t stamp = now_on(CLOCK_REALTIME);
			for (int i = 0; i < n; i++) {
				uint64_t seq = sent + refused + (uint64_t)i;
				struct mark m = {opt.run, (uint32_t)seq, stamp};
				memcpy(bufs[i], &m, sizeof m);
				if (opt.spread > 1)
					targets[i].sin_addr.s_addr = htonl(
						ntohl(to->sin_addr.s_addr) + 4 * nth_target(seq));
			}
			done = sendmmsg(fd, msgs, (unsigned)n, 0);
			if (done < 0) {
				refused++; /* there is no route or no buffer for the first datagram */
				done = 1;
			} else {
				sent += (uint64_t)done;
			}
			since_base += (uint64_t)done;
			left -= done;
		}
		now = now_ns();
		if (opt.rate) {
			int64_t next = base + (int64_t)(ns_each * (double)since_base);
			if (next < now + TICK_NS)
				next = now + TICK_NS;
			if (ns_each > TICK_NS)
				next = base + (int64_t)(ns_each * (double)since_base);
			sleep_until(next < end ? next : end);
			now = now_ns();
		}
	}
	/* Sends the end marks with pauses, so that full queues can drain between two marks. */
	for (int i = 0; i < END_MARKS; i++) {
		memcpy(bufs[0], &mark, sizeof mark);
		sleep_until(now_ns() + (i ? 10000000 : 2000000));
		sendto(fd, bufs[0], (size_t)opt.size, 0, (const struct sockaddr *)to, sizeof *to);
		if (i >= 4 && opt.spread == 1)
			break;
	}
	printf("{\"sent\":%llu,\"refused\":%llu,\"seconds\":%.6f,\"forgiven_seconds\":%.6f}\n",
	       (unsigned long long)sent, (unsigned long long)refused, (double)(now - begin) / 1e9,
	       (double)forgiven / 1e9);
}

static struct sockaddr_in parse_endpoint(const char *address, const char *port) {
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};

	if (inet_pton(AF_INET, address, &at.sin_addr) != 1 || !at.sin_port) {
		fprintf(stderr, "udpload: %s %s: expected an IPv4 address and a port\n", address, port);
		exit(2);
	}
	return at;
}

int main(int argc, char **argv) {
	enum { SECONDS = 1, SIZE, RATE, SPREAD, INTERVAL, RUN, RECORD, TCP };
	static const struct option options[] = {
		{"seconds", required_argument, NULL, SECONDS}, {"size", required_argument, NULL, SIZE},
		{"rate", required_argument, NULL, RATE},       {"spread", required_argument, NULL, SPREAD},
		{"interval-us", required_argument, NULL, INTERVAL}, {"run", required_argument, NULL, RUN},
		{"record", required_argument, NULL, RECORD},   {"tcp", no_argument, NULL, TCP},
		{0},
	};
	struct sigaction stop = {.sa_handler = on_signal};
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
		switch (option) {
		case SECONDS: opt.seconds = atof(optarg); break;
		case SIZE: opt.size = atol(optarg); break;
		case RATE: opt.rate = atol(optarg); break;
		case SPREAD: opt.spread = atol(optarg); break;
		case INTERVAL: opt.interval_us = atol(optarg); break;
		case RUN: opt.run = (uint32_t)atol(optarg); break;
		case RECORD: opt.record = optarg; break;
		case TCP: opt.tcp = true; break;
		default: return 2;
		}
	if (argc - optind != 3 || opt.size < (long)sizeof(struct mark) || opt.size > ROOM ||
	    opt.spread < 1 || opt.rate < 0 || opt.interval_us < 0 || opt.seconds <= 0) {
		fprintf(stderr, "usage: udpload echo|ping|receive|send ADDRESS PORT [OPTION]...; --size 16..%d\n",
			ROOM);
		return 2;
	}
	sigaction(SIGTERM, &stop, NULL);
	sigaction(SIGINT, &stop, NULL);
	prctl(PR_SET_TIMERSLACK, 1);

	struct sockaddr_in at = parse_endpoint(argv[optind + 1], argv[optind + 2]);
	const char *what = argv[optind];
	if (!strcmp(what, "echo"))
		run_echo(&at);
	else if (!strcmp(what, "ping"))
		run_ping(&at);
	else if (!strcmp(what, "receive"))
		run_receive(&at);
	else if (!strcmp(what, "send"))
		run_send(&at);
	else {
		fprintf(stderr, "udpload: %s: expected echo, ping, receive or send\n", what);
		return 2;
	}
	return 0;
}
