/* The program that a container runtime starts: it runs the CNI plugin of udptun (docs/cni.md).
 *
 * It is linked statically, so it needs no shell, no Python and no library of the host. The files
 * that it runs are next to it, in the directory .udptun/current: an interpreter with its libraries
 * and its own dynamic loader. "current" is a symbolic link. It is resolved once here, so a plugin
 * that runs keeps its files while an update replaces the link.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CODE "from udptun.cni.plugin import main; main()"
enum { SIZE = 2 * PATH_MAX };

static int fail(const char *what)
{
    printf("{\"cniVersion\": \"1.0.0\", \"code\": 5, \"msg\": \"%s: errno %d: install the CNI plugin "
           "of udptun again\"}\n", what, errno);
    return 1;
}

static int resolve(const char *link, char *target)
{
    ssize_t len = readlink(link, target, PATH_MAX - 1);
    if (len < 0)
        return -1;
    target[len] = 0;
    return 0;
}

int main(void)
{
    static char self[PATH_MAX], link[SIZE], target[PATH_MAX], root[2 * SIZE];
    static char loader[3 * SIZE], library[3 * SIZE], python[3 * SIZE];

    if (resolve("/proc/self/exe", self) != 0)
        return fail("/proc/self/exe cannot be read");
    char *slash = strrchr(self, '/');
    if (slash == NULL)
        return fail("/proc/self/exe is not a path");
    *slash = 0;
    snprintf(link, sizeof link, "%s/.udptun/current", self);
    if (resolve(link, target) != 0)
        return fail(".udptun/current, next to this program, cannot be read");
    snprintf(root, sizeof root, "%s/.udptun/%s", self, target);
    snprintf(loader, sizeof loader, "%s/lib/ld.so", root);
    snprintf(library, sizeof library, "%s/lib", root);
    snprintf(python, sizeof python, "%s/bin/python3", root);

    /* libraries of the host do not fit the copied C library */
    unsetenv("LD_PRELOAD");
    unsetenv("LD_LIBRARY_PATH");
    unsetenv("LD_AUDIT");
    char *const args[] = {
        loader, "--library-path", library, python, "-I", "-S", "-B", "-X", "utf8", "-c", CODE, NULL};
    execv(loader, args);
    return fail(".udptun/current/lib/ld.so, next to this program, cannot be started");
}
