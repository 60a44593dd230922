/* The kernel of the fuzz harnesses: system calls that a script answers.
 *
 * The C compiler includes this file before the translated core, in which the macros at the end
 * replace the system calls. Owns the one kernel_t of the process; one thread. The bytes of a buffer
 * after those that a call has filled are poisoned, so that AddressSanitizer reports an access.
 */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <linux/errqueue.h>
#include <linux/sockios.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#include <sanitizer/asan_interface.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

enum { FD_TUN = 1000, FD_UDP4, FD_UDP6, FD_NOTIFY, FD_OWN, MAX_OUTER = 65507 };

typedef struct {
  const uint8_t *script;  /* one byte decides one answer; at the end every call succeeds */
  size_t script_n;
  const uint8_t *tun;     /* the next frame: frame_n bytes, then zeros up to tun_n */
  size_t frame_n, tun_n;
  unsigned frames;        /* how often it can be read */
  const uint8_t *udp;     /* the next datagrams (see fuzz_recvmmsg) */
  size_t udp_n;
  int udp_fd;             /* the socket that has them */
  uint64_t now;
  uint64_t sent;          /* datagrams accepted */
  uint64_t written;       /* packets written to the TUN */
  size_t vnet_len;        /* of the frames that are written */
  uint32_t longest;       /* the longest payload that may be sent */
  int open_n;             /* descriptors that fuzz_socket made */
} kernel_t;

static kernel_t kernel;
static volatile uint8_t fuzz_sink;
static int fuzz_planted;  /* the number of a bug of planted.py; 0: none */

static inline int planted_is(int n) {
  return fuzz_planted == n;
}

static void fuzz_fail(const char *what) {
  fprintf(stderr, "fuzz: %s\n", what);
  abort();
}

static uint8_t fuzz_answer(void) {
  if (!kernel.script_n) return 0;
  kernel.script_n--;
  return *kernel.script++;
}

static int fuzz_refuse(uint8_t answer) {
  static const int errors[] = {EAGAIN, EMSGSIZE, EINVAL, EIO, ENOBUFS, ECONNREFUSED, EINTR, EPERM,
                               ENETUNREACH, EOPNOTSUPP, ENOMEM, EAGAIN, EAGAIN, EHOSTUNREACH};
  errno = errors[answer % (sizeof(errors) / sizeof(errors[0]))];
  return -1;
}

static void fuzz_touch(const void *p, size_t n) {
  uint8_t sum = 0;
  for (size_t i = 0; i < n; i++) sum += ((const uint8_t *)p)[i];
  fuzz_sink = sum;
}

/* Fill buf[0:size] with data[0:n] and zeros up to total; poison the rest. Return the bytes used. */
static size_t fuzz_fill(uint8_t *buf, size_t size, const uint8_t *data, size_t n, size_t total) {
  ASAN_UNPOISON_MEMORY_REGION(buf, size);
  if (total < n) total = n;
  if (total > size) total = size;
  if (n > total) n = total;
  memcpy(buf, data, n);
  memset(buf + n, 0, total - n);
  ASAN_POISON_MEMORY_REGION(buf + total, size - total);
  return total;
}

/* Check that p[0:n] is one whole IP packet or a probe, which is all that a datagram may carry. */
static void fuzz_check_packet(const uint8_t *p, size_t n) {
  if (n < 20) fuzz_fail("a short datagram");
  size_t said = p[0] >> 4 == 4 ? (size_t)p[2] << 8 | p[3]
              : p[0] >> 4 == 6 ? 40 + ((size_t)p[4] << 8 | p[5])
              : p[0] >> 4 == 7 ? n : 0;
  if (said != n) fuzz_fail("a datagram whose packet declares another length");
}

static ssize_t fuzz_read(int fd, void *buf, size_t n) {
  if (fd != FD_TUN || !kernel.frames) {
    errno = EAGAIN;
    return -1;
  }
  ssize_t filled = fuzz_fill(buf, n, kernel.tun, kernel.frame_n, kernel.tun_n);
  kernel.frames--;
  return filled;
}

