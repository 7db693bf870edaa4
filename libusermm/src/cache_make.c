/* The slow half of get: find, or watch, register, check again, publish. */
#define _GNU_SOURCE
#include <errno.h>

#include "cache.h"
#include "monitor.h"

#define ATTEMPTS 8 /* that the memory may change while it is being registered */

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
static int settle(usermm_cache *cache, struct um_request *request, int result, uint64_t taken_ns) {
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
static bool is_doubtful(const struct um_request *request) {
#ifdef USERMM_WITHOUT_RECHECK
    (void)request;
    return false;
#else
    return request->merged && atomic_load(&um_monitor.notifications) != request->notified;
#endif
}

/* Watch, register, check again, publish. 0: the entry is held for the caller. */
static int complete(usermm_cache *cache, struct um_request *request, bool *ret_by_registrar) {
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
    int result = um_cache_refresh(cache, &doomed); /* what is dead goes before what is old */
    bool evicted = result == 0 && !doomed && um_cache_evict_oldest(cache, &doomed);
    bool gave_up = doomed != NULL;
    cache->counts.evictions += evicted;
    um_cache_unlock(cache);
    um_cache_bury(cache, doomed);
    return gave_up;
}

/* Whether it is worth another try after `result`. */
static bool try_again(usermm_cache *cache, struct um_request *request, int result, bool by_registrar,
                      unsigned *attempts) {
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
                  struct um_entry **ret_entry, bool *ret_made) {
    struct um_request request = {.address = address, .length = length, .watch_flags = watch_flags};
    unsigned attempts = 0;
    for (;;) {
        request.doomed = NULL;
        request.made = usermm_cache_made(cache);
        um_cache_lock(cache);
        int result = um_cache_plan(cache, &request);
        cache->counts.waits += result == UM_WAIT_FIRST;
        um_cache_unlock(cache);
        um_cache_bury(cache, request.doomed);
        if (result == UM_WAIT_FIRST && cache->serialized)
            return -EINPROGRESS;
        if (result == UM_WAIT_FIRST)
            usermm_cache_wait(cache, request.made, -1);
        if (result < 0)
            return result;
        if (result)
            continue;
        bool by_registrar = false;
        request.doomed = NULL;
        if (!request.found)
            result = complete(cache, &request, &by_registrar);
        if (result == 0) {
            *ret_entry = request.entry;
            *ret_made = !request.found;
            return 0;
        }
        if (!try_again(cache, &request, result, by_registrar, &attempts))
            return result;
    }
}
