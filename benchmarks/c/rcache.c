/*
 * rcache SIDE MODE REGIONS [THREADS]: a registration cache of REGIONS regions of 64 KiB in one mapping, over a
 * registrar that does nothing. SIDE is usermm, or the path of UCX's libucs.so, or the same after "lru:", with a limit
 * that is never reached: UCX keeps its LRU list only then. A round prints, for MODE
 *
 *   hit    get + release of cached regions in random order, by THREADS threads at once: ns of wall time a pair
 *   part   get + release of memory that was never seen before, 250 regions of a mapping, in random order: ns a pair
 *   own    the same of regions with a mapping each
 *   seen   the same of those once they were evicted: the kernel watches them already
 *   other  the first get + release of a cached region after a munmap of another: mean and median in ns
 *   same   the first get + release of an unmapped region, mapped again: mean and median in ns
 */
#include <pthread.h>
#include <stdbool.h>

#include "bench.h"

#include "rcache_memory.h"
#include "rcache_sides.h"

#define BATCH 250 /* regions of one new mapping */
#define MAX_THREADS 16
#define MAX_SAMPLES 10000
#define ORDER_LENGTH 131072ul /* a power of two: the same look-ups again after so many */

static char *base;
static size_t regions;
static uint64_t samples_ns[MAX_SAMPLES];

static size_t random_below(size_t limit) {
    static uint64_t state = 88172645463325252u; /* xorshift64 */
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (size_t)(state % limit);
}

static uint32_t *random_order(void) {
    uint32_t *order = malloc(ORDER_LENGTH * sizeof *order);
    need(order != NULL, "malloc");
    for (size_t i = 0; i < ORDER_LENGTH; i++)
        order[i] = (uint32_t)random_below(regions);
    return order;
}

struct looker {
    pthread_t thread;
    enum side side;
    uint32_t *order;
    size_t count;
    uint64_t start_ns, end_ns;
};

static struct looker lookers[MAX_THREADS];
static pthread_barrier_t together;

static inline __attribute__((always_inline)) void look_up(enum side side, const uint32_t *order, size_t count) {
    for (size_t i = 0; i < count; i++)
        get_and_release(side, base + order[i % ORDER_LENGTH] * REGION_BYTES);
}

static void *look(void *argument) {
    struct looker *looker = argument;
    pthread_barrier_wait(&together);
    looker->start_ns = now_ns();
    if (looker->side == UCX)
        look_up(UCX, looker->order, looker->count);
    else
        look_up(USERMM, looker->order, looker->count);
    looker->end_ns = now_ns();
    return NULL;
}

/* Starting the threads is not timed: the clock runs from the first look-up to the last. */
static double hit_ns(enum side side, size_t count, size_t threads) {
    uint64_t start_ns = UINT64_MAX, end_ns = 0;
    pthread_barrier_init(&together, NULL, (unsigned)threads);
    for (size_t i = 0; i < threads; i++) {
        lookers[i].side = side;
        lookers[i].count = (count + threads - 1) / threads;
        if (!lookers[i].order)
            lookers[i].order = random_order();
        if (i)
            need(pthread_create(&lookers[i].thread, NULL, look, &lookers[i]) == 0, "pthread_create");
    }
    look(&lookers[0]);
    for (size_t i = 0; i < threads; i++) {
        if (i)
            pthread_join(lookers[i].thread, NULL);
        start_ns = lookers[i].start_ns < start_ns ? lookers[i].start_ns : start_ns;
        end_ns = lookers[i].end_ns > end_ns ? lookers[i].end_ns : end_ns;
    }
    pthread_barrier_destroy(&together);
    return (double)(end_ns - start_ns) / (double)(threads * lookers[0].count);
}

static inline __attribute__((always_inline)) uint64_t run_ns(enum side side, char *const *starts, size_t count) {
    uint64_t before_ns = now_ns();
    for (size_t i = 0; i < count; i++)
        get_and_release(side, starts[i]);
    return now_ns() - before_ns;
}

static uint64_t batch_ns(enum side side, char *const *starts, size_t count) {
    return side == UCX ? run_ns(UCX, starts, count) : run_ns(USERMM, starts, count);
}

static uint64_t once_ns(enum side side, char *start) {
    return batch_ns(side, &start, 1);
}

