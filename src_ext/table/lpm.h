/* Population count at the speed of the CPU at hand: what Cython cannot say.
 *
 * Wheels are built for baseline x86-64, which has no POPCNT. The instruction is written out and
 * guarded by a flag that is read once per look-up, a branch that is always predicted; an ifunc
 * (target_clones) would cost a call per count and does not go with the sanitizers.
 */
#ifndef UDPTUN_LPM_H
#define UDPTUN_LPM_H

#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define UDPTUN_POPCNT 1
#endif

static inline int cpu_has_popcount(void) {
#ifdef UDPTUN_POPCNT
    return __builtin_cpu_supports("popcnt") != 0;
#else
    return 0;
#endif
}

/* fast: what cpu_has_popcount() said. */
static inline unsigned popcount64(uint64_t x, int fast) {
#ifdef UDPTUN_POPCNT
    if (fast) {
        uint64_t count;
        __asm__("popcnt %1, %0" : "=r"(count) : "r"(x) : "cc");
        return (unsigned)count;
    }
#else
    (void)fast;
#endif
    x -= x >> 1 & 0x5555555555555555u;
    x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return (unsigned)(x * 0x0101010101010101u >> 56);
}

#endif
