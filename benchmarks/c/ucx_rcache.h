/*
 * UCX's registration cache (ucs_rcache of libucs 1.22) over a registrar that registers nothing and counts. The cache is
 * not in UCX's public interface: layouts and calls are those of 1.22 on x86-64, and any other version is refused.
 *
 * UCX never learns by itself that memory went: loading it here patches no libc, and only `ucx_invalidate` tells it.
 */
#ifndef UCX_RCACHE_H
#define UCX_RCACHE_H

#include <stdint.h>

struct ucx_cache;

/* Read-only, and alive until it is put. `handle` numbers the registrations of its cache from 1. */
struct ucx_region {
    uint64_t start, end;
    unsigned char theirs[72];
    uint64_t handle;
};

struct ucx_limits {
    /* 0: no limit; without either UCX keeps no LRU list. Beyond a limit idle regions go, but no get is refused. */
    uint64_t max_regions, max_bytes;
    /* Regions begin and end at multiples of it: a power of two, at least 16. */
    uint64_t alignment;
    /* 1: no lock around the LRU list. That is UCX's default, and a race when two threads use a cache with a limit. */
    uint64_t unlocked;
};

/*
 * NULL, or in one line why not, valid until the next call. `library` is the path of libucs.so, with libucp.so beside
 * it; the first call loads it, for all. One thread at a time.
 */
const char *ucx_open(const char *library, const struct ucx_limits *limits, struct ucx_cache **ret_cache);

/* A region that covers the range: cached, or made now from the range and all that overlap. NULL: no memory. */
const struct ucx_region *ucx_get(struct ucx_cache *cache, uint64_t address, uint64_t length);
void ucx_put(struct ucx_cache *cache, const struct ucx_region *region);

/*
 * The memory is gone: what overlaps leaves the look-up, of every open cache. UCX deregisters idle regions not here but
 * in the next get that misses; `ucx_live` counts them until then.
 */
void ucx_invalidate(struct ucx_cache *cache, uint64_t address, uint64_t length);

uint64_t ucx_registrations(const struct ucx_cache *cache); /* ever made */
uint64_t ucx_live(const struct ucx_cache *cache);          /* made and not yet undone */

/* Every region must have been put. */
void ucx_close(struct ucx_cache *cache);

#endif