static void shuffle(char **starts, char *memory, size_t count, size_t pitch) {
    for (size_t i = 0; i < count; i++) {
        size_t j = random_below(i + 1);
        starts[i] = starts[j];
        starts[j] = memory + i * pitch;
    }
}

/* Between the batches all is forgotten, and one more miss makes UCX free what it put aside until then. */
static double miss_ns(enum side side, const char *kind, size_t count) {
    static char *spare, *starts[BATCH];
    size_t pitch = strcmp(kind, "part") == 0 ? REGION_BYTES : 2 * REGION_BYTES, batch;
    double sum_ns = 0;
    spare = spare ? spare : reserve(REGION_BYTES);
    for (size_t left = count; left; left -= batch) {
        batch = left < BATCH ? left : BATCH;
        size_t bytes = (batch - 1) * pitch + REGION_BYTES;
        char *memory = reserve(bytes);
        if (pitch > REGION_BYTES)
            separate(memory, batch, pitch);
        touch(memory, batch, pitch);
        shuffle(starts, memory, batch, pitch);
        if (strcmp(kind, "seen") == 0) {
            batch_ns(side, starts, batch);
            forget(side, memory, bytes);
        }
        sum_ns += (double)batch_ns(side, starts, batch);
        forget(side, memory, bytes);
        forget(side, spare, REGION_BYTES);
        once_ns(side, spare);
        discard(memory, bytes);
    }
    return sum_ns / (double)count;
}

static void unmap(enum side side, char *start) {
    *(volatile char *)start = 1;
    if (side == UCX)
        forget(UCX, start, REGION_BYTES); /* usermm learns it by itself */
    need(munmap(start, REGION_BYTES) == 0, "munmap");
}

static void map_again(char *start) {
    need(mmap(start, REGION_BYTES, PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0) == start,
         "mmap");
}

static void after_unmap(enum side side, size_t count, bool same) {
    need(count <= MAX_SAMPLES && regions > 1, "the number of operations or regions");
    for (size_t i = 0; i < count; i++) {
        size_t gone = random_below(regions);
        char *lost = base + gone * REGION_BYTES;
        char *wanted = same ? lost : base + (gone + 1 + random_below(regions - 1)) % regions * REGION_BYTES;
        unmap(side, lost);
        if (same)
            map_again(lost);
        samples_ns[i] = once_ns(side, wanted);
        if (!same)
            map_again(lost);
        once_ns(side, lost);
    }
}

static void fill(enum side side) {
    base = reserve(regions * REGION_BYTES);
    for (size_t i = 0; i < regions; i++)
        once_ns(side, base + i * REGION_BYTES);
}

/* A miss that should have been a hit, or the other way round, must not pass for a figure. */
static void check(enum side side, uint64_t before, size_t misses) {
    need(registrations(side) - before == misses, "as many registrations as misses");
}

static void measure(enum side side, const char *mode, size_t count, size_t threads) {
    uint64_t before = registrations(side);
    if (strcmp(mode, "hit") == 0) {
        double mean_ns = hit_ns(side, count, threads);
        check(side, before, 0);
        printf("%.2f\n", mean_ns);
    } else if (strcmp(mode, "other") == 0 || strcmp(mode, "same") == 0) {
        after_unmap(side, count, mode[0] == 's');
        check(side, before, count);
        print_samples(samples_ns, count);
    } else {
        bool seen = strcmp(mode, "seen") == 0;
        need(seen || strcmp(mode, "own") == 0 || strcmp(mode, "part") == 0, "the mode's name");
        double mean_ns = miss_ns(side, mode, count);
        check(side, before, count * (seen ? 2 : 1) + (count + BATCH - 1) / BATCH); /* with those of the spare region */
        printf("%.1f\n", mean_ns);
    }
    fflush(stdout);
}

int main(int count, char **arguments) {
    size_t operations, threads = count == 5 ? strtoul(arguments[4], NULL, 10) : 1;
    need(count == 4 || count == 5, "three or four arguments");
    need(threads > 0 && threads <= MAX_THREADS, "the number of threads");
    enum side side = strcmp(arguments[1], "usermm") == 0 ? USERMM : UCX;
    regions = strtoul(arguments[3], NULL, 10);
    need(regions > 0 && regions < UINT32_MAX, "the number of regions");
    if (side == UCX)
        open_ucx(arguments[1]);
    else
        open_usermm();
    fill(side);
    while ((operations = next_round()))
        measure(side, arguments[2], operations, threads);
    return 0;
}
