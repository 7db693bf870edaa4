/* One registration: who holds it, which list it is in, and where the memory for it comes from. */
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>

#include "cache.h"
#include "monitor.h"
#include "sys.h"

/* Slabs double up to the size of a huge page: with many registrations, random look-ups miss the TLB otherwise. */
#define FIRST_SLAB_BYTES 16384u
#define HUGE_PAGE_BYTES (2u << 20)

struct um_slab {
    struct um_slab *next;
    size_t bytes;
    struct um_entry entries[];
};

/*
 * Holding is a compare-and-swap and not an addition: a dead word never gains a holder, so exactly one thread sees it
 * reach "dead, nobody" and buries the entry. A serialized cache has one caller at a time and needs no atomic change.
 */
bool um_entry_hold(const usermm_cache *cache, struct um_entry *entry) {
    uint64_t word = atomic_load_explicit(&entry->word, memory_order_acquire);
    if (cache->serialized && !(word & UM_DEAD))
        atomic_store_explicit(&entry->word, word + UM_HOLDER, memory_order_relaxed);
    else
        while (!(word & UM_DEAD) && !atomic_compare_exchange_weak(&entry->word, &word, word + UM_HOLDER))
            ;
    return !(word & UM_DEAD);
}

bool um_entry_let_go(const usermm_cache *cache, struct um_entry *entry) {
    uint64_t before;
    if (cache->serialized) {
        before = atomic_load_explicit(&entry->word, memory_order_relaxed);
        atomic_store_explicit(&entry->word, before - UM_HOLDER, memory_order_relaxed);
    } else {
        before = atomic_fetch_sub(&entry->word, UM_HOLDER);
    }
    return before == (UM_DEAD | UM_HOLDER);
}

bool um_entry_condemn(struct um_entry *entry) {
    return atomic_fetch_or(&entry->word, UM_DEAD) == 0;
}

static void unlink_entry(struct um_entry_list *list, struct um_entry *entry) {
    *(entry->previous_listed ? &entry->previous_listed->next_listed : &list->first) = entry->next_listed;
    *(entry->next_listed ? &entry->next_listed->previous_listed : &list->last) = entry->previous_listed;
}

static void append_entry(struct um_entry_list *list, struct um_entry *entry) {
    entry->next_listed = NULL;
    entry->previous_listed = list->last;
    *(list->last ? &list->last->next_listed : &list->first) = entry;
    list->last = entry;
}

void um_entry_set_state(usermm_cache *cache, struct um_entry *entry, enum um_entry_state state) {
    if (entry->state != UM_ENTRY_FREE)
        unlink_entry(&cache->lists[entry->state], entry);
    entry->state = state;
    if (state != UM_ENTRY_FREE) {
        append_entry(&cache->lists[state], entry);
        return;
    }
    cache->past_hits += atomic_exchange(&entry->hits, 0);
    entry->next = cache->free;
    cache->free = entry;
}

static bool add_slab(usermm_cache *cache) {
    size_t bytes = cache->slabs ? 2 * cache->slabs->bytes : FIRST_SLAB_BYTES;
    if (bytes > HUGE_PAGE_BYTES)
        bytes = HUGE_PAGE_BYTES;
    struct um_slab *slab = um_fault("malloc") ? NULL : aligned_alloc(bytes, bytes);
    if (!slab)
        return false;
    if (bytes == HUGE_PAGE_BYTES)
        madvise(slab, bytes, MADV_HUGEPAGE); /* where there are none, small ones do */
    memset(slab, 0, sizeof *slab);
    slab->bytes = bytes;
    slab->next = cache->slabs;
    cache->slabs = slab;
    for (size_t i = 0; i < (bytes - sizeof *slab) / sizeof *slab->entries; i++) {
        memset(&slab->entries[i], 0, sizeof slab->entries[i]);
        atomic_init(&slab->entries[i].word, UM_DEAD);
        slab->entries[i].next = cache->free;
        cache->free = &slab->entries[i];
    }
    return true;
}

/* Dead and held once: by its maker. */
struct um_entry *um_entry_new(usermm_cache *cache) {
    if (!cache->free && !add_slab(cache))
        return NULL;
    struct um_entry *entry = cache->free;
    cache->free = entry->next;
    entry->next = NULL;
    entry->hit = entry->stranded = entry->burying = false;
    atomic_store_explicit(&entry->word, UM_DEAD | UM_HOLDER, memory_order_relaxed);
    entry->life = cache->life;
    entry->worker = pthread_self();
    um_entry_set_state(cache, entry, UM_ENTRY_MAKING);
    return entry;
}

void um_entry_free_all(usermm_cache *cache) {
    while (cache->slabs) {
        struct um_slab *slab = cache->slabs;
        cache->slabs = slab->next;
        free(slab);
    }
}
