/* A shared object, so that its loops run in the process, with the threads and files, that the Python rows run in. */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

#include "bench.h"

#include "bare.h"
#include "usermm.h"

#define EXPORT __attribute__((visibility("default")))

static int uffd;
static usermm_device *device;

EXPORT void calls_start(void) {
    char *mine = map_pages(1), *theirs = map_pages(1);
    uffd = bare_open();
    bare_watch(uffd, mine, PAGE_BYTES);
    need(usermm_open(USERMM_ABI_UMMUNOTIFY, 0, &device) == 0, "usermm_open");
    uint64_t start = (uint64_t)(uintptr_t)theirs;
    need(usermm_register(device, start, start + PAGE_BYTES, 1, 0) == 0, "usermm_register");
}

/* ns for one quiescence probe: a write-protect call of length 0, which answers EINVAL while nothing changes. */
EXPORT double calls_ioctl(unsigned long count) {
    uint64_t start_ns = now_ns();
    for (unsigned long i = 0; i < count; i++) {
        struct uffdio_writeprotect nothing = {.range = {0, 0}};
        need(ioctl(uffd, UFFDIO_WRITEPROTECT, &nothing) == -1 && errno == EINVAL, "the probe");
    }
    return (double)(now_ns() - start_ns) / (double)count;
}

static double check_ns(unsigned long count, enum usermm_probe probe) {
    uint64_t seen;
    need(usermm_generation(device, &seen) == 0, "usermm_generation");
    uint64_t start_ns = now_ns();
    for (unsigned long i = 0; i < count; i++)
        need(usermm_check(device, seen, probe) == 1, "usermm_check");
    return (double)(now_ns() - start_ns) / (double)count;
}

EXPORT double calls_check(unsigned long count) {
    return check_ns(count, USERMM_PROBE_WAIT);
}

EXPORT double calls_check_without_probe(unsigned long count) {
    return check_ns(count, USERMM_PROBE_NONE);
}

EXPORT double calls_generation(unsigned long count) {
    uint64_t generation;
    uint64_t start_ns = now_ns();
    for (unsigned long i = 0; i < count; i++)
        need(usermm_generation(device, &generation) == 0, "usermm_generation");
    return (double)(now_ns() - start_ns) / (double)count;
}