static ssize_t fuzz_write(int fd, const void *buf, size_t n) {
  const uint8_t *p = buf;
  fuzz_touch(buf, n);
  if (fd == FD_NOTIFY) return n;
  if (fd != FD_TUN) fuzz_fail("a write to an unknown descriptor");
  uint8_t answer = fuzz_answer();
  if (answer >= 0xC0) return fuzz_refuse(answer);
  if (n < kernel.vnet_len + 20) fuzz_fail("a short frame");
  if (!kernel.vnet_len || !p[1]) {
    fuzz_check_packet(p + kernel.vnet_len, n - kernel.vnet_len);
    kernel.written++;
    return n;
  }
  uint16_t hdr_len, gso_size;
  memcpy(&hdr_len, p + 2, 2);
  memcpy(&gso_size, p + 4, 2);
  if (!gso_size || 10 + (size_t)hdr_len >= n) fuzz_fail("a merged frame without payload");
  fuzz_check_packet(p + 10, n - 10);
  kernel.written += (n - 10 - hdr_len + gso_size - 1) / gso_size;
  return n;
}

static int fuzz_sendmmsg(int fd, struct mmsghdr *msgs, unsigned n, int flags) {
  (void)fd, (void)flags;
  if (!n) fuzz_fail("sendmmsg of nothing");
  uint8_t answer = fuzz_answer();
  if (answer & 0x80) return fuzz_refuse(answer & 0x7F);
  unsigned accepted = answer & 0x40 ? 1 + answer % n : n;
  for (unsigned i = 0; i < accepted; i++) {
    struct msghdr *m = &msgs[i].msg_hdr;
    size_t total = 0, size, at = 0;
    uint8_t *all = malloc(MAX_OUTER);
    for (size_t k = 0; k < m->msg_iovlen; k++) {
      if (total + m->msg_iov[k].iov_len > MAX_OUTER) fuzz_fail("a message above 65507 bytes");
      memcpy(all + total, m->msg_iov[k].iov_base, m->msg_iov[k].iov_len);
      total += m->msg_iov[k].iov_len;
    }
    size = total;
    fuzz_touch(m->msg_name, m->msg_namelen);
    struct cmsghdr *c = CMSG_FIRSTHDR(m);
    if (c) {
      uint16_t segment;
      memcpy(&segment, CMSG_DATA(c), 2);
      if (c->cmsg_type != UDP_SEGMENT || !segment) fuzz_fail("a control message without a size");
      size = segment;
    }
    if (!total) fuzz_fail("an empty datagram");
    if (size > kernel.longest) fuzz_fail("a datagram longer than the path MTU");
    for (; at < total; at += size) {
      fuzz_check_packet(all + at, total - at < size ? total - at : size);
      kernel.sent++;
    }
    free(all);
  }
  return (int)accepted;
}

static ssize_t fuzz_sendto(int fd, const void *p, size_t n, int flags, const void *to,
                           uint32_t to_n) {
  (void)fd, (void)flags;
  fuzz_touch(p, n);
  fuzz_touch(to, to_n);
  uint8_t answer = fuzz_answer();
  if (answer >= 0xE0) return fuzz_refuse(answer);
  kernel.sent++;
  return n;
}

