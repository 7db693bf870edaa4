#define _GNU_SOURCE
#include "test.h"

#include <dirent.h>
#include <errno.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_DEVICES 64
#define MAX_MAPPINGS 64

static jmp_buf abandon;
static usermm_device *devices[MAX_DEVICES];
static struct {
    char *start;
    size_t bytes;
} mappings[MAX_MAPPINGS];
static size_t device_count, mapping_count;
static atomic_bool fault_fired;
static void (*at_end)(void);

#ifdef USERMM_FAULT_INJECTION
#include "../src/sys.h"

static const char *only;
static long fail_at, fail_every;
static atomic_long calls;

/* Before any thread: USERMM_FAULT_AT=n fails the n-th call, USERMM_FAULT_EVERY=n every n-th; _CALL says of which kind.
 */
__attribute__((constructor)) static void read_environment(void) {
    const char *at = getenv("USERMM_FAULT_AT"), *every = getenv("USERMM_FAULT_EVERY");
    only = getenv("USERMM_FAULT_CALL");
    fail_at = at ? atol(at) : 0;
    fail_every = every ? atol(every) : 0;
}

bool um_fault(const char *call) {
    if (only && strcmp(only, call) != 0)
        return false;
    long number = atomic_fetch_add(&calls, 1) + 1;
    if (number != fail_at && !(fail_every && number % fail_every == 0))
        return false;
    atomic_store(&fault_fired, true);
    return true;
}
#endif

void test_check(bool condition, const char *text, const char *file, int line) {
    if (condition)
        return;
    fprintf(stderr, "%s:%d: not true: %s\n", file, line, text);
    _exit(1);
}

long test_call(long result, const char *text, const char *file, int line) {
    if (result >= 0)
        return result;
    if (atomic_load(&fault_fired))
        longjmp(abandon, 1);
    fprintf(stderr, "%s:%d: %s: %s\n", file, line, text, strerror((int)-result));
    _exit(1);
}

usermm_device *test_open(int abi, int flags) {
    CHECK(device_count < MAX_DEVICES);
    CALL(usermm_open(abi, flags, &devices[device_count]));
    return devices[device_count++];
}

char *test_map(size_t pages) {
    CHECK(mapping_count < MAX_MAPPINGS);
    char *start = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(start != MAP_FAILED);
    mappings[mapping_count].start = start;
    mappings[mapping_count++].bytes = pages * PAGE;
    return start;
}

void test_register(usermm_device *device, void *start, size_t bytes, uint64_t cookie) {
    uint64_t address = (uint64_t)(uintptr_t)start;
    CALL(usermm_register(device, address, address + bytes, cookie, USERMM_REFUSE_HOLES | USERMM_REFUSE_FILES));
}

uint64_t test_generation(usermm_device *device) {
    uint64_t generation = 0;
    CALL(usermm_generation(device, &generation));
    return generation;
}

size_t test_read(usermm_device *device, struct usermm_event *events, size_t capacity) {
    ssize_t size = usermm_read(device, events, capacity * sizeof *events);
    return size == -EAGAIN ? 0 : (size_t)CALL(size) / sizeof *events;
}

__attribute__((noinline)) static size_t entries(const char *path) {
    size_t count = 0;
    DIR *directory = opendir(path);
    while (directory && readdir(directory))
        count++;
    if (directory)
        closedir(directory);
    return count;
}

void test_at_end(void (*clean)(void)) {
    at_end = clean;
}

bool test_fault_fired(void) {
    return atomic_load(&fault_fired);
}

static void release_all(void) {
    if (at_end)
        at_end();
    at_end = NULL;
    while (device_count)
        usermm_close(devices[--device_count]);
    while (mapping_count--)
        munmap(mappings[mapping_count].start, mappings[mapping_count].bytes);
    mapping_count = 0;
}

static void run(const struct test *test) {
    struct usermm_counts counts;
    size_t fds = entries("/proc/self/fd"), threads = entries("/proc/self/task");
    const char *outcome = "ok";
    if (setjmp(abandon) == 0)
        test->run();
    else
        outcome = "ok (a fault was reported)";
    release_all();
    usermm_count(&counts);
    CHECK(counts.devices == 0 && counts.regions == 0 && counts.monitors == 0);
    CHECK(entries("/proc/self/fd") == fds);
#ifndef __SANITIZE_THREAD__ /* which starts a thread of its own at some point */
    for (int attempt = 0; attempt < 1000 && entries("/proc/self/task") != threads; attempt++)
        usleep(1000); /* a joined thread leaves /proc a moment later */
    CHECK(entries("/proc/self/task") == threads);
#else
    (void)threads;
#endif
    printf("%s %s\n", outcome, test->name);
}

/* Exit status 3 tells the fault sweep that the n-th call was never made: there is nothing left to fail. */
int test_main(const struct test *tests, size_t count) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    alarm(300); /* a deadlock must not look like a slow machine for ever */
    for (size_t i = 0; i < count; i++)
        run(&tests[i]);
    return getenv("USERMM_FAULT_AT") && !atomic_load(&fault_fired) ? 3 : 0;
}
