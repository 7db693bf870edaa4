/*
 * notifications MODE THREADS: how many watched one-page munmaps a second THREADS threads do together; MODE is bare or usermm.
 * Each round prints one figure. Pages are mapped and registered before the clock starts.
 */
#include <pthread.h>

#include "bench.h"

#include "bare.h"
#include "usermm.h"

#define MAX_THREADS 64

static usermm_device *device;
static int uffd;
static pthread_barrier_t prepared, done;

struct worker {
    pthread_t thread;
    size_t pages;
    uint64_t first_cookie;
};

static void prepare(const struct worker *worker, char *memory) {
    for (size_t i = 0; i < worker->pages; i++) {
        char *page = memory + i * PAGE_BYTES;
        *(volatile char *)page = 1;
        uint64_t start = (uint64_t)(uintptr_t)page;
        if (device)
            need(usermm_register(device, start, start + PAGE_BYTES, worker->first_cookie + i, 0) == 0, "usermm_register");
        else
            bare_watch(uffd, page, PAGE_BYTES);
    }
}

static void *work(void *argument) {
    const struct worker *worker = argument;
    char *memory = map_pages(worker->pages);
    prepare(worker, memory);
    pthread_barrier_wait(&prepared);
    for (size_t i = 0; i < worker->pages; i++)
        need(munmap(memory + i * PAGE_BYTES, PAGE_BYTES) == 0, "munmap");
    pthread_barrier_wait(&done);
    for (size_t i = 0; device && i < worker->pages; i++)
        need(usermm_unregister(device, worker->first_cookie + i) == 0, "usermm_unregister");
    return NULL;
}

static double events_per_s(struct worker *workers, unsigned threads, size_t events) {
    size_t pages = events / threads ? events / threads : 1;
    pthread_barrier_init(&prepared, NULL, threads + 1);
    pthread_barrier_init(&done, NULL, threads + 1);
    for (unsigned i = 0; i < threads; i++) {
        workers[i].pages = pages;
        workers[i].first_cookie = i * pages;
        need(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0, "pthread_create");
    }
    pthread_barrier_wait(&prepared);
    uint64_t start_ns = now_ns();
    pthread_barrier_wait(&done);
    uint64_t took_ns = now_ns() - start_ns;
    for (unsigned i = 0; i < threads; i++)
        pthread_join(workers[i].thread, NULL);
    return (double)(pages * threads) * 1e9 / (double)took_ns;
}

int main(int count, char **arguments) {
    struct worker workers[MAX_THREADS];
    size_t events;
    need(count == 3, "two arguments");
    unsigned threads = (unsigned)atoi(arguments[2]);
    need(threads >= 1 && threads <= MAX_THREADS, "the number of threads");
    if (strcmp(arguments[1], "usermm") == 0)
        need(usermm_open(USERMM_ABI_UMMUNOTIFY, 0, &device) == 0, "usermm_open");
    else
        uffd = bare_start();
    while ((events = next_round())) {
        printf("%.0f\n", events_per_s(workers, threads, events));
        fflush(stdout);
    }
    return 0;
}
