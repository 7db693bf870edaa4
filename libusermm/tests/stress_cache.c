/*
 * A cache that is shared by threads is never stale: what it answers is what is mapped there. Blocks of memory are
 * changed by whoever owns them at the moment, asked for by everybody, and given from thread to thread while the giver
 * is still inside its call. Usage: stress_cache TRIALS THREADS; exit status 1 when any answer was stale, or the
 * accounts of the device are wrong: a registration taken back twice or while it was held, a limit passed, one left.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#include "stress_ledger.h"
#include "stress_memory.h"

#define PAGES 4 /* of a block */
#define BLOCKS 64
#define HELD 3 /* that a thread keeps at most */
#define LOOKS 8

/* `owners`: n threads ask for it, or one changes it, or nobody has it and it is being unmapped. */
enum { OWNED = -1, GIVEN = -2 };
struct block {
    char *start;
    atomic_int owners;
};

static const struct scenario {
    const char *name;
    enum usermm_overlap overlap;
    bool gives;    /* blocks go to other threads while they are being unmapped */
    bool disturbs; /* memory changes while it is being registered */
} scenarios[] = {
    {"own thread", USERMM_OVERLAP_ALLOWED, false, false},
    {"another thread", USERMM_OVERLAP_ALLOWED, true, false},
    {"while registering", USERMM_OVERLAP_ALLOWED, false, true},
    {"all together, merged", USERMM_OVERLAP_MERGED, true, true},
    {"all together, overlaps refused", USERMM_OVERLAP_REFUSED, true, true},
};

struct worker {
    pthread_t thread;
    char *scratch; /* where pages are moved to */
    uint32_t random;
    long trials, looks, stale, refused;
    struct usermm_registration *held[HELD];
};

static const struct scenario *current;
static struct block blocks[BLOCKS];
static usermm_cache *cache;
static _Thread_local struct worker *self;
static _Thread_local const struct block *asked;

static uint32_t below(uint32_t limit) {
    self->random ^= self->random << 13;
    self->random ^= self->random >> 17;
    self->random ^= self->random << 5;
    return self->random % limit;
}

static void let_go(unsigned place) {
    struct usermm_registration *registration = self->held[place];
    self->held[place] = NULL;
    if (!registration)
        return;
    ledger_require_registered(registration->handle);
    usermm_cache_release(cache, registration);
}

static void let_all_go(void) {
    for (unsigned i = 0; i < HELD; i++)
        let_go(i);
}

/* One look-up, every page of it compared. False: refused, for want of room or for what others hold. */
static bool look(const struct block *block, size_t offset, size_t length, enum usermm_probe probe) {
    struct usermm_registration *registration;
    uint64_t address = (uint64_t)(uintptr_t)block->start + offset;
    asked = block;
    int result = usermm_cache_get(cache, address, length, probe, USERMM_REFUSE_HOLES, &registration);
    if (result) {
        bool expected = result == -EAGAIN || result == -EDQUOT || result == -EADDRINUSE;
        ledger_require(expected, strerror(-result));
        self->refused++;
        let_all_go();
        return false;
    }
    self->looks++;
    self->stale += ledger_is_stale(registration, address, length);
    unsigned place = below(HELD);
    let_go(place);
    self->held[place] = registration;
    if (below(2))
        let_go(place);
    return true;
}

static void look_somewhere(const struct block *block, enum usermm_probe probe) {
    size_t offset = below(PAGES * PAGE - 8), length = 1 + below((uint32_t)(PAGES * PAGE - offset));
    if (below(2))
        look(block, 0, PAGES * PAGE, probe);
    else
        look(block, offset, length, probe);
}

/* Registered as a whole, so that each page has a stamp before others are let in. */
static void settle(const struct block *block) {
    for (int attempt = 0; attempt < 100 && !look(block, 0, PAGES * PAGE, USERMM_PROBE_NONE); attempt++)
        sched_yield();
}

/* By the thread that owns the block, which therefore sees it at once. */
static void change(const struct block *block) {
    size_t first = below(PAGES), pages = 1 + below((uint32_t)(PAGES - first));
    causes[below(sizeof causes / sizeof *causes)](block->start + first * PAGE, pages, self->scratch);
    look(block, first * PAGE, pages * PAGE, USERMM_PROBE_NONE);
    for (unsigned i = 0; i < HELD; i++) {
        struct usermm_registration *held = self->held[i];
        uint64_t start = (uint64_t)(uintptr_t)(block->start + first * PAGE);
        bool lost = held && held->address <= start && start < held->address + held->length;
        ledger_require(!lost || !usermm_cache_valid(cache, held) || !ledger_is_stale(held, start, 8), "valid but gone");
    }
    settle(block);
}

/* The registrar's memory changes under it; only what its caller owns. */
static void disturb(uint64_t address, uint64_t length) {
    char *page = asked->start + below(PAGES) * PAGE;
    uint64_t at = (uint64_t)(uintptr_t)page;
    if (asked->owners == OWNED && address <= at && at < address + length && below(8) == 0)
        below(2) ? by_dontneed(page, 1, NULL) : by_map_fixed(page, 1, NULL);
}

