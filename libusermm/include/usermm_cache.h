/*
 * A registration cache: memory is handed to a device once, and the registration is found again by address until the
 * memory goes away. It is never stale: it asks the monitor of usermm.h before it believes itself.
 *
 * Conventions as in usermm.h. Any thread may call anything, except usermm_cache_close, which must be the last call, and
 * caches opened with USERMM_CACHE_SERIALIZED.
 */
#ifndef USERMM_CACHE_H
#define USERMM_CACHE_H

#include <stdbool.h>
#include <stdint.h>

#include "usermm.h"

#ifdef __cplusplus
extern "C" {
#endif

enum usermm_overlap {
    USERMM_OVERLAP_ALLOWED, /* registrations may share bytes */
    USERMM_OVERLAP_MERGED,  /* they may, but one that covers all is better */
    USERMM_OVERLAP_REFUSED  /* the device must never see two that share bytes */
};

/* How a device takes memory and gives it back. The callbacks run without any lock of the cache and may call it. */
struct usermm_registrar {
    /* 0, or a negative errno and nothing is registered; -ENOMEM and -ENOSPC: others are given up, and it is tried
     * again. */
    int (*register_memory)(void *context, uint64_t address, uint64_t length, uint64_t *ret_handle);
    void (*deregister_memory)(void *context, uint64_t handle);
    /* In a forked child: the handle is the parent's, which keeps it registered. NULL: nothing to do. */
    void (*forget_memory)(void *context, uint64_t handle);
    void *context;
    enum usermm_overlap overlap;
    bool merge_adjacent;  /* MERGED, REFUSED: also those that only touch */
    bool one_thread;      /* both calls must come from the thread that opened the cache */
    uint64_t granularity; /* ranges are rounded outwards to multiples of it: a power of two up to 4096 */
    uint64_t max_length;  /* of one registration, in bytes; 0: no limit */
};

#define USERMM_CACHE_SERIALIZED 1u /* the caller's own lock is held in every call, and so in every callback */
#define USERMM_CACHE_UNCACHED                                                                                          \
    2u /* watches nothing, remembers nothing: each get registers, each release deregisters                             \
        */

struct usermm_cache_options {
    uint64_t max_bytes, max_count; /* what may be registered at once, in bytes and registrations; 0: no limit */
    unsigned flags;
};

typedef struct usermm_cache usermm_cache;

/* Read only, and only between the get that returned it and the release. */
struct usermm_registration {
    uint64_t address, length; /* what is registered, in bytes: at least what was asked for */
    uint64_t handle;
    uint64_t serial; /* never the same for two registrations of a cache */
};

/* As usermm_open; -EINVAL a granularity or an overlap that does not exist. */
int usermm_cache_open(const struct usermm_registrar *registrar, const struct usermm_cache_options *options,
                      usermm_cache **ret_cache);

/* Another context for the registrar's callbacks; before the first get. */
void usermm_cache_bind(usermm_cache *cache, void *context);

/* Everything leaves the look-up, and later calls answer -EBADF. What is held is deregistered when it is released. */
void usermm_cache_shutdown(usermm_cache *cache);

/*
 * usermm_cache_shutdown, then frees the cache. Nothing may be held any more. How many registrations stay with the
 * device, having been let go in other threads than the one that a registrar of one thread wants: those are forgotten.
 */
int usermm_cache_close(usermm_cache *cache);

/*
 * A registration that covers [address, address + length): a remembered one, or a new one. It stays registered until it
 * is released. `probe` as in usermm_check; `watch_flags`: USERMM_REFUSE_*, for a new one.
 *
 * -EINVAL no range, or longer than the registrar's max_length; -EDQUOT the limits are reached and everything is held;
 * -EADDRINUSE the device refuses overlaps, and one is held; -EAGAIN the memory went on changing, or USERMM_PROBE_TRY
 * would wait; -EDEADLK called by register_memory for the same memory; -EXDEV a registrar of one thread, and this is
 * another; -EINPROGRESS, if SERIALIZED, another thread is registering it: see usermm_cache_wait; what register_memory
 * and usermm_register return.
 */
int usermm_cache_get(usermm_cache *cache, uint64_t address, uint64_t length, enum usermm_probe probe,
                     unsigned watch_flags, struct usermm_registration **ret_registration);

/* The same with USERMM_PROBE_NONE; *ret_made: whether it was made for this call. */
int usermm_cache_find_or_make(usermm_cache *cache, uint64_t address, uint64_t length, unsigned watch_flags,
                              struct usermm_registration **ret_registration, bool *ret_made);

/* What a get would find if nothing changed, to be taken by usermm_cache_again, or NULL: then there is no need to probe.
 */
struct usermm_registration *usermm_cache_peek(usermm_cache *cache, uint64_t address, uint64_t length,
                                              uint64_t *ret_serial);

/* The same registration once more, without a look-up. False: it is no longer the one with this serial, or not valid. */
bool usermm_cache_again(usermm_cache *cache, struct usermm_registration *registration, uint64_t serial);

/* Once for each get or again. The last one of a registration that has left the look-up deregisters it. */
void usermm_cache_release(usermm_cache *cache, struct usermm_registration *registration);

/* Applies all that was seen, which every other call but count and visit does by itself. */
int usermm_cache_refresh(usermm_cache *cache);

/* Whether a held registration still is what is mapped there: 1 or 0; exact as usermm_check without probe. */
int usermm_cache_valid(usermm_cache *cache, const struct usermm_registration *registration);

/* 0: no change of watched memory is under way; 1: there was no quiet moment for 100 ms, so evict what you ask for next;
 * -EAGAIN, with USERMM_PROBE_TRY: one is. Needs no lock, also if SERIALIZED. */
int usermm_cache_probe(usermm_cache *cache, enum usermm_probe probe);

/* Takes out of the look-up what overlaps the range (length 0: everything). How many. */
int usermm_cache_evict(usermm_cache *cache, uint64_t address, uint64_t length);

/* The memory is about to be unmapped, and nobody asks for it any more: takes the registration out, if nobody holds it
 * and it still is the one with this serial, and takes the watch off, so that the unmapping has nobody to wait for. */
void usermm_cache_retire(usermm_cache *cache, struct usermm_registration *registration, uint64_t serial);

/* The cache's time, which moves with each usermm_cache_expire; a touch counts as being asked for. */
void usermm_cache_touch(usermm_cache *cache, struct usermm_registration *registration, uint64_t serial);
/* Takes out what nobody holds and nobody asked for since `ages` (1 to 8) expirations ago; 0: only what lost its memory.
 * How many. */
int usermm_cache_expire(usermm_cache *cache, unsigned ages);

/* Polls readable from the first lost registration on, until usermm_cache_expire; hangs up when the cache is shut down.
 */
int usermm_cache_fileno(usermm_cache *cache);

/* How many registrations were completed or given up, and waiting until it is not `seen`: 1; 0 after timeout_ms (-1: for
 * ever) or a signal. For -EINPROGRESS: read it before the get. Neither needs a lock. */
uint32_t usermm_cache_made(usermm_cache *cache);
int usermm_cache_wait(usermm_cache *cache, uint32_t seen, int timeout_ms);

struct usermm_cache_counts {
    uint64_t registrations; /* in the look-up now */
    uint64_t held;          /* of those and of those that left it: held by somebody now */
    uint64_t pinned;        /* registered with the device now */
    uint64_t pinned_bytes;  /* in bytes, and the most that it was */
    uint64_t pinned_bytes_max;
    uint64_t hits, misses; /* of get; hits of one registration by many threads at once may count as one */
    uint64_t probes;       /* system calls that asked for a quiet moment */
    uint64_t doubts;       /* times that there was none */
    uint64_t waits;        /* for another thread's registration */
    uint64_t invalidations[USERMM_CAUSES];
    uint64_t evictions;   /* for want of room */
    uint64_t retirements; /* because the owner of the memory was about to free it */
    uint64_t expirations; /* because nobody asked */
    uint64_t merges;      /* registrations that gave way to a larger one */
    uint64_t retries;     /* the memory changed while it was registered */
    uint64_t registered;  /* calls of the registrar that succeeded, and their time */
    uint64_t register_failures;
    uint64_t register_ns;
    uint64_t deregistered;
    uint64_t deregister_ns;
};
void usermm_cache_count(usermm_cache *cache, struct usermm_cache_counts *ret_counts);

/* Calls visit for each registration that overlaps the range (length 0: all) and is in the look-up, in order of address.
 */
void usermm_cache_visit(usermm_cache *cache, uint64_t address, uint64_t length,
                        void (*visit)(const struct usermm_registration *registration, uint64_t holders, void *context),
                        void *context);

#ifdef __cplusplus
}
#endif
#endif
