/* Opening and closing a registration cache, and the fast half of get. */
#define _GNU_SOURCE
#include "cache.h"

#include <errno.h>
#include <fcntl.h>
#include <time.h>

#include "monitor.h"
#include "sys.h"

#define PROBE_WAIT_NS 100000000 /* a doubt costs the caller a registration */

static bool is_power_of_two_up_to_a_page(uint64_t number) {
    return number && number <= 4096 && !(number & (number - 1));
}

static int open_device(usermm_cache *cache) {
    usermm_device *device;
    if (cache->options.flags & USERMM_CACHE_UNCACHED)
        return um_prepare(); /* a forked child has to be told apart all the same */
    int result = usermm_open(USERMM_ABI_UMMUNOTIFY, O_RDONLY, &device);
    if (result)
        return result;
    um_device_coalesce(device);
    atomic_store(&cache->device, device);
    return 0;
}

int usermm_cache_open(const struct usermm_registrar *registrar, const struct usermm_cache_options *options,
                      usermm_cache **ret_cache) {
    if (!is_power_of_two_up_to_a_page(registrar->granularity) || (unsigned)registrar->overlap > USERMM_OVERLAP_REFUSED)
        return -EINVAL;
    usermm_cache *cache = um_sys_alloc(sizeof *cache);
    if (!cache)
        return -ENOMEM;
    cache->registrar = *registrar;
    cache->options = *options;
    cache->serialized = options->flags & USERMM_CACHE_SERIALIZED;
    cache->mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    int result = um_index_reserve(&cache->index, 1);
    if (result == 0)
        result = open_device(cache);
    if (result) {
        um_index_free(&cache->index);
        free(cache);
        return result;
    }
    cache->owner = pthread_self();
    cache->life = um_life();
    atomic_store(&cache->lock_life, cache->life);
    *ret_cache = cache;
    return 0;
}

void usermm_cache_bind(usermm_cache *cache, void *context) {
    cache->registrar.context = context;
}

void usermm_cache_shutdown(usermm_cache *cache) {
    struct um_entry *doomed = NULL;
    um_cache_lock(cache);
    usermm_device *device = atomic_load(&cache->device);
    if (!atomic_load(&cache->shut) && cache->life != um_life())
        um_cache_disown(cache, &doomed);
    atomic_store(&cache->shut, true);
    um_cache_kill_all(cache, &doomed);
    um_cache_collect_stranded(cache, &doomed);
    um_cache_unlock(cache);
    um_cache_announce(cache);
    um_cache_bury(cache, doomed);
    if (device)
        usermm_shutdown(device);
}

static int forget_stranded(const usermm_cache *cache) {
    int count = 0;
    for (const struct um_entry *entry = cache->lists[UM_ENTRY_GONE].first; entry; entry = entry->next_listed) {
        count += entry->stranded;
        if (entry->stranded && cache->registrar.forget_memory)
            cache->registrar.forget_memory(cache->registrar.context, entry->shown.handle);
    }
    return count;
}

int usermm_cache_close(usermm_cache *cache) {
    usermm_cache_shutdown(cache);
    int stranded = forget_stranded(cache);
    usermm_device *device = atomic_load(&cache->device);
    if (device)
        usermm_close(device);
    um_index_free(&cache->index);
    um_entry_free_all(cache);
    free(cache);
    return stranded;
}

/* Nothing has been seen that was not applied: every call that has returned is counted, as in usermm_generation. */
static bool is_current(const usermm_cache *cache) {
    uint64_t generation;
    usermm_device *device = atomic_load_explicit(&cache->device, memory_order_acquire);
    return device && usermm_generation(device, &generation) == 0 &&
           generation == atomic_load_explicit(&cache->seen, memory_order_acquire);
}

/* The entry was found without the lock: it may be another registration by now, which the holder can tell. */
static struct um_entry *find_quickly(usermm_cache *cache, uint64_t address, uint64_t length) {
    struct um_entry *entry = is_current(cache) ? um_index_find_start(&cache->index, address, length) : NULL;
    if (!entry || !um_entry_hold(cache, entry))
        return NULL;
    if (entry->shown.address == address && entry->shown.length >= length)
        return entry;
    usermm_cache_release(cache, &entry->shown);
    return NULL;
}

/* For statistics: two threads at once may count as one. */
static void count_one(_Atomic uint64_t *counter) {
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + 1, memory_order_relaxed);
}

int usermm_cache_probe(usermm_cache *cache, enum usermm_probe probe) {
    usermm_device *device = atomic_load(&cache->device);
    if (!device || probe == USERMM_PROBE_NONE)
        return 0;
    int busy = um_quiesce(device, NULL, probe == USERMM_PROBE_TRY ? 0 : PROBE_WAIT_NS);
    count_one(&cache->probes);
    if (busy == 1)
        count_one(&cache->doubts);
    return busy == -ECHILD ? 0 : busy; /* in a forked child there is nothing yet that could be stale */
}

int usermm_cache_find_or_make(usermm_cache *cache, uint64_t address, uint64_t length, unsigned watch_flags,
                              struct usermm_registration **ret_registration, bool *ret_made) {
    if (length == 0 || address + length < address || address + length > UINT64_MAX / 2)
        return -EINVAL;
    struct um_entry *entry = find_quickly(cache, address, length);
    *ret_made = false;
    if (entry)
        um_entry_touch(cache, entry);
    int result = entry ? 0 : um_cache_make(cache, address, length, watch_flags, &entry, ret_made);
    if (result == 0)
        *ret_registration = &entry->shown;
    return result;
}

int usermm_cache_get(usermm_cache *cache, uint64_t address, uint64_t length, enum usermm_probe probe,
                     unsigned watch_flags, struct usermm_registration **ret_registration) {
    bool made;
    int busy = usermm_cache_probe(cache, probe);
    if (busy < 0)
        return busy;
    if (busy && length)
        usermm_cache_evict(cache, address, length);
    return usermm_cache_find_or_make(cache, address, length, watch_flags, ret_registration, &made);
}

bool usermm_cache_again(usermm_cache *cache, struct usermm_registration *registration, uint64_t serial) {
    struct um_entry *entry = um_entry_of(registration);
    if (!is_current(cache) || !um_entry_hold(cache, entry))
        return false;
    if (registration->serial == serial) {
        um_entry_touch(cache, entry);
        return true;
    }
    usermm_cache_release(cache, registration);
    return false;
}

static void give_up(usermm_cache *cache, struct um_entry *entry) {
    struct um_entry *doomed = NULL;
    um_cache_lock(cache);
    um_cache_doom(cache, entry, &doomed);
    um_cache_unlock(cache);
    um_cache_bury(cache, doomed);
}

void usermm_cache_release(usermm_cache *cache, struct usermm_registration *registration) {
    struct um_entry *entry = um_entry_of(registration);
    if (um_entry_let_go(cache, entry))
        give_up(cache, entry);
}

int usermm_cache_refresh(usermm_cache *cache) {
    struct um_entry *doomed = NULL;
    if (is_current(cache))
        return 0;
    um_cache_lock(cache);
    int result = um_cache_refresh(cache, &doomed);
    um_cache_unlock(cache);
    um_cache_bury(cache, doomed);
    return result;
}

int usermm_cache_valid(usermm_cache *cache, const struct usermm_registration *registration) {
    return usermm_cache_refresh(cache) == 0 && !(atomic_load(&um_entry_of(registration)->word) & UM_DEAD);
}
