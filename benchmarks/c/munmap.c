/*
 * munmap MODE CALLER_CPU READER_CPU: the time of munmap of one touched page, and of nothing else. -1 leaves a thread unpinned.
 *   alone      no userfaultfd, no second thread
 *   sleeper    no userfaultfd, a second thread that sleeps in poll
 *   bare       watched, read by the bare floor
 *   usermm     watched by usermm
 *   unwatched  not watched, while usermm watches another page of the process
 */
#include <poll.h>
#include <pthread.h>
#include <unistd.h>

#include "bench.h"

#include "bare.h"
#include "usermm.h"

#define MAX_OPERATIONS 10000

enum mode { ALONE, SLEEPER, BARE, USERMM, UNWATCHED, MODES };
static const char *const mode_names[MODES] = {"alone", "sleeper", "bare", "usermm", "unwatched"};

static usermm_device *device;
static int uffd;
static char *place;
static uint64_t samples_ns[MAX_OPERATIONS];

/* A hole between two inaccessible pages, so that in every mode the page has no neighbour that it could merge with. */
static void make_place(void) {
    char *guards = map_pages(3);
    need(mprotect(guards, 3 * PAGE_BYTES, PROT_NONE) == 0, "mprotect");
    place = guards + PAGE_BYTES;
    need(munmap(place, PAGE_BYTES) == 0, "munmap");
}

static char *map_in_place(void) {
    char *page = mmap(place, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    need(page == place, "mmap");
    return page;
}

static void *sleep_in_poll(void *argument) {
    int fds[2];
    need(pipe(fds) == 0, "pipe");
    struct pollfd fd = {.fd = fds[0], .events = POLLIN};
    poll(&fd, 1, -1);
    return argument;
}

static void watch(char *page, uint64_t cookie) {
    uint64_t start = (uint64_t)(uintptr_t)page;
    need(usermm_register(device, start, start + PAGE_BYTES, cookie, USERMM_REFUSE_HOLES | USERMM_REFUSE_FILES) == 0,
         "usermm_register");
}

static void start(enum mode mode) {
    pthread_t thread;
    if (mode == SLEEPER)
        need(pthread_create(&thread, NULL, sleep_in_poll, NULL) == 0, "pthread_create");
    if (mode == BARE)
        uffd = bare_start();
    if (mode == USERMM || mode == UNWATCHED) {
        need(usermm_open(USERMM_ABI_UMMUNOTIFY, 0, &device) == 0, "usermm_open");
        watch(map_pages(1), UINT64_MAX);
    }
}

static uint64_t once(enum mode mode, uint64_t cookie) {
    char *page = map_in_place();
    *(volatile char *)page = 1;
    if (mode == BARE)
        bare_watch(uffd, page, PAGE_BYTES);
    else if (mode == USERMM)
        watch(page, cookie);
    uint64_t before_ns = now_ns();
    int result = munmap(page, PAGE_BYTES);
    uint64_t after_ns = now_ns();
    need(result == 0, "munmap");
    if (mode == USERMM)
        need(usermm_unregister(device, cookie) == 0, "usermm_unregister");
    return after_ns - before_ns;
}

/* Every munmap that should have been watched was. */
static void check_seen(enum mode mode, uint64_t before, size_t count) {
    uint64_t generation;
    if (mode != USERMM && mode != UNWATCHED)
        return;
    need(usermm_generation(device, &generation) == 0, "usermm_generation");
    need(generation - before == (mode == USERMM ? count : 0), "one notification for each watched munmap");
}

int main(int count, char **arguments) {
    size_t operations;
    unsigned mode = 0;
    need(count == 4, "three arguments");
    while (mode < MODES && strcmp(arguments[1], mode_names[mode]) != 0)
        mode++;
    need(mode < MODES, "the mode's name");
    pin(atoi(arguments[3])); /* the reader inherits it */
    start(mode);
    pin(atoi(arguments[2]));
    make_place(); /* after all other mappings, or one of them would take the hole */
    while ((operations = next_round())) {
        uint64_t generation = 0;
        need(operations <= MAX_OPERATIONS, "the number of operations");
        if (device)
            usermm_generation(device, &generation);
        for (size_t i = 0; i < operations; i++)
            samples_ns[i] = once(mode, i);
        check_seen(mode, generation, operations);
        print_samples(samples_ns, operations);
    }
    return 0;
}
