/*
 * Another thread: the giver unmaps, and the taker, which gets the address while the giver may still be inside its call,
 * does nothing but load the mapped generation. Usage: reuse_loads TRIALS mmap|raw|malloc, the way in which the taker
 * gets its memory. Prints "TAKEN stale STALE": how often it got the address, and how often the load did not show it.
 * The status is 0 whatever is found; what must be found depends on the way.
 */
#include <malloc.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "abi.h"
#include "raw.h"

#define SMALL (4 * PAGE)
#define LARGE (1ul << 20) /* above malloc's threshold: a mapping of its own, given back by free */
#define PATIENCE 2000     /* allocations that the taker makes in a round before the round is given up */

static char *volatile place;
static volatile uint64_t *generation;
static uint64_t seen;
static atomic_long turn; /* odd: given and taken; even: the taker is done */
static atomic_bool stop;
static bool by_malloc, by_raw;
static long taken, stale;

static bool take_mapping(void) {
    char *wanted = place;
    while ((by_raw ? raw_map_at : map_at)(wanted, SMALL, MAP_FIXED_NOREPLACE) != wanted)
        ; /* still mapped */
    return true;
}

/* The kernel gives out the highest hole that fits: the block that has just been freed, if nothing else was. */
static bool take_block(void) {
    for (int i = 0; i < PATIENCE; i++) {
        char *block = malloc(LARGE);
        if (block == place)
            return true;
        free(block);
    }
    return false;
}

static void *take(void *unused) {
    (void)unused;
    for (long mine = 1;; mine += 2) {
        while (atomic_load(&turn) != mine)
            if (atomic_load(&stop))
                return NULL;
        if (by_malloc ? take_block() : take_mapping()) {
            stale += *generation == seen;
            taken++;
        } else
            place = NULL;
        atomic_store(&turn, mine + 1);
    }
}

static void give_and_wait(int device, long round) {
    size_t length = by_malloc ? LARGE : SMALL;
    if (!place)
        place = by_malloc ? malloc(LARGE) : map_at(FAR, SMALL, MAP_FIXED);
    char *mine = place, *first = (char *)(((uintptr_t)mine + PAGE - 1) & ~(PAGE - 1));
    must(register_range(device, first, length - PAGE, 1) == 0, "register");
    seen = *generation;
    atomic_store(&turn, 2 * round + 1);
    if (by_malloc)
        free(mine);
    else
        munmap(mine, length);
    while (atomic_load(&turn) != 2 * round + 2)
        ;
    must(unregister(device, 1) == 0, "unregister");
}

int main(int argc, char **argv) {
    must(argc == 3, "arguments: TRIALS mmap|raw|malloc");
    long trials = atol(argv[1]);
    by_malloc = strcmp(argv[2], "malloc") == 0;
    by_raw = strcmp(argv[2], "raw") == 0;
    mallopt(M_MMAP_THRESHOLD, 1 << 19); /* and so it stays where it is */
    int device = open_device(O_RDONLY);
    generation = (volatile uint64_t *)map_generation(device);
    pthread_t taker;
    must(pthread_create(&taker, NULL, take, NULL) == 0, "pthread_create");
    for (long round = 0; round < trials; round++)
        give_and_wait(device, round);
    atomic_store(&stop, true);
    pthread_join(taker, NULL);
    close(device);
    printf("%ld stale %ld\n", taken, stale);
    return 0;
}
