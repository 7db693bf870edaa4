/*
 * Another thread: an address that one thread gave back and another one got is never taken for the old one. The giver
 * unmaps; the taker maps the address as soon as the kernel lets it and asks at once, while the giver may still be
 * inside its call. Usage: stress_address_reuse TRIALS NOISE_THREADS; exit status 1 when any answer was stale.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "usermm.h"

#define PAGE 4096ul
#define PAGES 4

static usermm_device *device;
static char *place; /* PAGES pages with as many free ones above */
static uint64_t seen;
static atomic_long turn; /* odd: the giver gives and the taker takes; even: the taker is done */
static atomic_bool stop;
static long stale, taken;

static void must(int condition, const char *what) {
    if (!condition) {
        perror(what);
        _exit(2);
    }
}

static void *map_at(char *address, size_t pages, int flags) {
    return mmap(address, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

static void give_by_munmap(void) {
    munmap(place, PAGES * PAGE);
}
/* Four mappings in one call: one message for all of them. */
static void give_several_mappings(void) {
    mprotect(place + PAGE, PAGE, PROT_READ);
    mprotect(place + 3 * PAGE, PAGE, PROT_READ);
    munmap(place, PAGES * PAGE);
}
static void give_by_mremap(void) {
    void *moved = mremap(place, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place + PAGES * PAGE);
    must(moved != MAP_FAILED, "mremap");
}
static void give_the_tail(void) {
    must(mremap(place, PAGES * PAGE, PAGE, 0) == place, "mremap");
}

static const struct scenario {
    const char *name;
    void (*give)(void);
    size_t given_from; /* first page that the taker can get */
} scenarios[] = {
    {"munmap", give_by_munmap, 0},
    {"munmap of several mappings", give_several_mappings, 0},
    {"mremap away", give_by_mremap, 0},
    {"mremap shrinks", give_the_tail, 1},
};
static const struct scenario *current;

static void *take(void *unused) {
    (void)unused;
    for (long mine = 1; !atomic_load(&stop); mine += 2) {
        while (atomic_load(&turn) != mine)
            if (atomic_load(&stop))
                return NULL;
        char *wanted = place + current->given_from * PAGE;
        while (map_at(wanted, PAGES - current->given_from, MAP_FIXED_NOREPLACE) != wanted)
            ; /* still mapped */
        taken++;
        stale += usermm_check(device, seen, USERMM_PROBE_WAIT) != 0;
        atomic_store(&turn, mine + 1);
    }
    return NULL;
}

/* Keeps the reader busy with other watched memory. */
static void *make_noise(void *unused) {
    usermm_device *own;
    (void)unused;
    must(usermm_open(2, O_RDONLY, &own) == 0, "usermm_open");
    while (!atomic_load(&stop)) {
        char *page = map_at(NULL, 1, 0);
        usermm_register(own, (uintptr_t)page, (uintptr_t)page + PAGE, 1, 0);
        munmap(page, PAGE);
        usermm_unregister(own, 1);
        usleep(50);
    }
    usermm_close(own);
    return NULL;
}

static void give_and_wait(long round) {
    must(map_at(place, PAGES, MAP_FIXED) == place, "mmap");
    munmap(place + PAGES * PAGE, PAGES * PAGE);
    uint64_t start = (uintptr_t)place;
    must(usermm_register(device, start, start + PAGES * PAGE, 1, USERMM_REFUSE_HOLES) == 0, "usermm_register");
    must(usermm_generation(device, &seen) == 0, "usermm_generation");
    atomic_store(&turn, 2 * round + 1);
    current->give();
    while (atomic_load(&turn) != 2 * round + 2)
        ;
    usermm_unregister(device, 1);
}

static long run(const struct scenario *scenario, long trials, int noise) {
    pthread_t taker, *noisy = calloc((size_t)noise + 1, sizeof *noisy);
    current = scenario;
    stale = taken = 0;
    atomic_store(&turn, 0);
    atomic_store(&stop, false);
    must(pthread_create(&taker, NULL, take, NULL) == 0, "pthread_create");
    for (int i = 0; i < noise; i++)
        must(pthread_create(&noisy[i], NULL, make_noise, NULL) == 0, "pthread_create");
    for (long round = 0; round < trials; round++)
        give_and_wait(round);
    atomic_store(&stop, true);
    pthread_join(taker, NULL);
    for (int i = 0; i < noise; i++)
        pthread_join(noisy[i], NULL);
    free(noisy);
    printf("another thread, %s, %d more threads: %ld stale of %ld\n", scenario->name, noise, stale, taken);
    return stale;
}

int main(int argc, char **argv) {
    long trials = argc > 1 ? atol(argv[1]) : 20000, found = 0;
    int noise = argc > 2 ? atoi(argv[2]) : 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    must(usermm_open(2, O_RDONLY, &device) == 0, "usermm_open");
    place = map_at(NULL, 2 * PAGES, 0);
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++)
        found += run(&scenarios[i], trials, noise);
    usermm_close(device);
    return found != 0;
}
