/*
 * Everything at once, for ThreadSanitizer: each thread has a device, with regions of its own and regions in a commons
 * that all threads change. It reads, registers, unregisters, maps the page and loads it, opens and closes.
 * Usage: stress_notifications NOTIFICATIONS; exit status 1 when a generation was late, or an event lost or not owed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "usermm.h"

#define PAGE 4096ul
#define THREADS 8
#define ROUNDS 20 /* after each, the last device is closed and the monitor stops */
#define COMMONS 32
#define ARENAS 0x6000000000ul /* far below what the kernel hands out: nobody else maps into their holes */
#define ARENA_DISTANCE (1ul << 30)
#define OWN_COOKIE 1000 /* smaller ones are pages of the commons */

/* Changes of one page come one after the other: number n has begun, number n has ended. */
static struct {
    pthread_mutex_t lock;
    _Atomic uint64_t begun, ended;
} changes[COMMONS];
static char *commons;
static atomic_long late, lost, not_owed;

struct worker {
    pthread_t thread;
    unsigned random;
    long steps;
    usermm_device *device;
    const volatile uint64_t *page;    /* the mapped generation */
    char *arena;                      /* its second page is the region */
    bool is_registered, is_own_told;  /* the own region */
    bool is_in_commons[COMMONS];      /* registered, and no event came yet */
    uint64_t changes_before[COMMONS]; /* of those that it need not be told of */
};

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

static unsigned random_below(struct worker *worker, unsigned limit) {
    worker->random = worker->random * 1664525u + 1013904223u;
    return (worker->random >> 12) % limit;
}

static void open_device(struct worker *worker) {
    void *page;
    must(usermm_open(1 + (int)random_below(worker, 2), O_RDONLY | O_NONBLOCK, &worker->device) == 0, "usermm_open");
    must(usermm_map(worker->device, PAGE, PROT_READ, MAP_SHARED, 0, &page) == 0, "usermm_map");
    worker->page = page;
    worker->is_registered = worker->is_own_told = false;
    for (unsigned at = 0; at < COMMONS; at++)
        worker->is_in_commons[at] = false;
}

static void close_device(struct worker *worker) {
    munmap((void *)worker->page, PAGE);
    usermm_close(worker->device);
}

static void take_event(struct worker *worker, const struct usermm_event *event) {
    uint64_t cookie = event->user_cookie_counter;
    if (event->type == USERMM_EVENT_LAST)
        return;
    if (cookie == OWN_COOKIE && worker->is_registered) {
        worker->is_own_told = true;
    } else if (cookie < COMMONS && worker->is_in_commons[cookie]) {
        must(usermm_unregister(worker->device, cookie) == 0, "usermm_unregister");
        worker->is_in_commons[cookie] = false;
    } else {
        not_owed++;
    }
}

/* What has ended before the read and begun after the registration is among what is read. */
static void drain(struct worker *worker) {
    struct usermm_event events[8];
    uint64_t ended[COMMONS];
    ssize_t size;
    for (unsigned at = 0; at < COMMONS; at++)
        ended[at] = atomic_load(&changes[at].ended);
    while ((size = usermm_read(worker->device, events, sizeof events)) > 0)
        for (ssize_t i = 0; i < size / (ssize_t)sizeof *events; i++)
            take_event(worker, &events[i]);
    must(size == -EAGAIN, "usermm_read");
    for (unsigned at = 0; at < COMMONS; at++)
        lost += worker->is_in_commons[at] && ended[at] > worker->changes_before[at];
}

static void join_commons(struct worker *worker, unsigned at) {
    uint64_t start = (uintptr_t)commons + at * PAGE;
    if (worker->is_in_commons[at])
        return;
    must(usermm_register(worker->device, start, start + PAGE, at, USERMM_REFUSE_HOLES) == 0, "usermm_register");
    worker->changes_before[at] = atomic_load(&changes[at].begun);
    worker->is_in_commons[at] = true;
}

static void change_commons(unsigned at, bool discard) {
    char *page = commons + at * PAGE;
    pthread_mutex_lock(&changes[at].lock);
    uint64_t number = atomic_fetch_add(&changes[at].begun, 1) + 1;
    if (discard)
        madvise(page, PAGE, MADV_DONTNEED);
    else
        map_at(page, MAP_FIXED);
    atomic_store(&changes[at].ended, number);
    pthread_mutex_unlock(&changes[at].lock);
}

