/* The cache's lock, which survives a fork, and waiting for what another thread is making. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <time.h>

#include "cache.h"
#include "monitor.h"
#include "sys.h"

#define BEING_RENEWED UINT64_MAX

/* In a forked child the mutex is in whatever state the parent's threads left it; the first to come makes a new one. */
static void renew(usermm_cache *cache, uint64_t life) {
    uint64_t found = atomic_load(&cache->lock_life);
    while (found != life) {
        if (found != BEING_RENEWED && atomic_compare_exchange_strong(&cache->lock_life, &found, BEING_RENEWED)) {
            cache->mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
            atomic_store(&cache->lock_life, life);
        }
        found = atomic_load(&cache->lock_life);
    }
}

void um_cache_lock(usermm_cache *cache) {
    if (cache->serialized)
        return;
    uint64_t life = um_life();
    if (atomic_load_explicit(&cache->lock_life, memory_order_acquire) != life)
        renew(cache, life);
    pthread_mutex_lock(&cache->mutex);
}

void um_cache_unlock(usermm_cache *cache) {
    if (!cache->serialized)
        pthread_mutex_unlock(&cache->mutex);
}

void um_cache_announce(usermm_cache *cache) {
    atomic_fetch_add(&cache->made, 1);
    if (atomic_load(&cache->waiters))
        syscall(SYS_futex, &cache->made, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

int usermm_cache_wait(usermm_cache *cache, uint32_t seen, int timeout_ms) {
    struct timespec limit = {timeout_ms / 1000, (timeout_ms % 1000) * 1000000L};
    atomic_fetch_add(&cache->waiters, 1);
    if (atomic_load(&cache->made) == seen)
        syscall(SYS_futex, &cache->made, FUTEX_WAIT_PRIVATE, seen, timeout_ms < 0 ? NULL : &limit, NULL, 0);
    atomic_fetch_sub(&cache->waiters, 1);
    return atomic_load(&cache->made) != seen;
}

uint32_t usermm_cache_made(usermm_cache *cache) {
    return atomic_load(&cache->made);
}
