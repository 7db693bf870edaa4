/* How registrations leave the look-up: memory that went, room that is needed, age; and how they are deregistered. */
#define _GNU_SOURCE
#include <errno.h>

#include "cache.h"
#include "monitor.h"

#define REGIONS_PER_TAKE 64

bool um_cache_is_owner(const usermm_cache *cache) {
    return !cache->registrar.one_thread || pthread_equal(pthread_self(), cache->owner);
}

/* A dead one that nobody holds is buried by who made it so, or waits for the owner. */
void um_cache_doom(usermm_cache *cache, struct um_entry *entry, struct um_entry **doomed) {
    bool mine = um_cache_is_owner(cache);
    entry->stranded = !mine;
    entry->burying = mine;
    entry->worker = pthread_self();
    if (!mine)
        return;
    entry->next = *doomed;
    *doomed = entry;
}

void um_cache_kill(usermm_cache *cache, struct um_entry *entry, struct um_entry **doomed) {
    um_index_remove(&cache->index, entry);
    if (entry->region.by_start.serial) /* only under the cache's lock does it change for a listed one */
        um_region_take(&entry->region);
    um_entry_set_state(cache, entry, UM_ENTRY_GONE);
    if (um_entry_condemn(entry))
        um_cache_doom(cache, entry, doomed);
}

struct collection {
    struct um_entry *first;
    unsigned count;
};

static void collect(struct um_node *node, void *context) {
    struct collection *collection = context;
    struct um_entry *entry = um_entry_of_node(node);
    entry->next = collection->first;
    collection->first = entry;
    collection->count++;
}

int um_cache_kill_range(usermm_cache *cache, uint64_t start, uint64_t end, struct um_entry **doomed) {
    struct collection found = {0};
    um_tree_visit(cache->index.tree, start, end, collect, &found);
    while (found.first) {
        struct um_entry *entry = found.first;
        found.first = entry->next;
        um_cache_kill(cache, entry, doomed);
    }
    return (int)found.count;
}

void um_cache_kill_all(usermm_cache *cache, struct um_entry **doomed) {
    while (cache->lists[UM_ENTRY_LISTED].first)
        um_cache_kill(cache, cache->lists[UM_ENTRY_LISTED].first, doomed);
}

/* Later uses have a later tick than this one. */
uint32_t um_cache_tick(usermm_cache *cache) {
    return atomic_fetch_add(&cache->tick, 1);
}

static bool is_later(uint32_t tick, uint32_t than) {
    return (int32_t)(tick - than) > 0; /* ticks wrap */
}

static uint32_t last_used(const struct um_entry *entry) {
    return atomic_load_explicit(&entry->tick, memory_order_relaxed);
}

/* To the young end of the list. */
static void list_again(usermm_cache *cache, struct um_entry *entry, uint32_t now) {
    entry->listed_tick = now;
    um_entry_set_state(cache, entry, UM_ENTRY_LISTED);
}

/* A clock: in order of listing, but what was asked for since it was listed gets a second round. */
bool um_cache_evict_oldest(usermm_cache *cache, struct um_entry **doomed) {
    struct um_entry *entry;
    uint32_t now = um_cache_tick(cache);
    for (uint64_t steps = 2 * cache->index.count; steps && (entry = cache->lists[UM_ENTRY_LISTED].first); steps--) {
        if (!is_later(last_used(entry), entry->listed_tick) && !um_entry_is_held(entry)) {
            um_cache_kill(cache, entry, doomed);
            return true;
        }
        list_again(cache, entry, now);
    }
    return false;
}

/* Looks at each entry once in `limit`'s time, however often it is called. */
int um_cache_expire_before(usermm_cache *cache, uint32_t limit, struct um_entry **doomed) {
    struct um_entry *entry;
    int count = 0;
    uint32_t now = um_cache_tick(cache);
    while ((entry = cache->lists[UM_ENTRY_LISTED].first) && is_later(limit, entry->listed_tick)) {
        if (is_later(limit, last_used(entry)) && !um_entry_is_held(entry)) {
            um_cache_kill(cache, entry, doomed);
            count++;
        } else {
            list_again(cache, entry, now);
        }
    }
    cache->counts.expirations += (uint64_t)count;
    return count;
}

static void invalidate(usermm_cache *cache, struct um_entry *entry, struct um_entry **doomed) {
    cache->counts.invalidations[entry->region.cause]++;
    entry->hit = true;
    if (entry->state == UM_ENTRY_LISTED)
        um_cache_kill(cache, entry, doomed);
}

/* The generation is read before the regions: what is hit in between moves it again. */
int um_cache_refresh(usermm_cache *cache, struct um_entry **doomed) {
    struct um_region *gone[REGIONS_PER_TAKE];
    uint64_t generation;
    usermm_device *device = atomic_load(&cache->device);
    if (atomic_load(&cache->shut))
        return -EBADF;
    if (cache->life != um_life())
        return um_cache_adopt(cache, doomed);
    if (!device)
        return 0;
    int result = usermm_generation(device, &generation);
    if (result) {
        um_cache_kill_all(cache, doomed);
        return result;
    }
    if (generation == atomic_load_explicit(&cache->seen, memory_order_relaxed))
        return 0;
    for (unsigned count = REGIONS_PER_TAKE; count == REGIONS_PER_TAKE;) {
        count = um_queue_take(device, gone, REGIONS_PER_TAKE);
        for (unsigned i = 0; i < count; i++)
            invalidate(cache, um_entry_of_region(gone[i]), doomed);
    }
    atomic_store(&cache->seen, generation); /* last: who finds it here finds no entry of before */
    return 0;
}

/* The child of the process that registered it has a copy of the memory and of the handle, but no registration. */
static uint64_t give_back(const usermm_cache *cache, const struct um_entry *entry) {
    const struct usermm_registrar *registrar = &cache->registrar;
    uint64_t start = um_now_ns();
    if (entry->life == um_life())
        registrar->deregister_memory(registrar->context, entry->shown.handle);
    else if (registrar->forget_memory)
        registrar->forget_memory(registrar->context, entry->shown.handle);
    return um_now_ns() - start;
}

static void bury_one(usermm_cache *cache, struct um_entry *entry) {
    uint64_t taken_ns = give_back(cache, entry);
    um_cache_lock(cache);
    if (entry->life == cache->life) {
        cache->counts.pinned--;
        cache->counts.pinned_bytes -= entry->shown.length;
        cache->counts.deregistered++;
        cache->counts.deregister_ns += taken_ns;
    }
    um_entry_set_state(cache, entry, UM_ENTRY_FREE);
    um_cache_unlock(cache);
    um_cache_announce(cache);
}

void um_cache_bury(usermm_cache *cache, struct um_entry *doomed) {
    while (doomed) {
        struct um_entry *entry = doomed;
        doomed = entry->next;
        bury_one(cache, entry);
    }
}

void um_cache_collect_stranded(usermm_cache *cache, struct um_entry **doomed) {
    if (!cache->registrar.one_thread || !um_cache_is_owner(cache))
        return;
    for (struct um_entry *entry = cache->lists[UM_ENTRY_GONE].first; entry; entry = entry->next_listed)
        if (entry->stranded)
            um_cache_doom(cache, entry, doomed);
}
