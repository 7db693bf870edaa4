/* What the tests of the gate share: mappings of the generation, threads and a child, given back in the end. */
#ifndef GATE_H
#define GATE_H

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "test.h"

#define FDS 64
#define MAPPINGS 128
#define LOADERS 3

/* With injected faults the program runs a thousand times; without, a late load has to be met. */
#ifdef USERMM_FAULT_INJECTION
#define ROUNDS 4
#else
#define ROUNDS 1000
#endif

typedef const volatile uint64_t *generation_page;

static generation_page mapped[MAPPINGS];
static size_t mapped_count;
static pthread_t threads[LOADERS];
static size_t thread_count;
static atomic_bool going;
static pid_t child;
static int to_child = -1; /* a socket */
static usermm_device *passing;
static bool was_open[FDS], closes_all;

static inline void stop_threads(void) {
    atomic_store(&going, false);
    while (thread_count)
        pthread_join(threads[--thread_count], NULL);
}

static inline int end_child(void) {
    int status = 0;
    if (to_child >= 0)
        close(to_child);
    to_child = -1;
    pid_t ended = child > 0 ? waitpid(child, &status, 0) : 0;
    child = 0;
    return ended < 0 ? -1 : status;
}

static inline void clean(void) {
    stop_threads();
    end_child();
    munlockall();
    if (passing)
        usermm_close(passing);
    passing = NULL;
    while (mapped_count)
        munmap((void *)(uintptr_t)mapped[--mapped_count], PAGE);
    for (int fd = 0; closes_all && fd < FDS; fd++)
        if (!was_open[fd])
            close(fd);
    closes_all = false;
}

static inline generation_page map_generation(usermm_device *device) {
    void *page;
    CHECK(mapped_count < MAPPINGS);
    test_at_end(clean);
    CALL(usermm_map(device, PAGE, PROT_READ, MAP_SHARED, 0, &page));
    return mapped[mapped_count++] = page;
}

static inline void unmap_generation(generation_page page) {
    size_t i = 0;
    while (mapped[i] != page)
        i++;
    mapped[i] = mapped[--mapped_count];
    CHECK(munmap((void *)(uintptr_t)page, PAGE) == 0);
}

static inline void start_thread(void *(*run)(void *), void *argument) {
    test_at_end(clean);
    atomic_store(&going, true);
    CHECK(pthread_create(&threads[thread_count++], NULL, run, argument) == 0);
}

/* A load right after the own call. When a fault has made the monitor fail, test_generation ends the test. */
static inline void changes_are_seen(usermm_device *device, generation_page page, char *memory, unsigned rounds) {
    for (unsigned i = 0; i < rounds; i++) {
        uint64_t before = *page;
        CHECK(madvise(memory, PAGE, MADV_DONTNEED) == 0);
        uint64_t after = *page, told = test_generation(device);
        CHECK(after == before + 1 && told == after);
    }
}

static inline char *map_at(char *address, int flags) {
    return mmap(address, PAGE, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

#endif
