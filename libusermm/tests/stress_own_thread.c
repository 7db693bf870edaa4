/*
 * Own thread: when a thread's own call has returned, its generation has moved. Each thread has its own device, or the
 * others' changes would hide a late one. Usage: stress_own_thread TRIALS THREADS; exit status 1 when any was late.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "usermm.h"

#define PAGE 4096ul

static void must(int condition, const char *what) {
    if (!condition) {
        perror(what);
        _exit(2);
    }
}

static void *map_at(void *address, int flags) {
    void *page = mmap(address, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    must(page != MAP_FAILED, "mmap");
    return page;
}

static void by_libc(char *page) {
    munmap(page, PAGE);
}
static void by_system_call(char *page) {
    syscall(SYS_munmap, page, PAGE);
}
static void by_map_fixed(char *page) {
    map_at(page, MAP_FIXED);
}
static void by_mremap(char *page) {
    char *moved = mremap(page, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, page + 2 * PAGE);
    must(moved != MAP_FAILED, "mremap");
}
static void by_dontneed(char *page) {
    madvise(page, PAGE, MADV_DONTNEED);
}
static void by_brk(char *page) {
    must(brk(page) == 0, "brk");
}

static const struct cause {
    const char *name;
    void (*invalidate)(char *page);
} causes[] = {
    {"munmap", by_libc},   {"raw munmap", by_system_call}, {"MAP_FIXED", by_map_fixed},
    {"mremap", by_mremap}, {"MADV_DONTNEED", by_dontneed}, {"brk", by_brk},
};

struct worker {
    pthread_t thread;
    const struct cause *cause;
    long trials, late;
};

/* An arena of the thread's own: nobody else maps in between, and a moved page has a place to go. */
static void *work(void *argument) {
    struct worker *worker = argument;
    usermm_device *device;
    int is_brk = worker->cause->invalidate == by_brk;
    must(usermm_open(2, O_RDONLY, &device) == 0, "usermm_open");
    char *arena = mmap(NULL, 8 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *top = (char *)(((uintptr_t)sbrk(0) + PAGE - 1) & ~(PAGE - 1)), *page = is_brk ? top : arena + PAGE;
    for (long trial = 0; trial < worker->trials; trial++) {
        uint64_t seen, now;
        if (is_brk)
            must(brk(top + PAGE) == 0, "brk");
        else
            map_at(page, MAP_FIXED);
        must(usermm_register(device, (uintptr_t)page, (uintptr_t)page + PAGE, 1, USERMM_REFUSE_HOLES) == 0, "register");
        usermm_generation(device, &seen);
        worker->cause->invalidate(page);
        if (trial & 1)
            worker->late += usermm_check(device, seen, USERMM_PROBE_NONE) != 0;
        else
            worker->late += usermm_generation(device, &now) != 0 || now == seen;
        usermm_unregister(device, 1);
    }
    usermm_close(device);
    munmap(arena, 8 * PAGE);
    return NULL;
}

static long run(const struct cause *cause, long trials, int threads) {
    struct worker *workers = calloc((size_t)threads, sizeof *workers);
    usermm_device *keeps_the_monitor;
    long late = 0;
    must(usermm_open(2, O_RDONLY, &keeps_the_monitor) == 0, "usermm_open");
    for (int i = 0; i < threads; i++) {
        workers[i].cause = cause;
        workers[i].trials = trials / threads;
        must(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0, "pthread_create");
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(workers[i].thread, NULL);
        late += workers[i].late;
    }
    usermm_close(keeps_the_monitor);
    free(workers);
    printf("own thread, %s, %d threads: %ld late of %ld\n", cause->name, threads, late, trials);
    return late;
}

int main(int argc, char **argv) {
    long trials = argc > 1 ? atol(argv[1]) : 20000, late = 0;
    int threads = argc > 2 ? atoi(argv[2]) : 4;
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (size_t i = 0; i < sizeof causes / sizeof *causes; i++)
        if (threads == 1 || causes[i].invalidate != by_brk) /* one heap, one thread */
            late += run(&causes[i], trials, threads);
    return late != 0;
}
