/* The slow half of get: find under the lock, or watch, register, check again, publish. */
#define _GNU_SOURCE
#include <errno.h>

#include "cache.h"
#include "monitor.h"

#define ATTEMPTS 8 /* that the memory may change while it is being registered */

/* What a pass under the lock ends with, beside 0 (there is an entry) and errors. */
enum { BURY_FIRST = 1, WAIT_FIRST };

struct request {
    uint64_t address, length;
    uint64_t start, end; /* to be registered: rounded, and grown where the registrar merges */
    unsigned watch_flags;
    uint64_t merged_start, merged_end;
    bool merged, alone; /* it has grown; it must not, since a union was refused */
    uint64_t notified;  /* the monitor's notifications before the pass in which it grew */
    uint32_t made;      /* when the pass began */
    struct um_entry *entry, *doomed;
};

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
    return WAIT_FIRST;
}

static bool fits(const usermm_cache *cache, uint64_t length) {
    uint64_t longest = cache->registrar.max_length, most = cache->options.max_bytes;
    return (!longest || length <= longest) && (!most || length <= most);
}

static int round_outwards(const usermm_cache *cache, struct request *request) {
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
static void merge(const usermm_cache *cache, struct request *request) {
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
    }
}

/* Whether a registration that another thread has begun, or not yet taken back, decides what can be done here. */
static int look_at_others(const usermm_cache *cache, const struct request *request) {
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

static int absorb(usermm_cache *cache, struct request *request) {
    struct growth within = {.start = request->start, .end = request->end};
    if (cache->registrar.overlap == USERMM_OVERLAP_ALLOWED)
        return 0;
    um_tree_visit(cache->index.tree, request->start, request->end, grow, &within);
    if (within.held && refuses_overlaps(cache))
        return -EADDRINUSE;
    cache->counts.merges += (uint64_t)um_cache_kill_range(cache, request->start, request->end, &request->doomed);
    return 0;
}

static bool is_full(const usermm_cache *cache, const struct request *request) {
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

static int make_room(usermm_cache *cache, struct request *request) {
    while (is_full(cache, request)) {
        if (um_cache_evict_oldest(cache, &request->doomed))
            cache->counts.evictions++;
        else if (request->doomed)
            break;
        else
            return others_are_burying(cache) ? wait_or_refuse(cache) : -EDQUOT;
    }
    return request->doomed ? BURY_FIRST : 0;
}

static void set_range(struct um_entry *entry, uint64_t address, uint64_t length, uint64_t serial) {
    /* Atomic, since a look-up without the lock may still be at the entry's former self. */
    __atomic_store_n(&entry->shown.address, address, __ATOMIC_RELAXED);
    __atomic_store_n(&entry->shown.length, length, __ATOMIC_RELAXED);
    __atomic_store_n(&entry->shown.serial, serial, __ATOMIC_RELAXED);
    entry->region = (struct um_region){.by_start = {.key = address, .end = address + length}};
}

static int begin(usermm_cache *cache, struct request *request) {
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

/* One pass under the lock: an entry that is there, or a new one to be completed, or what has to happen first. */
static int find_or_begin(usermm_cache *cache, struct request *request) {
    if (!request->merged)
        request->notified = atomic_load(&um_monitor.notifications);
    int result = um_cache_refresh(cache, &request->doomed);
    if (result)
        return result;
    request->entry = um_index_find_cover(&cache->index, request->address, request->length);
    if (request->entry) {
        um_entry_hold(cache, request->entry);
        um_entry_touch(cache, request->entry);
        return 0;
    }
    if (!um_cache_is_owner(cache))
        return -EXDEV;
    um_cache_collect_stranded(cache, &request->doomed);
    if (request->doomed)
        return BURY_FIRST;
    result = round_outwards(cache, request);
    if (result == 0 && cache->registrar.overlap != USERMM_OVERLAP_ALLOWED)
        merge(cache, request);
    if (result == 0)
        result = look_at_others(cache, request);
    if (result == 0)
        result = absorb(cache, request);
    if (result == 0)
        result = make_room(cache, request);
    return result ? result : begin(cache, request);
}

static int hand_to_device(usermm_cache *cache, struct um_entry *entry, uint64_t *ret_taken_ns) {
    uint64_t start = um_now_ns();
    int result = cache->registrar.register_memory(cache->registrar.context, entry->shown.address, entry->shown.length,
                                                  &entry->shown.handle);
    *ret_taken_ns = um_now_ns() - start;
    return result;
}

static void publish(usermm_cache *cache, struct um_entry *entry) {
    entry->listed_tick = um_cache_tick(cache);
    atomic_store(&entry->tick, entry->listed_tick);
    um_entry_set_state(cache, entry, UM_ENTRY_LISTED);
    atomic_store_explicit(&entry->word, UM_HOLDER, memory_order_release);
    um_index_add(&cache->index, entry);
}

/* Nothing was registered: as if it had never begun. */
static void withdraw(usermm_cache *cache, struct um_entry *entry) {
    um_region_take(&entry->region);
    if (entry->life == cache->life) {
        cache->counts.pinned--;
        cache->counts.pinned_bytes -= entry->shown.length;
    }
    atomic_store(&entry->word, UM_DEAD);
    um_entry_set_state(cache, entry, UM_ENTRY_FREE);
}

/* Whether the memory changed while it was being registered: then the device may have pages of before. */
static bool changed_meanwhile(const struct um_entry *entry) {
#ifdef USERMM_WITHOUT_RECHECK
    (void)entry;
    return false;
#else
    return entry->hit;
#endif
}

/* What the device said, and whether the memory is still the same: listed, or gone and held by us, or withdrawn. */
static int settle(usermm_cache *cache, struct request *request, int result, uint64_t taken_ns) {
    struct um_entry *entry = request->entry;
    int state = um_cache_refresh(cache, &request->doomed);
    bool listed = result == 0 && state == 0 && !changed_meanwhile(entry) && atomic_load(&cache->device);
    cache->counts.register_ns += taken_ns;
    cache->counts.registered += result == 0;
    if (result)
        withdraw(cache, entry);
    else if (listed)
        publish(cache, entry);
    else
        um_entry_set_state(cache, entry, UM_ENTRY_GONE);
    cache->counts.misses += result == 0 && state == 0 && !changed_meanwhile(entry);
    cache->counts.retries += result == 0 && changed_meanwhile(entry);
    return result ? result : state ? state : changed_meanwhile(entry) ? -EAGAIN : 0;
}

/*
 * A union is of memory that others own, too, and may be discarding: madvise reports before the pages go, so it is their
 * event that tells, and what came between taking the old regions off and putting the union's on hit neither.
 */
static bool is_doubtful(const struct request *request) {
#ifdef USERMM_WITHOUT_RECHECK
    (void)request;
    return false;
#else
    return request->merged && atomic_load(&um_monitor.notifications) != request->notified;
#endif
}

/* Watch, register, check again, publish. 0: the entry is held for the caller. */
static int complete(usermm_cache *cache, struct request *request, bool *ret_by_registrar) {
    struct um_entry *entry = request->entry;
    uint64_t taken_ns = 0;
    usermm_device *device = entry->region.device;
    int result = device ? um_region_add(device, &entry->region, request->watch_flags) : 0;
    if (result == 0 && is_doubtful(request)) {
        request->alone = true;
        result = -EAGAIN;
    }
    *ret_by_registrar = result == 0;
    if (result == 0)
        result = hand_to_device(cache, entry, &taken_ns);
    int failed = result;
    um_cache_lock(cache);
    cache->counts.register_failures += *ret_by_registrar && failed;
    result = settle(cache, request, result, taken_ns);
    um_cache_unlock(cache);
    um_cache_announce(cache);
    um_cache_bury(cache, request->doomed);
    if (failed == 0 && result) {
        um_region_take(&entry->region);
        usermm_cache_release(cache, &entry->shown);
    }
    return result;
}

/* The device wants no more: what was used longest ago goes, and it is asked again. */
static bool make_room_at_device(usermm_cache *cache) {
    struct um_entry *doomed = NULL;
    um_cache_lock(cache);
    bool evicted = um_cache_evict_oldest(cache, &doomed);
    cache->counts.evictions += evicted;
    um_cache_unlock(cache);
    um_cache_bury(cache, doomed);
    return evicted;
}

/* Whether it is worth another try after `result`. */
static bool try_again(usermm_cache *cache, struct request *request, int result, bool by_registrar, unsigned *attempts) {
    bool merged = request->merged;
    request->merged = false; /* what changed meanwhile is in no union any more */
    if (result == -EAGAIN)
        return ++*attempts < ATTEMPTS;
    if (by_registrar && (result == -ENOMEM || result == -ENOSPC))
        return make_room_at_device(cache);
    if (!merged || result == -EINTR)
        return false;
    request->alone = true; /* a part of the union may have changed its kind */
    return true;
}

int um_cache_make(usermm_cache *cache, uint64_t address, uint64_t length, unsigned watch_flags,
                  struct um_entry **ret_entry) {
    struct request request = {.address = address, .length = length, .watch_flags = watch_flags};
    unsigned attempts = 0;
    for (;;) {
        request.doomed = NULL;
        request.made = usermm_cache_made(cache);
        um_cache_lock(cache);
        int result = find_or_begin(cache, &request);
        cache->counts.waits += result == WAIT_FIRST;
        um_cache_unlock(cache);
        um_cache_bury(cache, request.doomed);
        if (result == WAIT_FIRST && cache->serialized)
            return -EINPROGRESS;
        if (result == WAIT_FIRST)
            usermm_cache_wait(cache, request.made, -1);
        if (result < 0)
            return result;
        if (result)
            continue;
        bool by_registrar = false;
        request.doomed = NULL;
        if (request.entry->state == UM_ENTRY_MAKING)
            result = complete(cache, &request, &by_registrar);
        if (result == 0) {
            *ret_entry = request.entry;
            return 0;
        }
        if (!try_again(cache, &request, result, by_registrar, &attempts))
            return result;
    }
}
