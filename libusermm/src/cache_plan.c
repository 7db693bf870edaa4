/* What one pass under the lock decides: the registration is there, or can be begun, or something else comes first. */
#define _GNU_SOURCE
#include <errno.h>

#include "cache.h"
#include "monitor.h"

static bool is_mine(const struct um_entry *entry) {
    return pthread_equal(entry->worker, pthread_self());
}

static bool refuses_overlaps(const usermm_cache *cache) {
    return cache->registrar.overlap == USERMM_OVERLAP_REFUSED;
}

/* A callback of the registrar that waits for other callbacks could wait for itself. */
static int wait_or_refuse(const usermm_cache *cache) {
    for (const struct um_entry *entry = cache->lists[UM_ENTRY_MAKING].first; entry; entry = entry->next_listed)
        if (is_mine(entry))
            return -EDEADLK;
    for (struct um_entry *entry = cache->lists[UM_ENTRY_GONE].first; entry; entry = entry->next_listed)
        if (is_mine(entry) && entry->burying)
            return -EDEADLK;
    return UM_WAIT_FIRST;
}

static bool fits(const usermm_cache *cache, uint64_t length) {
    uint64_t longest = cache->registrar.max_length, most = cache->options.max_bytes;
    return (!longest || length <= longest) && (!most || length <= most);
}

static int round_outwards(const usermm_cache *cache, struct um_request *request) {
    uint64_t mask = cache->registrar.granularity - 1;
    request->start = request->address & ~mask;
    request->end = (request->address + request->length + mask) & ~mask;
    if (fits(cache, request->end - request->start))
        return 0;
    uint64_t longest = cache->registrar.max_length;
    return longest && request->end - request->start > longest ? -EINVAL : -EDQUOT;
}

struct growth {
    uint64_t start, end;
    bool held, skips_held;
};

/* A device that refuses overlaps keeps what is held as it is. */
static void grow(struct um_node *node, void *context) {
    struct growth *growth = context;
    bool held = um_entry_is_held(um_entry_of_node(node));
    growth->held |= held;
    if (held && growth->skips_held)
        return;
    growth->start = node->key < growth->start ? node->key : growth->start;
    growth->end = node->end > growth->end ? node->end : growth->end;
}

/* To the union with all that overlap it, and what overlaps the union then; it stays as it is where that is too long. */
static void merge(const usermm_cache *cache, struct um_request *request) {
    uint64_t margin = cache->registrar.merge_adjacent ? 1 : 0, before;
    struct growth growth = {.start = request->start, .end = request->end, .skips_held = refuses_overlaps(cache)};
    if (request->alone)
        return;
    if (request->merged) { /* what an earlier pass has taken out is to be covered, too */
        growth.start = request->merged_start;
        growth.end = request->merged_end;
    }
    do {
        before = growth.end - growth.start;
        um_tree_visit(cache->index.tree, growth.start - margin, growth.end + margin, grow, &growth);
    } while (growth.end - growth.start != before);
    if (fits(cache, growth.end - growth.start)) {
        request->merged = growth.end - growth.start != request->end - request->start;
        request->start = request->merged_start = growth.start;
        request->end = request->merged_end = growth.end;
    } else {
        request->merged = false;
        request->alone = true; /* without its parts there would be another union in the next pass */
    }
}

/* Whether a registration that another thread has begun, or not yet taken back, decides what can be done here. */
static int look_at_others(const usermm_cache *cache, const struct um_request *request) {
    bool exclusive = cache->registrar.overlap != USERMM_OVERLAP_ALLOWED, cached = atomic_load(&cache->device) != NULL;
    uint64_t end = request->address + request->length;
    for (const struct um_entry *entry = cache->lists[UM_ENTRY_MAKING].first; entry; entry = entry->next_listed) {
        bool covers = entry->shown.address <= request->address && um_entry_end(entry) >= end;
        bool decides = (covers && cached) || (exclusive && um_entry_overlaps(entry, request->start, request->end));
        if (decides && entry->life == cache->life)
            return is_mine(entry) ? -EDEADLK : wait_or_refuse(cache);
    }
    if (!refuses_overlaps(cache))
        return 0;
    for (struct um_entry *entry = cache->lists[UM_ENTRY_GONE].first; entry; entry = entry->next_listed)
        if (entry->life == cache->life && um_entry_overlaps(entry, request->start, request->end))
            return um_entry_is_held(entry) || entry->stranded ? -EADDRINUSE : wait_or_refuse(cache);
    return 0;
}

