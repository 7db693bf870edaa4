/* The registration cache's inside. Its protocol is in ARCHITECTURE.md and docs/models/hold.pml. */
#ifndef UM_CACHE_H
#define UM_CACHE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "device.h"
#include "tree.h"
#include "usermm_cache.h"

#define UM_DEAD 1u   /* in the word: out of the look-up; whoever lets the last holder go deregisters */
#define UM_AGES 8u   /* how many expirations a cache remembers */
#define UM_HOLDER 2u /* what one holder adds to the word */

enum um_entry_state {
    UM_ENTRY_FREE,
    UM_ENTRY_MAKING, /* a thread is registering it */
    UM_ENTRY_LISTED, /* can be found */
    UM_ENTRY_GONE,   /* cannot, but is still registered: it is held, or a thread is deregistering it */
};

struct um_entry_list {
    struct um_entry *first, *last;
};

/* The first cache line is all that a hit touches. Entries are never freed before the cache, so a stale pointer to one
 * can be followed: it finds a dead word, or another range. */
struct um_entry {
    struct usermm_registration shown;
    _Atomic uint64_t word; /* holders and UM_DEAD */
    _Atomic uint64_t hits;
    _Atomic uint32_t tick; /* the cache's time when it was last asked for */
    uint32_t listed_tick;  /* the same when it was put at the young end of the list */
    enum um_entry_state state;
    bool hit;               /* while MAKING: the memory changed */
    bool stranded, burying; /* while GONE: waits for the owner to deregister it, or somebody is about it */
    uint64_t life;          /* the process that registered it */
    pthread_t worker;       /* who is registering it, or burying */
    struct um_region region;
    struct um_node by_address;
    struct um_entry *previous_listed, *next_listed; /* in its state's list; LISTED: the least recently used first */
    struct um_entry *next;                          /* free, or doomed: to be buried by who made that list */
} __attribute__((aligned(64)));

struct um_slot {
    _Atomic uint64_t address;
    struct um_entry *_Atomic entry;
};

/* Open addressing, at most half full; replaced when it grows, kept until the cache closes: somebody may be reading it.
 */
struct um_table {
    uint64_t mask;
    struct um_table *outgrown;
    struct um_slot slots[];
};

/* Which registrations cover an address: exact starts by hash, without the lock; everything else by an interval tree. */
struct um_index {
    struct um_table *_Atomic table;
    struct um_node *tree;
    uint64_t count;
};

struct um_slab;

struct usermm_cache {
    struct um_index index;
    usermm_device *_Atomic device; /* NULL if UNCACHED; another one in a forked child */
    _Atomic uint64_t seen;         /* the device's generation up to which hits on regions have been applied */
    _Atomic uint32_t tick;
    bool serialized;
    atomic_bool shut;
    struct usermm_registrar registrar;
    struct usermm_cache_options options;
    pthread_t owner;            /* of a registrar of one thread */
    _Atomic uint64_t lock_life; /* the process whose threads the mutex serves */
    pthread_mutex_t mutex;
    _Atomic uint32_t made; /* registrations completed or given up: a futex */
    _Atomic uint32_t waiters;
    _Atomic uint64_t probes, doubts;
    /* With the lock held: */
    uint64_t life;
    uint64_t next_serial;
    struct um_entry_list lists[UM_ENTRY_GONE + 1]; /* by state */
    struct um_entry *free;
    struct um_slab *slabs;
    uint32_t ages[UM_AGES]; /* the tick at each of the latest expirations, the latest first */
    uint64_t past_hits;     /* of entries that were used again */
    struct usermm_cache_counts counts;
};

static inline struct um_entry *um_entry_of(const struct usermm_registration *registration) {
    return (struct um_entry *)(uintptr_t)registration; /* it comes first */
}
static inline struct um_entry *um_entry_of_region(struct um_region *region) {
    return (struct um_entry *)((char *)region - offsetof(struct um_entry, region));
}
static inline struct um_entry *um_entry_of_node(struct um_node *node) {
    return (struct um_entry *)((char *)node - offsetof(struct um_entry, by_address));
}
static inline uint64_t um_entry_end(const struct um_entry *entry) {
    return entry->shown.address + entry->shown.length;
}
static inline bool um_entry_is_held(struct um_entry *entry) {
    return atomic_load(&entry->word) >= UM_HOLDER;
}
static inline bool um_entry_overlaps(const struct um_entry *entry, uint64_t start, uint64_t end) {
    return entry->shown.address < end && start < um_entry_end(entry);
}
/* It was asked for. Not counted to the last one where many threads do so at once: no hit waits for another. */
static inline void um_entry_touch(const usermm_cache *cache, struct um_entry *entry) {
    uint32_t now = atomic_load_explicit(&cache->tick, memory_order_relaxed);
    if (atomic_load_explicit(&entry->tick, memory_order_relaxed) != now)
        atomic_store_explicit(&entry->tick, now, memory_order_relaxed);
    uint64_t hits = atomic_load_explicit(&entry->hits, memory_order_relaxed);
    atomic_store_explicit(&entry->hits, hits + 1, memory_order_relaxed);
}

