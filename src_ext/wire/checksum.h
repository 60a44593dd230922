/* The inner loop of the Internet checksum. It is in C because Cython cannot select SIMD code when
 * a module is loaded.
 *
 * Owns one loop, compiled once per instruction set, and the choice between these variants. Each
 * variant is a separate function, so that tests can call it. target_clones is not used, because it
 * needs an ifunc, and the code must work with gcc, clang, musl and the sanitizers. The variant is
 * chosen when the module is loaded. The choice never changes, so any thread may call.
 *
 * Every function here adds the n bytes at p to acc, as 32-bit words in native order. The carries
 * are in the upper half of acc. An odd last byte counts as if a zero byte followed. The sum does
 * not overflow while acc < 2^63 and n < 2^32. Only p[0:n] is read.
 */
#ifndef UDPTUN_CHECKSUM_H
#define UDPTUN_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint64_t (*udptun_csum_fn)(const uint8_t *p, size_t n, uint64_t acc);

/* The variant for headers. The compiler inlines it, and unrolls the loop if n is a constant. */
static inline __attribute__((always_inline)) uint64_t
udptun_csum_short(const uint8_t *p, size_t n, uint64_t acc)
{
    for (; n >= 4; p += 4, n -= 4) {
        uint32_t w;
        memcpy(&w, p, 4);
        acc += w;
    }
    if (n & 2) {
        uint16_t w;
        memcpy(&w, p, 2);
        acc += w;
        p += 2;
    }
    if (n & 1) {
        uint16_t w = 0;
        memcpy(&w, p, 1);
        acc += w;
    }
    return acc;
}

/* One implementation, with vectors of BYTES bytes. Each 64-bit lane holds two words. `all` is the
 * sum of the lanes modulo 2^64. `high` is the sum of the upper words of the lanes. The sum of the
 * lower words is all - (high << 32). Masking the words would take one more operation per vector.
 * The result is exact while the sum of the lower words is below 2^64. */
#define UDPTUN_CSUM_IMPLEMENTATION(NAME, BYTES, TARGET)                                          \
    TARGET static __attribute__((noinline)) uint64_t                                             \
    NAME(const uint8_t *p, size_t n, uint64_t acc)                                               \
    {                                                                                            \
        typedef uint64_t lanes __attribute__((vector_size(BYTES)));                              \
        lanes all0 = {0}, all1 = {0}, high0 = {0}, high1 = {0}, v0, v1;                          \
        for (; n >= 2 * BYTES; p += 2 * BYTES, n -= 2 * BYTES) {                                 \
            memcpy(&v0, p, BYTES);                                                               \
            memcpy(&v1, p + BYTES, BYTES);                                                       \
            all0 += v0;                                                                          \
            all1 += v1;                                                                          \
            high0 += v0 >> 32;                                                                   \
            high1 += v1 >> 32;                                                                   \
        }                                                                                        \
        high0 += high1;                                                                          \
        all0 += all1 - (high0 << 32) + high0;                                                    \
        for (size_t i = 0; i < BYTES / 8; i++)                                                   \
            acc += all0[i];                                                                      \
        return udptun_csum_short(p, n, acc);                                                     \
    }

UDPTUN_CSUM_IMPLEMENTATION(udptun_csum_baseline, 16, )
#if defined(__x86_64__)
UDPTUN_CSUM_IMPLEMENTATION(udptun_csum_avx2, 32, __attribute__((target("avx2"))))
UDPTUN_CSUM_IMPLEMENTATION(udptun_csum_avx512, 64, __attribute__((target("avx512f,avx512bw"))))
#endif

/* The implementations that this CPU supports, the fastest last. */
#define UDPTUN_CSUM_MAX 3
static const char *udptun_csum_names[UDPTUN_CSUM_MAX] = {"baseline"};
static udptun_csum_fn udptun_csum_fns[UDPTUN_CSUM_MAX] = {udptun_csum_baseline};
static int udptun_csum_n = 1;
static udptun_csum_fn udptun_csum_best = udptun_csum_baseline;

#if defined(__x86_64__)
__attribute__((constructor)) static void udptun_csum_choose(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
        udptun_csum_names[udptun_csum_n] = "avx2";
        udptun_csum_fns[udptun_csum_n++] = udptun_csum_avx2;
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) {
        udptun_csum_names[udptun_csum_n] = "avx512";
        udptun_csum_fns[udptun_csum_n++] = udptun_csum_avx512;
    }
    udptun_csum_best = udptun_csum_fns[udptun_csum_n - 1];
}
#endif

static inline uint64_t udptun_csum_add(const uint8_t *p, size_t n, uint64_t acc)
{
    if (n < 64)
        return udptun_csum_short(p, n, acc);
    return udptun_csum_best(p, n, acc);
}
#endif