static void invalidate(char *page, unsigned how) {
    if (how == 0)
        munmap(page, PAGE);
    else if (how == 1)
        syscall(SYS_munmap, page, PAGE);
    else if (how == 2)
        map_at(page, MAP_FIXED);
    else if (how == 3)
        must(mremap(page, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, page + 2 * PAGE) != MAP_FAILED, "mremap");
    else
        madvise(page, PAGE, MADV_DONTNEED);
}

/* The own region goes, by a call of this thread: the mapped page and the generation show it, and the event is there. */
static void change_own(struct worker *worker) {
    char *page = map_at(worker->arena + PAGE, MAP_FIXED);
    uint64_t before = 0, after = 0, start = (uintptr_t)page;
    must(usermm_register(worker->device, start, start + PAGE, OWN_COOKIE, USERMM_REFUSE_HOLES) == 0, "usermm_register");
    worker->is_registered = true;
    usermm_generation(worker->device, &before);
    uint64_t loaded = *worker->page;
    invalidate(page, random_below(worker, 5));
    late += *worker->page == loaded;
    late += usermm_generation(worker->device, &after) != 0 || after == before;
    bool is_read = random_below(worker, 2);
    if (is_read)
        drain(worker);
    lost += is_read && !worker->is_own_told;
    must(usermm_unregister(worker->device, OWN_COOKIE) == 0, "usermm_unregister");
    worker->is_registered = worker->is_own_told = false;
}

static void visit(struct worker *worker) {
    usermm_device *other;
    void *page;
    uint64_t generation;
    must(usermm_open(2, O_RDONLY, &other) == 0, "usermm_open");
    must(usermm_map(other, PAGE, PROT_READ, MAP_PRIVATE, 0, &page) == 0, "usermm_map");
    must(usermm_register(other, (uintptr_t)commons, (uintptr_t)commons + COMMONS * PAGE, 1, 0) == 0, "usermm_register");
    change_commons(random_below(worker, COMMONS), true);
    usermm_generation(other, &generation);
    late += generation == 0 || *(volatile uint64_t *)page == 0;
    usermm_close(other);
    munmap(page, PAGE);
}

static void *work(void *argument) {
    struct worker *worker = argument;
    open_device(worker);
    for (long step = 0; step < worker->steps; step++) {
        unsigned what = random_below(worker, 1000), at = random_below(worker, COMMONS);
        if (what < 600) {
            change_own(worker);
        } else if (what < 990) {
            join_commons(worker, at);
            change_commons(random_below(worker, COMMONS), what & 1);
        } else if (what < 997) {
            visit(worker);
        } else {
            close_device(worker);
            open_device(worker);
        }
    }
    drain(worker);
    close_device(worker);
    return NULL;
}

static void run_round(struct worker *workers, long steps) {
    for (int i = 0; i < THREADS; i++) {
        workers[i].steps = steps;
        must(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0, "pthread_create");
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(workers[i].thread, NULL);
}

int main(int argc, char **argv) {
    uint64_t wanted = argc > 1 ? strtoull(argv[1], NULL, 10) : 20000;
    static struct worker workers[THREADS];
    struct usermm_counts counts = {0};
    commons = mmap(NULL, COMMONS * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < COMMONS; i++)
        pthread_mutex_init(&changes[i].lock, NULL);
    for (unsigned i = 0; i < THREADS; i++) {
        workers[i].random = i + 1;
        workers[i].arena = mmap((void *)(ARENAS + i * ARENA_DISTANCE), 8 * PAGE, PROT_NONE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        must(workers[i].arena != MAP_FAILED, "mmap");
    }
    for (long steps = (long)(wanted / THREADS / ROUNDS) + 1; counts.notifications < wanted; usermm_count(&counts))
        run_round(workers, steps);
    printf("%llu notifications, %d threads: %ld late, %ld lost, %ld not owed\n",
           (unsigned long long)counts.notifications, THREADS, late, lost, not_owed);
    return late || lost || not_owed;
}