/* One datagram of the script: sender (1 byte), GRO size (2), bytes given (2), length (2), bytes. */
static int fuzz_recvmmsg(int fd, struct mmsghdr *msgs, unsigned slots, int flags, void *timeout) {
  (void)flags, (void)timeout;
  unsigned n = 0;
  while (fd == kernel.udp_fd && n < slots && kernel.udp_n >= 7) {
    const uint8_t *d = kernel.udp;
    uint16_t gro, given, len;
    memcpy(&gro, d + 1, 2), memcpy(&given, d + 3, 2), memcpy(&len, d + 5, 2);
    if (given > kernel.udp_n - 7) given = kernel.udp_n - 7;
    struct msghdr *m = &msgs[n].msg_hdr;
    size_t total = fuzz_fill(m->msg_iov[0].iov_base, m->msg_iov[0].iov_len, d + 7, given, len);
    msgs[n].msg_len = total;
    m->msg_flags = d[0] & 0x80 ? MSG_TRUNC : 0;
    uint16_t port = htons(d[0] & 0x20 ? 8285 : 1024 + (d[0] & 0x18));
    if (fd == FD_UDP4) {
      struct sockaddr_in from = {.sin_family = AF_INET, .sin_port = port};
      uint8_t addr[4] = {192, 0, 2, (uint8_t)(1 + d[0] % 8)};
      memcpy(&from.sin_addr, addr, 4);
      memcpy(m->msg_name, &from, sizeof(from));
      m->msg_namelen = sizeof(from);
    } else {
      struct sockaddr_in6 from = {.sin6_family = AF_INET6, .sin6_port = port};
      uint8_t addr[16] = {0x20, 1, 0xd, 0xb8, [15] = (uint8_t)(1 + d[0] % 8)};
      memcpy(&from.sin6_addr, addr, 16);
      memcpy(m->msg_name, &from, sizeof(from));
      m->msg_namelen = sizeof(from);
    }
    m->msg_controllen = 0;
    if (gro) {
      m->msg_controllen = CMSG_SPACE(sizeof(int));
      struct cmsghdr *c = CMSG_FIRSTHDR(m);
      int size = gro;
      c->cmsg_level = IPPROTO_UDP, c->cmsg_type = UDP_GRO, c->cmsg_len = CMSG_LEN(sizeof(int));
      memcpy(CMSG_DATA(c), &size, sizeof(size));
    }
    kernel.udp += 7 + given, kernel.udp_n -= 7 + given;
    n++;
  }
  if (!n) errno = EAGAIN;
  return n ? (int)n : -1;
}

/* One message of the error queue: 1 byte decides whether there is one; then 4 bytes of the script
 * choose the destination, the error and the length of the control message; up to 48 bytes fill it.
 * Then a byte for the length of the quoted payload, and the payload. */
static ssize_t fuzz_recvmsg(int fd, struct msghdr *m, int flags) {
  (void)fd;
  if (!(flags & MSG_ERRQUEUE)) fuzz_fail("recvmsg without MSG_ERRQUEUE");
  ASAN_UNPOISON_MEMORY_REGION(m->msg_control, m->msg_controllen);
  uint8_t answer = fuzz_answer();
  if (answer < 0x80) {
    errno = answer < 0x10 && kernel.script_n ? EINTR : EAGAIN;
    return -1;
  }
  uint8_t to = fuzz_answer(), kind = fuzz_answer(), n = fuzz_answer();
  struct sock_extended_err err = {0};
  err.ee_errno = kind & 1 ? EMSGSIZE : ECONNREFUSED;
  err.ee_origin = kind >> 1 & 7;
  err.ee_info = 68 + (fuzz_answer() << 4);  /* a device's MTU is at least 68 */
  size_t room = m->msg_controllen;
  uint8_t data[sizeof(err) + 48];
  size_t data_n = n % sizeof(data);
  memcpy(data, &err, sizeof(err));
  for (size_t i = sizeof(err); i < data_n; i++) data[i] = fuzz_answer();
  if (CMSG_SPACE(data_n) > room) fuzz_fail("the control buffer is too small");
  m->msg_controllen = CMSG_SPACE(data_n);
  uint8_t *end = (uint8_t *)m->msg_control + CMSG_LEN(data_n);
  struct cmsghdr *c = CMSG_FIRSTHDR(m);
  int four = !(answer & 1);
  c->cmsg_level = answer & 2 ? IPPROTO_UDP : four ? IPPROTO_IP : IPPROTO_IPV6;
  c->cmsg_type = four ? IP_RECVERR : IPV6_RECVERR;
  c->cmsg_len = CMSG_LEN(data_n);
  memcpy(CMSG_DATA(c), data, data_n);
  ASAN_POISON_MEMORY_REGION(end, (uint8_t *)m->msg_control + room - end);
  if (answer & 4) {
    m->msg_namelen = 0;
  } else if (four) {
    struct sockaddr_in dest = {.sin_family = AF_INET, .sin_port = htons(8285 + (to >> 4))};
    uint8_t addr[4] = {192, 0, 2, (uint8_t)(1 + to % 8)};
    memcpy(&dest.sin_addr, addr, 4);
    memcpy(m->msg_name, &dest, sizeof(dest));
    m->msg_namelen = sizeof(dest);
  } else {
    struct sockaddr_in6 dest = {.sin6_family = AF_INET6, .sin6_port = htons(8285 + (to >> 4))};
    uint8_t addr[16] = {0x20, 1, 0xd, 0xb8, [15] = (uint8_t)(1 + to % 8)};
    memcpy(&dest.sin6_addr, addr, 16);
    memcpy(m->msg_name, &dest, sizeof(dest));
    m->msg_namelen = sizeof(dest);
  }
  size_t quoted = fuzz_answer() % (m->msg_iov[0].iov_len + 1);
  for (size_t i = 0; i < quoted; i++) ((uint8_t *)m->msg_iov[0].iov_base)[i] = fuzz_answer();
  return quoted;
}

