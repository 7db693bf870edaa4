/* A forked child finds the parent's cache in its memory, and begins one of its own. */
#define _GNU_SOURCE
#include <fcntl.h>

#include "cache.h"
#include "monitor.h"

/*
 * In the child: what nobody holds is forgotten at once, the rest when it is let go. The regions are in the parent's
 * tree. What another thread of the parent was about to bury is nobody's here; what this one is burying it will finish.
 */
static void disown(usermm_cache *cache, struct um_entry *entry, struct um_entry **doomed) {
    bool mine = entry->burying && pthread_equal(entry->worker, pthread_self());
    entry->region.by_start.serial = 0;
    entry->hit = true;
    atomic_store(&entry->hits, 0);
    if (entry->state == UM_ENTRY_LISTED) {
        um_cache_kill(cache, entry, doomed);
    } else if (entry->state == UM_ENTRY_GONE && !um_entry_is_held(entry) && !mine) {
        um_cache_doom(cache, entry, doomed);
    }
}

static void disown_all(usermm_cache *cache, enum um_entry_state state, struct um_entry **doomed) {
    struct um_entry *next;
    for (struct um_entry *entry = cache->lists[state].first; entry; entry = next) {
        next = entry->next_listed;
        disown(cache, entry, doomed);
    }
}

void um_cache_disown(usermm_cache *cache, struct um_entry **doomed) {
    disown_all(cache, UM_ENTRY_GONE, doomed);
    disown_all(cache, UM_ENTRY_MAKING, doomed);
    disown_all(cache, UM_ENTRY_LISTED, doomed);
}

int um_cache_adopt(usermm_cache *cache, struct um_entry **doomed) {
    usermm_device *inherited = atomic_load(&cache->device), *device = NULL;
    if (inherited) {
        int result = usermm_open(USERMM_ABI_UMMUNOTIFY, O_RDONLY, &device);
        if (result)
            return result;
        um_device_coalesce(device);
    }
    cache->owner = pthread_self();
    um_cache_disown(cache, doomed);
    cache->counts = (struct usermm_cache_counts){0};
    atomic_store(&cache->probes, 0);
    atomic_store(&cache->doubts, 0);
    cache->past_hits = 0;
    cache->life = um_life();
    atomic_store(&cache->seen, 0);
    atomic_store(&cache->device, device);
    if (inherited)
        usermm_shutdown(inherited); /* not freed: another thread may be looking at it */
    return 0;
}
