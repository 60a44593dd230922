/* The kernel's helper functions that the express programs call, and small helpers of our own.
 *
 * The declarations follow linux/bpf.h (bpf-helpers(7)). libbpf is not needed to compile.
 */
#ifndef UDPTUN_EXPRESS_HELPERS_H
#define UDPTUN_EXPRESS_HELPERS_H

#include <linux/bpf.h>
#include <linux/types.h>

#define INLINE static inline __attribute__((always_inline))
#define SECTION(name) __attribute__((section(name), used))

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define BE16(x) ((__u16)__builtin_bswap16(x))
#else
#define BE16(x) ((__u16)(x))
#endif

/* Linux 6.3; older headers lack them. An older kernel refuses them at run time. */
#define DECAP_L3_IPV4 (1ULL << 7)	/* BPF_F_ADJ_ROOM_DECAP_L3_IPV4 */
#define DECAP_L3_IPV6 (1ULL << 8)	/* BPF_F_ADJ_ROOM_DECAP_L3_IPV6 */

#define HELPER(type, name, number, ...) \
	static type (*const name)(__VA_ARGS__) = (void *)(number)

HELPER(void *, map_lookup, BPF_FUNC_map_lookup_elem, const void *map, const void *key);
HELPER(long, map_update, BPF_FUNC_map_update_elem, const void *map, const void *key,
       const void *value, __u64 flags);
HELPER(__u64, now_ns, BPF_FUNC_ktime_get_ns, void);
HELPER(long, pull_data, BPF_FUNC_skb_pull_data, struct __sk_buff *skb, __u32 n);
HELPER(long, store_bytes, BPF_FUNC_skb_store_bytes, struct __sk_buff *skb, __u32 at,
       const void *from, __u32 n, __u64 flags);
HELPER(long, adjust_room, BPF_FUNC_skb_adjust_room, struct __sk_buff *skb, __s32 n, __u32 mode,
       __u64 flags);
HELPER(long, change_head, BPF_FUNC_skb_change_head, struct __sk_buff *skb, __u32 n, __u64 flags);
HELPER(long, redirect, BPF_FUNC_redirect, __u32 ifindex, __u64 flags);
HELPER(long, redirect_neigh, BPF_FUNC_redirect_neigh, __u32 ifindex,
       struct bpf_redir_neigh *params, int n, __u64 flags);

/* Load a field of the context. In assembly, because the verifier refuses a load whose address was
 * computed first, and the compiler does that. */
#define LOAD_FIELD(field) ({ \
	__u64 value; \
	asm volatile("%0 = *(u32 *)(%1 + %2)" : "=r"(value) \
		     : "r"(skb), "i"(__builtin_offsetof(struct __sk_buff, field))); \
	(void *)value; \
})

/* Add a constant to a pointer into the packet. In assembly, because without CAP_PERFMON the verifier
 * refuses to add a register, and the compiler joins two branches that add different constants. */
#define AT(pointer, offset) ({ \
	void *at_ = (pointer); \
	asm volatile("%0 += %1" : "+r"(at_) : "i"(offset)); \
	at_; \
})

INLINE void *data_of(const struct __sk_buff *skb)
{
	return LOAD_FIELD(data);
}

INLINE void *end_of(const struct __sk_buff *skb)
{
	return LOAD_FIELD(data_end);
}

#endif
