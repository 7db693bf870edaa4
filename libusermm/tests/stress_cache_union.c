/*
 * A union is registered for one thread, but has memory of others in it. Asker gets A, which touches the registration of
 * B, so that both are registered as one; while that of B is taken back, the owner of B discards it, and after that asks
 * for it: what he gets has to be what is there now. Discards are the hard case, since they are reported before the
 * pages go. Usage: stress_cache_union TRIALS; exit status 1 when any answer was stale.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#include "stress_ledger.h"
#include "stress_memory.h"

#define PROBES 5000 /* that the asker waits for the owner's call, at most */

enum { PREPARED, ARMED, DISCARDING, ANSWERED, CHECKED }; /* of one trial */

static usermm_cache *cache;
static char *a, *b;
static atomic_int step;
static long stale, met;

/* At least this one: the other thread may be further. */
static void await(int wanted) {
    for (unsigned attempt = 1; atomic_load(&step) < wanted; attempt++)
        if (attempt % 1024 == 0)
            sched_yield();
}

static bool look(char *page) {
    struct usermm_registration *registration;
    uint64_t address = (uint64_t)(uintptr_t)page;
    int result = usermm_cache_get(cache, address, PAGE, USERMM_PROBE_WAIT, USERMM_REFUSE_HOLES, &registration);
    must(result == 0, "usermm_cache_get");
    bool is_stale = ledger_is_stale(registration, address, PAGE);
    usermm_cache_release(cache, registration);
    return is_stale;
}

static bool waits_until_busy(void) {
    for (int i = 1; i < PROBES; i++) {
        if (usermm_cache_probe(cache, USERMM_PROBE_TRY) == -EAGAIN)
            return true;
        if (i % 64 == 0)
            sched_yield();
    }
    return false;
}

/* The first one of an armed trial is that of B: its owner is let go, and is inside his call when this returns. */
static void deregister_memory(void *context, uint64_t handle) {
    int armed = ARMED;
    if (atomic_compare_exchange_strong(&step, &armed, DISCARDING))
        met += waits_until_busy();
    ledger_deregister(context, handle);
}

static void *own(void *trials) {
    for (long trial = 0; trial < (long)(intptr_t)trials; trial++) {
        await(DISCARDING);
        must(madvise(b, PAGE, MADV_DONTNEED) == 0, "madvise");
        await(ANSWERED);
        stale += look(b);
        atomic_store(&step, CHECKED);
        while (atomic_load(&step) == CHECKED)
            sched_yield();
    }
    return NULL;
}

static void run(long trials, enum usermm_overlap overlap, const char *name) {
    pthread_t owner;
    struct usermm_cache_options unlimited = {0};
    struct usermm_registrar registrar = {ledger_register, deregister_memory, .overlap = overlap, .merge_adjacent = true,
                                         .granularity = 1};
    stale = met = 0;
    atomic_store(&step, PREPARED);
    must(usermm_cache_open(&registrar, &unlimited, &cache) == 0, "usermm_cache_open");
    must(pthread_create(&owner, NULL, own, (void *)(intptr_t)trials) == 0, "pthread_create");
    for (long trial = 0; trial < trials; trial++) {
        usermm_cache_evict(cache, 0, 0);
        look(b);
        atomic_store(&step, ARMED);
        ledger_require(!look(a), "the asker's own memory is stale");
        int armed = ARMED; /* still, if the registration of B was lost to an event from before */
        if (atomic_compare_exchange_strong(&step, &armed, DISCARDING))
            sched_yield();
        atomic_store(&step, ANSWERED);
        await(CHECKED);
        atomic_store(&step, PREPARED);
    }
    pthread_join(owner, NULL);
    usermm_cache_close(cache);
    printf("cache, a part of a union is discarded, %s: %ld stale of %ld, %ld met\n", name, stale, trials, met);
}

int main(int argc, char **argv) {
    long trials = argc > 1 ? atol(argv[1]) : 20000, found = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    ledger.max_count = ledger.max_bytes = 1L << 40;
    a = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(a != MAP_FAILED, "mmap");
    b = a + PAGE;
    run(trials, USERMM_OVERLAP_MERGED, "merged");
    found += stale;
    run(trials, USERMM_OVERLAP_REFUSED, "overlaps refused");
    found += stale;
    return found != 0 || atomic_load(&ledger.violations) != 0;
}
