/*
 * clean MODE: what a program pays under the preload library. For each round one line of ns:
 *   plain   read() of /dev/null, read() of an empty pipe, ioctl() of a pipe, and mmap() + munmap(); no device is opened
 *   thread  the same, and a second thread sleeps in poll, as the monitor does
 *   opened  the same, while a device is open and watches a page
 *   device  one load of the mapped generation, REGISTER and UNREGISTER as a pair, REGISTER alone (both of a page that
 *           is watched already), REGISTER of pages that no one watched, read() of an empty queue
 */
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "bench.h"

#define REGISTER 0x40205502ul
#define UNREGISTER 0x40085503ul
#define FIONREAD_ 0x541Bul
#define MAPPINGS_SHARE 10 /* mmap is dear: a tenth of the operations */
#define NEW_SHARE 10      /* and so are mappings to look through, for the kernel */
#define APART 4           /* pages, so that each is a mapping of its own once it is watched */
#define LOADS 100         /* a load is cheap: so many times the operations */

struct region {
    uint64_t start, end, cookie;
    uint32_t flags, reserved;
};

static int device = -1, null, ends[2];
static const volatile uint64_t *generation;
static char *page;

static void open_device(void) {
    device = open("/dev/ummunotify", O_RDONLY | O_NONBLOCK);
    need(device >= 0, "open /dev/ummunotify");
    void *mapped = mmap(NULL, 8, PROT_READ, MAP_SHARED, device, 0);
    need(mapped != MAP_FAILED, "mmap");
    generation = mapped;
    page = map_pages(1);
}

static void register_page(const char *start, uint64_t cookie) {
    struct region region = {(uintptr_t)start, (uintptr_t)start + PAGE_BYTES, cookie, 0, 0};
    need(ioctl(device, REGISTER, &region) == 0, "REGISTER");
}

static void unregister(uint64_t cookie) {
    need(ioctl(device, UNREGISTER, &cookie) == 0, "UNREGISTER");
}

static double per_operation(uint64_t start_ns, size_t operations) {
    return (double)(now_ns() - start_ns) / (double)operations;
}

static double read_null(size_t operations) {
    char byte;
    uint64_t start_ns = now_ns();
    for (size_t i = 0; i < operations; i++)
        need(read(null, &byte, 1) == 0, "read /dev/null");
    return per_operation(start_ns, operations);
}

static double read_pipe(size_t operations) {
    char byte;
    uint64_t start_ns = now_ns();
    for (size_t i = 0; i < operations; i++)
        need(read(ends[0], &byte, 1) == -1, "read a pipe");
    return per_operation(start_ns, operations);
}

static double ioctl_pipe(size_t operations) {
    int waiting;
    uint64_t start_ns = now_ns();
    for (size_t i = 0; i < operations; i++)
        need(ioctl(ends[0], FIONREAD_, &waiting) == 0, "ioctl");
    return per_operation(start_ns, operations);
}

static double map_and_unmap(size_t operations) {
    operations = operations / MAPPINGS_SHARE + 1;
    uint64_t start_ns = now_ns();
    for (size_t i = 0; i < operations; i++)
        need(munmap(map_pages(1), PAGE_BYTES) == 0, "munmap");
    return per_operation(start_ns, operations);
}

static double loads(size_t operations) {
    uint64_t sum = 0, start_ns = now_ns();
    for (size_t i = 0; i < operations * LOADS; i++)
        sum += *generation;
    double ns = per_operation(start_ns, operations * LOADS);
    need(sum == 0, "a generation that nothing moved");
    return ns;
}

static double pairs(size_t operations) {
    uint64_t start_ns = now_ns();
    for (size_t i = 0; i < operations; i++) {
        register_page(page, 1000 + i);
        unregister(1000 + i);
    }
    return per_operation(start_ns, operations);
}

static double registrations(size_t operations) {
    uint64_t start_ns = now_ns();
    for (size_t i = 0; i < operations; i++)
        register_page(page, 1000 + i);
    double ns = per_operation(start_ns, operations);
    for (size_t i = 0; i < operations; i++)
        unregister(1000 + i);
    return ns;
}

static double new_registrations(size_t operations) {
    operations = operations / NEW_SHARE + 1;
    char *pages = map_pages(operations * APART);
    uint64_t start_ns = now_ns();
    for (size_t i = 0; i < operations; i++)
        register_page(pages + i * APART * PAGE_BYTES, 1000 + i);
    double ns = per_operation(start_ns, operations);
    for (size_t i = 0; i < operations; i++)
        unregister(1000 + i);
    need(munmap(pages, operations * APART * PAGE_BYTES) == 0, "munmap");
    return ns;
}

static double empty_reads(size_t operations) {
    char events[64];
    uint64_t start_ns = now_ns();
    for (size_t i = 0; i < operations; i++)
        need(read(device, events, sizeof events) == -1, "a read of nothing");
    return per_operation(start_ns, operations);
}

static void *sleep_in_poll(void *unused) {
    poll(NULL, 0, -1);
    return unused;
}

int main(int count, char **arguments) {
    size_t operations;
    need(count == 2, "one argument");
    int of_device = strcmp(arguments[1], "device") == 0;
    if (of_device || strcmp(arguments[1], "opened") == 0) {
        open_device();
        register_page(page, 1);
    }
    if (strcmp(arguments[1], "thread") == 0) {
        pthread_t sleeper;
        need(pthread_create(&sleeper, NULL, sleep_in_poll, NULL) == 0, "pthread_create");
    }
    null = open("/dev/null", O_RDONLY);
    need(pipe(ends) == 0 && fcntl(ends[0], F_SETFL, O_NONBLOCK) == 0, "pipe");
    while ((operations = next_round())) {
        if (of_device)
            printf("%.3f %.1f %.1f %.1f %.1f\n", loads(operations), pairs(operations), registrations(operations),
                   new_registrations(operations), empty_reads(operations));
        else
            printf("%.2f %.2f %.2f %.1f\n", read_null(operations), read_pipe(operations), ioctl_pipe(operations),
                   map_and_unmap(operations));
        fflush(stdout);
    }
    return 0;
}