/* Own sockets (path/own_socket.pxd). */
static int fuzz_socket(int family, int kind, int proto) {
  (void)family, (void)kind, (void)proto;
  uint8_t answer = fuzz_answer();
  if (answer >= 0xE0) return fuzz_refuse(answer);
  kernel.open_n++;
  static int next;
  return FD_OWN + next++ % 1000;
}

static int fuzz_close(int fd) {
  if (fd < FD_OWN) fuzz_fail("close of a descriptor that is not an own socket");
  if (--kernel.open_n < 0) fuzz_fail("close of a closed descriptor");
  return 0;
}

static int fuzz_setup_call(void) {
  uint8_t answer = fuzz_answer();
  return answer >= 0xF0 ? fuzz_refuse(answer) : 0;
}

static int fuzz_getsockname(int fd, void *address, uint32_t *n) {
  (void)fd;
  memset(address, 0, *n < 16 ? *n : 16);
  ((struct sockaddr *)address)->sa_family = AF_INET;
  *n = 16;
  return 0;
}

static int fuzz_getsockopt(int fd, int level, int name, void *value, uint32_t *n) {
  (void)fd, (void)level, (void)name;
  memset(value, 0, *n);
  return 0;
}

static int fuzz_ioctl(int fd, unsigned long request, void *value) {
  (void)fd;
  if (request == SIOCOUTQ) *(int *)value = fuzz_answer() & 1;
  return 0;
}

static int fuzz_clock(int clock, struct timespec *ts) {
  (void)clock;
  kernel.now += 1000;
  ts->tv_sec = kernel.now / 1000000000, ts->tv_nsec = kernel.now % 1000000000;
  return 0;
}

#define read(fd, p, n) fuzz_read(fd, p, n)
#define write(fd, p, n) fuzz_write(fd, p, n)
#define close(fd) fuzz_close(fd)
#define sendmmsg(fd, m, n, f) fuzz_sendmmsg(fd, m, n, f)
#define sendto(fd, p, n, f, to, to_n) fuzz_sendto(fd, p, n, f, to, to_n)
#define recvmmsg(fd, m, n, f, t) fuzz_recvmmsg(fd, m, n, f, t)
#define recvmsg(fd, m, f) fuzz_recvmsg(fd, m, f)
#define socket(family, kind, proto) fuzz_socket(family, kind, proto)
#define bind(fd, a, n) fuzz_setup_call()
#define connect(fd, a, n) fuzz_setup_call()
#define setsockopt(fd, level, name, p, n) fuzz_setup_call()
#define getsockname(fd, a, n) fuzz_getsockname(fd, a, n)
#define getsockopt(fd, level, name, p, n) fuzz_getsockopt(fd, level, name, p, n)
#define ioctl(fd, request, p) fuzz_ioctl(fd, request, p)
#define clock_gettime(clock, ts) fuzz_clock(clock, ts)
#define getrandom(p, n, flags) 0
#define sched_yield() 0
