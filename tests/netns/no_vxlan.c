/* For LD_PRELOAD: hides vxlan from one process. Replaces the device kind in its netlink messages by one
 * that no kernel has, so that the kernel itself refuses it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/netlink.h>

static const char KIND[] = "vxlan"; /* with the final zero, so that it differs from names such as vxlan0 */

static int is_netlink(int fd)
{
    int domain = 0;
    socklen_t size = sizeof domain;
    return getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && domain == AF_NETLINK;
}

static void disguise(int fd, void *bytes, size_t n)
{
    char *found;
    if (is_netlink(fd))
        while ((found = memmem(bytes, n, KIND, sizeof KIND)))
            found[0] = 'X';
}

ssize_t sendto(int fd, const void *bytes, size_t n, int flags, const struct sockaddr *to,
               socklen_t to_len)
{
    ssize_t (*next)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) =
        dlsym(RTLD_NEXT, "sendto");
    disguise(fd, (void *)bytes, n);
    return next(fd, bytes, n, flags, to, to_len);
}

ssize_t send(int fd, const void *bytes, size_t n, int flags)
{
    return sendto(fd, bytes, n, flags, NULL, 0);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    ssize_t (*next)(int, const struct msghdr *, int) = dlsym(RTLD_NEXT, "sendmsg");
    for (size_t i = 0; i < message->msg_iovlen; i++)
        disguise(fd, message->msg_iov[i].iov_base, message->msg_iov[i].iov_len);
    return next(fd, message, flags);
}
