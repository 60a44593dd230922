/* Population count with the POPCNT instruction, if the CPU has this instruction. The file is plain
 * C, because Cython has no inline assembly.
 *
 * Wheels are built for baseline x86-64, which does not include POPCNT. So the code checks a flag.
 * The flag is read once per look-up, and the CPU always predicts the branch. An ifunc
 * (target_clones) would cost a function call per count and does not work with the sanitizers.
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

/* fast: the result of cpu_has_popcount(). */
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