/* Its last page goes last: until then nobody can map it. The block is the taker's before the call returns. */
static void give(struct block *block) {
    char *start = block->start, *last = start + (PAGES - 1) * PAGE;
    bool moves = below(4) == 0;
    atomic_store(&block->owners, GIVEN);
    munmap(start, (moves ? PAGES - 1 : PAGES) * PAGE);
    if (moves)
        must(mremap(last, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, self->scratch) == self->scratch, "mremap");
}

static void take(struct block *block) {
    for (unsigned attempt = 1; map_at(block->start, PAGES, MAP_FIXED_NOREPLACE) != block->start; attempt++)
        if (attempt % 256 == 0)
            sched_yield(); /* still mapped */
    look_somewhere(block, USERMM_PROBE_WAIT);
    settle(block);
    atomic_store(&block->owners, 0);
}

static void use(struct block *block) {
    for (int i = 0; i < LOOKS; i++)
        look_somewhere(block, below(4) ? USERMM_PROBE_NONE : USERMM_PROBE_WAIT);
    if (below(8) == 0)
        must(usermm_cache_evict(cache, (uintptr_t)block->start, PAGES * PAGE) >= 0, "evict");
    if (below(256) == 0)
        must(usermm_cache_expire(cache, 1 + below(2)) >= 0, "expire");
    atomic_fetch_sub(&block->owners, 1);
}

static bool claim(struct block *block, int from, int to) {
    return atomic_compare_exchange_strong(&block->owners, &from, to);
}

static void *work(void *argument) {
    self = argument;
    for (long trial = 0; trial < self->trials;) {
        struct block *block = &blocks[below(BLOCKS)];
        int owners = atomic_load(&block->owners);
        if (owners == GIVEN && claim(block, GIVEN, OWNED)) {
            take(block);
            trial++;
        } else if (owners == 0 && below(2) && claim(block, 0, OWNED)) {
            if (current->gives && below(2)) {
                give(block);
            } else {
                change(block);
                atomic_store(&block->owners, 0);
                trial++;
            }
        } else if (owners >= 0 && claim(block, owners, owners + 1)) {
            use(block);
        }
    }
    let_all_go();
    return NULL;
}

static void open_all(int threads) {
    struct usermm_registrar registrar = {
        .register_memory = ledger_register,
        .deregister_memory = ledger_deregister,
        .overlap = current->overlap,
        .merge_adjacent = current->overlap != USERMM_OVERLAP_ALLOWED,
        .granularity = 1,
        .max_length = MOST_PAGES * PAGE / 2,
    };
    ledger.max_count = (HELD + 1) * threads;
    ledger.max_bytes = ledger.max_count * PAGES * (long)PAGE;
    ledger.during = current->disturbs ? disturb : NULL;
    struct usermm_cache_options options = {(uint64_t)ledger.max_bytes, (uint64_t)ledger.max_count, 0};
    must(usermm_cache_open(&registrar, &options, &cache) == 0, "usermm_cache_open");
}

static void close_all(void) {
    struct usermm_cache_counts counts;
    usermm_cache_evict(cache, 0, 0);
    usermm_cache_count(cache, &counts);
    ledger_require(counts.registrations == 0 && counts.pinned == 0 && counts.held == 0, "something is left");
    ledger_require(counts.pinned_bytes == 0, "bytes are left");
    ledger_require(counts.pinned_bytes_max <= (uint64_t)ledger.max_bytes, "more bytes than the limit");
    usermm_cache_close(cache);
    ledger_require(ledger.live == 0 && ledger.live_bytes == 0, "the device has some left");
}

static long run(long trials, int threads) {
    struct worker *workers = calloc((size_t)threads, sizeof *workers), sum = {0};
    char *arena = mmap(NULL, (BLOCKS * PAGES + 2ul * (size_t)threads) * PAGE, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    must(arena != MAP_FAILED, "mmap");
    open_all(threads);
    self = &workers[0];
    for (size_t i = 0; i < BLOCKS; i++) {
        blocks[i].start = map_at(arena + i * PAGES * PAGE, PAGES, MAP_FIXED);
        self->random = 1;
        settle(&blocks[i]);
        atomic_store(&blocks[i].owners, 0);
    }
    let_all_go();
    for (int i = 0; i < threads; i++) {
        workers[i].scratch = arena + (BLOCKS * PAGES + 2ul * (size_t)i) * PAGE;
        workers[i].random = 0x9e3779b9u * (uint32_t)(i + 1);
        workers[i].trials = trials / threads;
        must(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0, "pthread_create");
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(workers[i].thread, NULL);
        sum.looks += workers[i].looks;
        sum.stale += workers[i].stale;
        sum.refused += workers[i].refused;
    }
    close_all();
    munmap(arena, (BLOCKS * PAGES + 2ul * (size_t)threads) * PAGE);
    free(workers);
    printf("cache, %s, %d threads: %ld stale of %ld look-ups with %ld changes, %ld refused\n", current->name, threads,
           sum.stale, sum.looks, trials, sum.refused);
    return sum.stale;
}

int main(int argc, char **argv) {
    long trials = argc > 1 ? atol(argv[1]) : 20000, stale = 0;
    int threads = argc > 2 ? atoi(argv[2]) : 4;
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
        current = &scenarios[i];
        stale += run(trials, threads);
    }
    return stale != 0 || atomic_load(&ledger.violations) != 0;
}
