/*
 * Threads that unmap, remap and discard blocks of memory at random and ask a client's cache about them, and the truth.
 * A client is written in the manner of a known one. It is given ranges, each with the truth about it, a number made of
 * what each of its pages is, and says which truth it remembers: another one is a stale answer.
 *
 * Exact for everyone: a block's changer holds its lock until its call has returned, and whoever asks holds it, too.
 * Handed over: a giver unmaps while the asking thread already maps the address, so the giver may still be inside its
 * call; for clients that only load this is exact if the mapping comes from libc's mmap(). It is counted apart.
 *
 * CLIENT LOOKS THREADS none|mmap|raw  prints "LOOKS hits HITS stale STALE given GIVEN stale STALE"; the status is 1
 * when a look-up in memory that was not handed over was stale, or when the client remembered nothing.
 */
#ifndef CHURN_H
#define CHURN_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "abi.h"
#include "raw.h"

#define STRIDE (1ul << 20)
#define BLOCKS 24
#define PAGES 8
#define MOST_THREADS 16

/* What a client has to have. Any thread calls them, `find` with the block's lock held. */
static void client_open(void);
/* The truth that is remembered for exactly [start, end); if none is, remembers this one and says so. */
static uint64_t client_find(uint64_t start, uint64_t end, uint64_t truth, bool *ret_new);
static void client_close(void);

struct block {
    pthread_mutex_t lock;
    char *start;
    uint64_t mapped[PAGES]; /* serial number of what each page is */
};

struct thread {
    pthread_t asker, giver;
    uint32_t random;
    long looks, hits, stale, given, given_stale;
    char *_Atomic to_give; /* the giver's order; NULL when it is done */
    char *aside;
};

static struct block blocks[BLOCKS];
static atomic_ulong last_mapped;
static struct thread threads[MOST_THREADS];
static atomic_bool stop;
static enum { NONE, BY_MMAP, BY_RAW } handing;

static void is_new(struct block *block, size_t first, size_t count) {
    for (size_t i = first; i < first + count; i++)
        block->mapped[i] = atomic_fetch_add(&last_mapped, 1) + 1;
}

/* Half of them past libc. */
static void change(struct thread *thread, struct block *block) {
    bool raw = below(&thread->random, 2);
    size_t first = below(&thread->random, PAGES), count = 1 + below(&thread->random, (uint32_t)(PAGES - first));
    char *page = block->start + first * PAGE;
    switch (below(&thread->random, 4)) {
    case 0:
        must((raw ? RAW(munmap, page, count * PAGE, 0, 0, 0, 0) : munmap(page, count * PAGE)) == 0, "munmap");
        must((raw ? raw_map_at : map_at)(page, count * PAGE, MAP_FIXED) == page, "mmap");
        break;
    case 1:
        must((raw ? raw_map_at : map_at)(page, count * PAGE, MAP_FIXED) == page, "mmap");
        break;
    case 2:
        must((raw ? RAW(madvise, page, count * PAGE, MADV_DONTNEED, 0, 0, 0)
                  : madvise(page, count * PAGE, MADV_DONTNEED)) == 0,
             "madvise");
        break;
    default: /* one page, since a range can be several mappings by now */
        count = 1;
        if (raw)
            RAW(mremap, page, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, thread->aside, 0);
        else
            must(mremap(page, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, thread->aside) == thread->aside, "mremap");
        must(map_at(page, PAGE, MAP_FIXED) == page, "mmap");
    }
    is_new(block, first, count);
}

static void *give(void *argument) {
    struct thread *thread = argument;
    for (char *start; !atomic_load(&stop);) {
        if (!(start = atomic_load(&thread->to_give))) {
            sched_yield();
            continue;
        }
        munmap(start, PAGES * PAGE);
        atomic_store(&thread->to_give, NULL);
    }
    return NULL;
}

