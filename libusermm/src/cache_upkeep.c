/* What is done with a cache beside asking it: taking out, ageing, counting, looking. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "cache.h"
#include "monitor.h"

int usermm_cache_evict(usermm_cache *cache, uint64_t address, uint64_t length) {
    struct um_entry *doomed = NULL;
    um_cache_lock(cache);
    int result = um_cache_refresh(cache, &doomed);
    if (result == 0 && length) {
        result = um_cache_kill_range(cache, address, address + length, &doomed);
    } else if (result == 0) {
        result = (int)cache->index.count;
        um_cache_kill_all(cache, &doomed);
    }
    um_cache_collect_stranded(cache, &doomed);
    um_cache_unlock(cache);
    um_cache_bury(cache, doomed);
    return result;
}

struct usermm_registration *usermm_cache_peek(usermm_cache *cache, uint64_t address, uint64_t length,
                                              uint64_t *ret_serial) {
    um_cache_lock(cache);
    struct um_entry *entry = um_index_find_cover(&cache->index, address, length);
    *ret_serial = entry ? entry->shown.serial : 0;
    um_cache_unlock(cache);
    return entry ? &entry->shown : NULL;
}

void usermm_cache_retire(usermm_cache *cache, struct usermm_registration *registration, uint64_t serial) {
    struct um_entry *entry = um_entry_of(registration), *doomed = NULL;
    um_cache_lock(cache);
    if (entry->state == UM_ENTRY_LISTED && registration->serial == serial && entry->life == um_life() &&
        !um_entry_is_held(entry)) {
        um_region_retire(&entry->region);
        um_cache_kill(cache, entry, &doomed);
        cache->counts.retirements++;
    }
    um_cache_unlock(cache);
    um_cache_bury(cache, doomed);
}

void usermm_cache_touch(usermm_cache *cache, struct usermm_registration *registration, uint64_t serial) {
    struct um_entry *entry = um_entry_of(registration);
    if (__atomic_load_n(&registration->serial, __ATOMIC_RELAXED) == serial)
        atomic_store_explicit(&entry->tick, atomic_load(&cache->tick), memory_order_relaxed);
}

int usermm_cache_expire(usermm_cache *cache, unsigned ages) {
    struct um_entry *doomed = NULL;
    usermm_device *device = atomic_load(&cache->device);
    if (ages > UM_AGES)
        return -EINVAL;
    if (device)
        um_device_rest(device);
    um_cache_lock(cache);
    int result = um_cache_refresh(cache, &doomed);
    if (result == 0 && ages) {
        result = um_cache_expire_before(cache, cache->ages[ages - 1], &doomed);
        memmove(cache->ages + 1, cache->ages, (UM_AGES - 1) * sizeof *cache->ages);
        cache->ages[0] = atomic_load(&cache->tick);
    }
    um_cache_collect_stranded(cache, &doomed);
    um_cache_unlock(cache);
    um_cache_bury(cache, doomed);
    return result;
}

int usermm_cache_fileno(usermm_cache *cache) {
    usermm_device *device = atomic_load(&cache->device);
    return device ? usermm_fileno(device) : -EBADF;
}

static uint64_t count_held(const usermm_cache *cache, enum um_entry_state state, uint64_t *ret_hits) {
    uint64_t held = 0;
    for (struct um_entry *entry = cache->lists[state].first; entry; entry = entry->next_listed) {
        held += um_entry_is_held(entry);
        *ret_hits += atomic_load_explicit(&entry->hits, memory_order_relaxed);
    }
    return held;
}

void usermm_cache_count(usermm_cache *cache, struct usermm_cache_counts *ret_counts) {
    um_cache_lock(cache);
    struct usermm_cache_counts counts = cache->counts;
    counts.registrations = cache->index.count;
    counts.hits = cache->past_hits;
    counts.held = count_held(cache, UM_ENTRY_LISTED, &counts.hits) + count_held(cache, UM_ENTRY_GONE, &counts.hits);
    counts.probes = atomic_load(&cache->probes);
    counts.doubts = atomic_load(&cache->doubts);
    um_cache_unlock(cache);
    *ret_counts = counts;
}

struct visitor {
    void (*visit)(const struct usermm_registration *registration, uint64_t holders, void *context);
    void *context;
};

static void show(struct um_node *node, void *context) {
    const struct visitor *visitor = context;
    struct um_entry *entry = um_entry_of_node(node);
    visitor->visit(&entry->shown, atomic_load(&entry->word) / UM_HOLDER, visitor->context);
}

void usermm_cache_visit(usermm_cache *cache, uint64_t address, uint64_t length,
                        void (*visit)(const struct usermm_registration *registration, uint64_t holders, void *context),
                        void *context) {
    struct visitor visitor = {visit, context};
    um_cache_lock(cache);
    um_tree_visit(cache->index.tree, length ? address : 0, length ? address + length : UINT64_MAX, show, &visitor);
    um_cache_unlock(cache);
}