/* cache_lock.c. Nothing of the caller's, and no call that waits, runs under the lock. */
void um_cache_lock(usermm_cache *cache);
void um_cache_unlock(usermm_cache *cache);
/* Something left the making or the gone: whoever waits looks again. */
void um_cache_announce(usermm_cache *cache);

/* cache_index.c. With the lock held, but for find_start. */
int um_index_reserve(struct um_index *index, uint64_t more); /* so that as many adds cannot fail; -ENOMEM */
void um_index_add(struct um_index *index, struct um_entry *entry);
void um_index_remove(struct um_index *index, struct um_entry *entry);
struct um_entry *um_index_find_start(const struct um_index *index, uint64_t address, uint64_t length);
struct um_entry *um_index_find_cover(const struct um_index *index, uint64_t address, uint64_t length);
void um_index_free(struct um_index *index);

/* cache_entry.c. With the lock held, but for hold and let_go. */
bool um_entry_hold(const usermm_cache *cache, struct um_entry *entry);   /* false: dead */
bool um_entry_let_go(const usermm_cache *cache, struct um_entry *entry); /* true: it is the caller's to bury */
bool um_entry_condemn(struct um_entry *entry);                           /* makes it dead; true: nobody holds it */
struct um_entry *um_entry_new(usermm_cache *cache);
void um_entry_set_state(usermm_cache *cache, struct um_entry *entry, enum um_entry_state state);
void um_entry_free_all(usermm_cache *cache);

/* cache_forget.c. With the lock held, but for bury: entries leave the look-up for the list *doomed, to be buried. */
void um_cache_kill(usermm_cache *cache, struct um_entry *entry, struct um_entry **doomed);
int um_cache_kill_range(usermm_cache *cache, uint64_t start, uint64_t end, struct um_entry **doomed);
void um_cache_kill_all(usermm_cache *cache, struct um_entry **doomed);
/* The least recently used one that nobody holds; false: there is none. */
bool um_cache_evict_oldest(usermm_cache *cache, struct um_entry **doomed);
/* Those that nobody holds and nobody asked for since the tick `limit`; how many. */
int um_cache_expire_before(usermm_cache *cache, uint32_t limit, struct um_entry **doomed);
uint32_t um_cache_tick(usermm_cache *cache);
/* Applies what the device has seen. 0 or why the cache cannot be used. */
int um_cache_refresh(usermm_cache *cache, struct um_entry **doomed);
/* Puts a dead entry that nobody holds onto the list, or leaves it to the owner. */
void um_cache_doom(usermm_cache *cache, struct um_entry *entry, struct um_entry **doomed);
/* Deregisters them. Without the lock. */
void um_cache_bury(usermm_cache *cache, struct um_entry *doomed);
/* Whether this thread may call the registrar. */
bool um_cache_is_owner(const usermm_cache *cache);
/* The owner's turn to deregister what others let go. */
void um_cache_collect_stranded(usermm_cache *cache, struct um_entry **doomed);

/* cache_fork.c: the cache becomes this process's own, empty. With the lock held. */
int um_cache_adopt(usermm_cache *cache, struct um_entry **doomed);
void um_cache_disown(usermm_cache *cache, struct um_entry **doomed);

/* What a pass under the lock ends with, beside 0 (there is an entry) and errors. */
enum { UM_BURY_FIRST = 1, UM_WAIT_FIRST };

struct um_request {
    uint64_t address, length;
    uint64_t start, end; /* to be registered: rounded, and grown where the registrar merges */
    unsigned watch_flags;
    uint64_t merged_start, merged_end;
    bool merged, alone; /* it has grown; it must not, since a union was refused */
    uint64_t notified;  /* the monitor's notifications before the pass in which it grew */
    uint32_t made;      /* when the pass began */
    struct um_entry *entry, *doomed;
    bool found; /* the entry is a registration that can be had; else it is to be completed */
};

/* cache_plan.c: one pass: an entry that is there, or a new one to be completed, or what has to happen first. With the
 * lock held. */
int um_cache_plan(usermm_cache *cache, struct um_request *request);

/* cache_make.c: the slow half of get. Without the lock; the entry is held for the caller. */
int um_cache_make(usermm_cache *cache, uint64_t address, uint64_t length, unsigned watch_flags,
                  struct um_entry **ret_entry, bool *ret_made);

#endif
