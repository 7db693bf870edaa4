/* Threads that know nothing of Python and unmap what they are told to: the address is free before they are done. */
#ifndef GIVERS_H
#define GIVERS_H

#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/mman.h>

#define GIVERS 3
#define SPINS 2000 /* before a giver sleeps */

static struct giver {
    pthread_t thread;
    sem_t wake;
    atomic_bool asked, stop;
    char *start, *aside; /* aside: moved there by mremap(2) first, if that can be done; or NULL */
    size_t length;
} givers[GIVERS];

static void give(const struct giver *giver) {
    char *start = giver->start;
    if (giver->aside) {
        void *moved = mremap(start, giver->length, giver->length, MREMAP_MAYMOVE | MREMAP_FIXED, giver->aside);
        if (moved != MAP_FAILED)
            start = moved; /* else it is several mappings */
    }
    munmap(start, giver->length);
}

static void *serve(void *argument) {
    struct giver *giver = argument;
    while (!atomic_load(&giver->stop)) {
        for (int i = 0; i < SPINS && !atomic_load(&giver->asked); i++)
            ;
        if (!atomic_load(&giver->asked))
            sem_wait(&giver->wake);
        if (!atomic_load(&giver->asked))
            continue;
        give(giver);
        atomic_store(&giver->asked, false);
    }
    return NULL;
}

static bool start_givers(char *aside, size_t stride) {
    for (int i = 0; i < GIVERS; i++) {
        givers[i] = (struct giver){.aside = aside + (size_t)i * stride};
        sem_init(&givers[i].wake, 0, 0);
        if (pthread_create(&givers[i].thread, NULL, serve, &givers[i]))
            return false;
    }
    return true;
}

static void stop_givers(void) {
    for (int i = 0; i < GIVERS; i++) {
        atomic_store(&givers[i].stop, true);
        sem_post(&givers[i].wake);
        pthread_join(givers[i].thread, NULL);
    }
}

static void await_givers(void) {
    for (int i = 0; i < GIVERS; i++)
        while (atomic_load(&givers[i].asked))
            sched_yield();
}

/* False: all are busy. Returns before anything is unmapped, or after; nobody can tell. */
static bool ask_a_giver(char *start, size_t length, bool moves, char *aside, size_t stride) {
    for (int i = 0; i < GIVERS; i++) {
        if (atomic_load(&givers[i].asked))
            continue;
        givers[i].start = start;
        givers[i].length = length;
        givers[i].aside = moves ? aside + (size_t)i * stride : NULL;
        atomic_store(&givers[i].asked, true);
        sem_post(&givers[i].wake);
        return true;
    }
    return false;
}

#endif