static int absorb(usermm_cache *cache, struct um_request *request) {
    struct growth within = {.start = request->start, .end = request->end};
    if (cache->registrar.overlap == USERMM_OVERLAP_ALLOWED)
        return 0;
    um_tree_visit(cache->index.tree, request->start, request->end, grow, &within);
    if (within.held && refuses_overlaps(cache))
        return -EADDRINUSE;
    cache->counts.merges += (uint64_t)um_cache_kill_range(cache, request->start, request->end, &request->doomed);
    return 0;
}

static bool is_full(const usermm_cache *cache, const struct um_request *request) {
    uint64_t count = cache->counts.pinned + 1, bytes = cache->counts.pinned_bytes + (request->end - request->start);
    for (const struct um_entry *entry = request->doomed; entry; entry = entry->next) {
        count--;
        bytes -= entry->shown.length;
    }
    const struct usermm_cache_options *most = &cache->options;
    return (most->max_count && count > most->max_count) || (most->max_bytes && bytes > most->max_bytes);
}

static bool others_are_burying(const usermm_cache *cache) {
    for (struct um_entry *entry = cache->lists[UM_ENTRY_GONE].first; entry; entry = entry->next_listed)
        if (!um_entry_is_held(entry) && !entry->stranded)
            return true;
    return false;
}

static int make_room(usermm_cache *cache, struct um_request *request) {
    while (is_full(cache, request)) {
        if (um_cache_evict_oldest(cache, &request->doomed))
            cache->counts.evictions++;
        else if (request->doomed)
            break;
        else
            return others_are_burying(cache) ? wait_or_refuse(cache) : -EDQUOT;
    }
    return request->doomed ? UM_BURY_FIRST : 0;
}

/* Before others are given up for it: memory that will be refused is worth none of them. */
static int look_at_memory(const usermm_cache *cache, const struct um_request *request) {
    bool gives_way = cache->registrar.overlap != USERMM_OVERLAP_ALLOWED;
    bool costs =
        is_full(cache, request) || (gives_way && um_tree_overlaps(cache->index.tree, request->start, request->end));
    return costs && atomic_load(&cache->device)
               ? um_refuse(request->address, request->address + request->length, request->watch_flags)
               : 0;
}

static void set_range(struct um_entry *entry, uint64_t address, uint64_t length, uint64_t serial) {
    /* Atomic, since a look-up without the lock may still be at the entry's former self. */
    __atomic_store_n(&entry->shown.address, address, __ATOMIC_RELAXED);
    __atomic_store_n(&entry->shown.length, length, __ATOMIC_RELAXED);
    __atomic_store_n(&entry->shown.serial, serial, __ATOMIC_RELAXED);
    entry->region = (struct um_region){.by_start = {.key = address, .end = address + length}};
}

static int begin(usermm_cache *cache, struct um_request *request) {
    uint64_t makers = 1;
    for (const struct um_entry *entry = cache->lists[UM_ENTRY_MAKING].first; entry; entry = entry->next_listed)
        makers++;
    if (um_index_reserve(&cache->index, makers) || !(request->entry = um_entry_new(cache)))
        return -ENOMEM;
    uint64_t length = request->end - request->start;
    set_range(request->entry, request->start, length, ++cache->next_serial);
    request->entry->region.device = atomic_load(&cache->device);
    cache->counts.pinned++;
    cache->counts.pinned_bytes += length;
    if (cache->counts.pinned_bytes > cache->counts.pinned_bytes_max)
        cache->counts.pinned_bytes_max = cache->counts.pinned_bytes;
    return 0;
}

int um_cache_plan(usermm_cache *cache, struct um_request *request) {
    if (!request->merged)
        request->notified = atomic_load(&um_monitor.notifications);
    int result = um_cache_refresh(cache, &request->doomed);
    if (result)
        return result;
    request->entry = um_index_find_cover(&cache->index, request->address, request->length);
    request->found = request->entry != NULL;
    if (request->found) {
        um_entry_hold(cache, request->entry);
        um_entry_touch(cache, request->entry);
        return 0;
    }
    if (!um_cache_is_owner(cache))
        return -EXDEV;
    um_cache_collect_stranded(cache, &request->doomed);
    if (request->doomed)
        return UM_BURY_FIRST;
    result = round_outwards(cache, request);
    if (result == 0 && cache->registrar.overlap != USERMM_OVERLAP_ALLOWED)
        merge(cache, request);
    if (result == 0)
        result = look_at_others(cache, request);
    if (result == 0)
        result = look_at_memory(cache, request);
    if (result == 0)
        result = absorb(cache, request);
    if (result == 0)
        result = make_room(cache, request);
    if (request->merged && (result == -EADDRINUSE || result == -EDQUOT)) { /* the range itself may be in nobody's way */
        request->merged = false;
        request->alone = true;
        return UM_BURY_FIRST;
    }
    return result ? result : begin(cache, request);
}