static void take(struct thread *thread, struct block *block) {
    atomic_store(&thread->to_give, block->start);
    while ((handing == BY_RAW ? raw_map_at : map_at)(block->start, PAGES * PAGE, MAP_FIXED_NOREPLACE) != block->start)
        sched_yield();
    is_new(block, 0, PAGES);
}

static uint64_t truth_of(const uint64_t *mapped, size_t count) {
    uint64_t truth = 0xcbf29ce484222325u; /* FNV-1a, by words */
    for (size_t i = 0; i < count; i++)
        truth = (truth ^ mapped[i]) * 0x100000001b3u;
    return truth;
}

/* Whether the client's answer was about what is not mapped any more. */
static bool look(struct thread *thread, struct block *block) {
    size_t first = below(&thread->random, PAGES / 2) * 2, count = 1 + below(&thread->random, 2);
    uint64_t start = (uintptr_t)block->start + first * PAGE, truth = truth_of(block->mapped + first, count);
    bool is_new = false;
    uint64_t found = client_find(start, start + count * PAGE, truth, &is_new);
    thread->looks++;
    thread->hits += !is_new;
    return found != truth;
}

static void *ask(void *argument) {
    struct thread *thread = argument;
    long looks = thread->looks;
    thread->looks = 0;
    while (thread->looks < looks) {
        struct block *block = &blocks[below(&thread->random, BLOCKS)];
        pthread_mutex_lock(&block->lock);
        uint32_t what = below(&thread->random, 16);
        if (what == 0 && handing != NONE) {
            take(thread, block);
            thread->given++;
            thread->given_stale += look(thread, block);
            while (atomic_load(&thread->to_give)) /* its call is over before somebody else may have the block */
                sched_yield();
        } else {
            if (what < 4)
                change(thread, block);
            thread->stale += look(thread, block); /* after a change at once */
        }
        pthread_mutex_unlock(&block->lock);
    }
    return NULL;
}

static void start_threads(int count, long looks) {
    for (int i = 0; i < BLOCKS; i++) {
        blocks[i].start = FAR + (size_t)i * STRIDE;
        pthread_mutex_init(&blocks[i].lock, NULL);
        must(map_at(blocks[i].start, PAGES * PAGE, MAP_FIXED_NOREPLACE) == blocks[i].start, "mmap");
        is_new(&blocks[i], 0, PAGES);
    }
    for (int i = 0; i < count; i++) {
        struct thread *thread = &threads[i];
        *thread = (struct thread){.random = 0x9e3779b9u + (uint32_t)i * 7919u, .looks = looks / count};
        thread->aside = FAR + (size_t)(BLOCKS + i) * STRIDE;
        must(pthread_create(&thread->giver, NULL, give, thread) == 0, "pthread_create");
        must(pthread_create(&thread->asker, NULL, ask, thread) == 0, "pthread_create");
    }
}

int main(int argc, char **argv) {
    must(argc == 4 && atoi(argv[2]) <= MOST_THREADS, "arguments: LOOKS THREADS none|mmap|raw");
    long looks = 0, hits = 0, stale = 0, given = 0, given_stale = 0;
    int count = atoi(argv[2]);
    handing = strcmp(argv[3], "mmap") == 0 ? BY_MMAP : strcmp(argv[3], "raw") == 0 ? BY_RAW : NONE;
    client_open();
    start_threads(count, atol(argv[1]));
    for (int i = 0; i < count; i++)
        pthread_join(threads[i].asker, NULL);
    atomic_store(&stop, true);
    for (int i = 0; i < count; i++) {
        pthread_join(threads[i].giver, NULL);
        looks += threads[i].looks;
        hits += threads[i].hits;
        stale += threads[i].stale;
        given += threads[i].given;
        given_stale += threads[i].given_stale;
    }
    client_close();
    printf("%ld hits %ld stale %ld given %ld stale %ld\n", looks, hits, stale, given, given_stale);
    return stale > 0 || hits == 0;
}

#endif
