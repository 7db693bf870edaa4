/*
 * Own thread: when its memory-changing call has returned, the very next instruction, a plain load of the mapped page,
 * shows the generation that counts the change, exactly. Each thread has its own device, or the others' changes would
 * hide a late one. Usage: late_loads TRIALS THREADS libc|raw; prints "TRIALS late LATE early EARLY", and the status is
 * 1 when any load was late, or had moved by more than the change.
 */
#include <pthread.h>

#include "abi.h"
#include "raw.h"

#define ROOM 8 /* pages of a thread's arena; what is changed are the two from the second on */

static bool raw;

static void by_munmap(char *place) {
    raw ? (void)RAW(munmap, place, 2 * PAGE, 0, 0, 0, 0) : (void)munmap(place, 2 * PAGE);
}
static void by_map_fixed(char *place) {
    raw ? raw_map_at(place, 2 * PAGE, MAP_FIXED) : map_at(place, 2 * PAGE, MAP_FIXED);
}
static void remap(char *place, size_t new_length, int flags, char *new) {
    if (raw)
        RAW(mremap, place, 2 * PAGE, new_length, flags, new, 0);
    else
        mremap(place, 2 * PAGE, new_length, flags, new);
}
static void by_moving(char *place) {
    remap(place, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place + 3 * PAGE);
}
static void by_shrinking(char *place) {
    remap(place, PAGE, 0, NULL);
}
static void by_moving_onto(char *place) {
    char *other = place + 3 * PAGE;
    if (raw)
        RAW(mremap, other, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place, 0);
    else
        mremap(other, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place);
}
static void advise(char *place, int advice) {
    raw ? (void)RAW(madvise, place, 2 * PAGE, advice, 0, 0, 0) : (void)madvise(place, 2 * PAGE, advice);
}
static void by_dontneed(char *place) {
    advise(place, MADV_DONTNEED);
}
static void by_free(char *place) {
    advise(place, MADV_FREE);
}
static void by_brk(char *place) {
    raw ? (void)RAW(brk, place, 0, 0, 0, 0, 0) : (void)brk(place);
}

/* moves: notifications that the change is. A moving mremap is two: the pages left, the old place was unmapped. */
static const struct change {
    const char *name;
    void (*make)(char *place);
    uint64_t moves;
} changes[] = {
    {"munmap", by_munmap, 1},
    {"MAP_FIXED", by_map_fixed, 1},
    {"MADV_DONTNEED", by_dontneed, 1},
    {"MADV_FREE", by_free, 1},
    {"mremap shrinks", by_shrinking, 1},
    {"mremap moves onto it", by_moving_onto, 1},
    {"mremap moves it", by_moving, 2},
    {"brk", by_brk, 1}, /* last: there is one heap, so one thread alone can do it */
};
#define CHANGES (sizeof changes / sizeof *changes)

struct worker {
    pthread_t thread;
    char *arena;
    long trials, late[CHANGES], early[CHANGES];
    size_t changes;
};

/* noinline and by pointer, so that nothing but the change is between it and the load. */
static __attribute__((noinline)) uint64_t after(const struct change *change, char *place,
                                                const volatile uint64_t *generation) {
    change->make(place);
    return *generation;
}

static void *work(void *argument) {
    struct worker *worker = argument;
    int device = open_device(O_RDONLY | O_NONBLOCK);
    const volatile uint64_t *generation = map_generation(device);
    char *arena = worker->arena;
    char *top = (char *)(((uintptr_t)sbrk(0) + PAGE - 1) & ~(PAGE - 1));
    for (long trial = 0; trial < worker->trials; trial++) {
        size_t which = (size_t)trial % worker->changes;
        const struct change *change = &changes[which];
        char *place = arena + PAGE;
        if (change->make == by_brk) {
            place = top;
            must(brk(top + 2 * PAGE) == 0, "brk");
        } else {
            must(map_at(place, 2 * PAGE, MAP_FIXED) == place, "mmap");
            map_at(place + 3 * PAGE, 2 * PAGE, MAP_FIXED);
        }
        *(volatile char *)place = 1;
        must(register_range(device, place, 2 * PAGE, 7) == 0, "register");
        uint64_t seen = *generation, now = after(change, place, generation);
        worker->late[which] += now < seen + change->moves;
        worker->early[which] += now > seen + change->moves;
        must(unregister(device, 7) == 0, "unregister");
    }
    munmap(arena, ROOM * PAGE);
    close(device);
    return NULL;
}

int main(int argc, char **argv) {
    must(argc == 4, "arguments: TRIALS THREADS libc|raw");
    long trials = atol(argv[1]), late = 0, early = 0;
    int threads = atoi(argv[2]), keeps_the_monitor = open_device(O_RDONLY);
    raw = strcmp(argv[3], "raw") == 0;
    struct worker *workers = calloc((size_t)threads, sizeof *workers);
    for (int i = 0; i < threads; i++) {
        workers[i].trials = trials / threads;
        workers[i].arena = FAR + (size_t)i * ROOM * PAGE;
        workers[i].changes = threads == 1 ? CHANGES : CHANGES - 1;
        must(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0, "pthread_create");
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(workers[i].thread, NULL);
        for (size_t which = 0; which < CHANGES; which++) {
            late += workers[i].late[which];
            early += workers[i].early[which];
            if (workers[i].late[which] || workers[i].early[which])
                fprintf(stderr, "thread %d, %s: %ld late, %ld moved too far\n", i, changes[which].name,
                        workers[i].late[which], workers[i].early[which]);
        }
    }
    close(keeps_the_monitor);
    free(workers);
    printf("%ld late %ld early %ld\n", trials / threads * threads, late, early);
    return late || early;
}
