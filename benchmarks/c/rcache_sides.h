/* The two caches behind the same calls, over registrars that do nothing. For rcache.c alone. */
#ifndef RCACHE_SIDES_H
#define RCACHE_SIDES_H

#include <stdbool.h>

#include "bench.h"

#include "rcache_memory.h"
#include "ucx_rcache.h"
#include "usermm_cache.h"

enum side { USERMM, UCX };

static struct ucx_cache *ucx;
static usermm_cache *usermm;
static uint64_t usermm_registrations;

static inline int register_nothing(void *context, uint64_t address, uint64_t length, uint64_t *ret_handle) {
    (void)context, (void)address, (void)length;
    *ret_handle = __atomic_add_fetch(&usermm_registrations, 1, __ATOMIC_RELAXED);
    return 0;
}

static inline void deregister_nothing(void *context, uint64_t handle) {
    (void)context, (void)handle;
}

static inline void open_usermm(void) {
    const struct usermm_registrar registrar = {.register_memory = register_nothing,
                                               .deregister_memory = deregister_nothing,
                                               .overlap = USERMM_OVERLAP_MERGED,
                                               .granularity = PAGE_BYTES};
    const struct usermm_cache_options options = {0};
    need(usermm_cache_open(&registrar, &options, &usermm) == 0, "usermm_cache_open");
}

static inline void open_ucx(const char *library) {
    bool limited = strncmp(library, "lru:", 4) == 0;
    const struct ucx_limits limits = {.max_regions = limited ? UINT64_MAX / 2 : 0, .alignment = PAGE_BYTES};
    const char *problem = ucx_open(library + (limited ? 4 : 0), &limits, &ucx);
    if (problem)
        fprintf(stderr, "benchmarks: %s\n", problem);
    need(problem == NULL, "ucx_open");
}

/* `side` is a constant wherever it is used: what is timed does not choose. */
static inline __attribute__((always_inline)) void get_and_release(enum side side, const char *start) {
    uint64_t address = (uint64_t)(uintptr_t)start;
    if (side == UCX) {
        const struct ucx_region *region = ucx_get(ucx, address, REGION_BYTES);
        need(region != NULL, "ucx_get");
        ucx_put(ucx, region);
    }
    if (side == USERMM) {
        struct usermm_registration *registration;
        need(usermm_cache_get(usermm, address, REGION_BYTES, USERMM_PROBE_NONE, 0, &registration) == 0,
             "usermm_cache_get");
        usermm_cache_release(usermm, registration);
    }
}

static inline void forget(enum side side, const char *start, size_t bytes) {
    uint64_t address = (uint64_t)(uintptr_t)start;
    if (side == UCX)
        ucx_invalidate(ucx, address, bytes);
    if (side == USERMM)
        usermm_cache_evict(usermm, address, bytes);
}

/* Ever made. */
static inline uint64_t registrations(enum side side) {
    return side == UCX ? ucx_registrations(ucx) : usermm_registrations;
}

#endif
