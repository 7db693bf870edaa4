/*
 * A client of the devices that makes the mistake it is told to make, and no other; "right" makes none.
 * The functions that make calls are not inlined: their names stand in the trace.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/ummunot.h>
#include <linux/ummunotify.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define OWN_NAME __attribute__((noinline, noclone, visibility("default")))

static int device;
static const volatile uint64_t *generation;

static _Noreturn void fail(const char *what) {
    perror(what);
    exit(99);
}

OWN_NAME void open_device(const char *path) {
    device = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (device < 0)
        fail(path);
}

OWN_NAME void map_generation(void) {
    void *page = mmap(NULL, sizeof *generation, PROT_READ, MAP_SHARED, device, 0);
    if (page == MAP_FAILED)
        fail("mmap of the generation");
    generation = page;
}

OWN_NAME int watch(const void *start, size_t length, uint64_t cookie) {
    struct ummunotify_register_ioctl region = {
        .start = (uintptr_t)start,
        .end = (uintptr_t)start + length,
        .user_cookie = cookie,
        .flags = 0xDEADBEEF,
    };
    return ioctl(device, UMMUNOTIFY_REGISTER_REGION, &region);
}

OWN_NAME int watch_v1(const void *start, size_t length, uint64_t cookie, uint32_t version) {
    struct ummunot_register_ioctl region = {
        .intf_version = version,
        .start = (uintptr_t)start,
        .end = (uintptr_t)start + length,
        .user_cookie = cookie,
    };
    return ioctl(device, UMMUNOT_REGISTER_REGION, &region);
}

OWN_NAME int forget(uint64_t cookie) {
    return ioctl(device, UMMUNOTIFY_UNREGISTER_REGION, &cookie);
}

OWN_NAME int forget_v1(uint64_t cookie) {
    return ioctl(device, UMMUNOT_UNREGISTER_REGION, &cookie);
}

/* Reads until LAST or EAGAIN, one event at a time as Open MPI does; unregisters what went. */
OWN_NAME void drain(void) {
    struct ummunotify_event event;
    while (read(device, &event, sizeof event) == sizeof event) {
        if (event.type == UMMUNOTIFY_EVENT_TYPE_LAST)
            return;
        if (forget(event.user_cookie_counter))
            fail("UNREGISTER after an event");
    }
    if (errno != EAGAIN)
        fail("read");
}

OWN_NAME ssize_t read_events(size_t size) {
    static struct ummunotify_event events[128];
    return read(device, events, size);
}

static char *memory(size_t length) {
    char *start = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED)
        fail("mmap");
    memset(start, 1, length);
    return start;
}

static void right(void) {
    map_generation();
    char *a = memory(4 * PAGE), *b = memory(2 * PAGE);
    if (watch(a, 4 * PAGE, 1) || watch(b, 2 * PAGE, 2))
        fail("REGISTER");
    uint64_t seen = *generation;
    munmap(a, 4 * PAGE);
    if (*generation == seen)
        fail("the generation did not move");
    drain();
    madvise(b, PAGE, MADV_DONTNEED);
    drain();
    munmap(b, 2 * PAGE);
}

static void last_not_reached(void) {
    char *a = memory(PAGE), *b = memory(PAGE);
    watch(a, PAGE, 1);
    watch(b, PAGE, 2);
    munmap(a, PAGE);
    munmap(b, PAGE);
    read_events(sizeof(struct ummunotify_event));
    forget(1);
    forget(2);
}

static void goes_on(void) {
    char *a = memory(PAGE), *b = memory(2 * PAGE);
    watch(a, PAGE, 1);
    munmap(a, PAGE);
    read_events(sizeof(struct ummunotify_event));
    forget(1);
    watch(b, PAGE, 2);
    watch(b + PAGE, PAGE, 3);
    drain();
    forget(2);
    forget(3);
}

static void not_drained(void) {
    map_generation();
    char *a = memory(PAGE);
    watch(a, PAGE, 1);
    munmap(a, PAGE);
    if (*generation != 1)
        fail("the generation is not 1");
    forget(1);
}

static void never_unregistered(void) {
    watch(memory(2 * PAGE), 2 * PAGE, 0xABC);
}

static void cookie_leaked(void) {
    char *a = memory(PAGE);
    watch(a, PAGE, 1);
    munmap(a, PAGE);
    read_events(PAGE);
}

static void cookie_in_use(void) {
    char *a = memory(2 * PAGE);
    watch(a, PAGE, 1);
    watch(a + PAGE, PAGE, 1);
    forget(1);
}

static void cookie_unknown(void) {
    watch(memory(PAGE), PAGE, 1);
    forget(1);
    forget(1);
}

static void exchange_late(void) {
    uint32_t features = 0;
    watch(memory(PAGE), PAGE, 1);
    ioctl(device, UMMUNOTIFY_EXCHANGE_FEATURES, &features);
    forget(1);
}

/* As zhpe does: the end of one byte, inclusive. */
static void empty_region(void) {
    watch(memory(PAGE), 0, 1);
    forget(1);
}

static void short_read(void) {
    read_events(31);
}

static void bad_pointer(void) {
    ioctl(device, UMMUNOTIFY_REGISTER_REGION, NULL);
}

static void bad_buffer(void) {
    char *a = memory(PAGE);
    watch(a, PAGE, 1);
    munmap(a, PAGE);
    if (read(device, NULL, PAGE) != -1 || errno != EFAULT)
        fail("read into nothing");
    forget(1);
}

static void wrong_request(void) {
    watch_v1(memory(PAGE), PAGE, 1, UMMUNOT_INTF_VERSION);
}

static void open_for_writing(void) {
    if (open("/dev/ummunotify", O_RDWR) >= 0)
        fail("open for writing succeeded");
}

static void must_refuse(size_t length, int protection, off_t offset, int reason) {
    if (mmap(NULL, length, protection, MAP_SHARED, device, offset) != MAP_FAILED || errno != reason)
        fail("a mapping that must be refused");
}

static void mmap_too_long(void) {
    must_refuse(2 * PAGE, PROT_READ, 0, EINVAL);
}

static void mmap_writable(void) {
    must_refuse(8, PROT_READ | PROT_WRITE, 0, EACCES);
}

static void mmap_of_nothing(void) {
    must_refuse(0, PROT_READ, 0, EINVAL);
}

static void mmap_further_on(void) {
    must_refuse(8, PROT_READ, PAGE, EINVAL);
}

static void mmap_odd_offset(void) {
    must_refuse(8, PROT_READ, 1, EINVAL);
}

static void parents_device(void) {
    pid_t child = fork();
    if (child == 0) {
        watch(memory(PAGE), PAGE, 1);
        _exit(0);
    }
    waitpid(child, NULL, 0);
}

static void exec_leaks(void) {
    watch(memory(PAGE), PAGE, 1);
    execl("/proc/self/exe", "mistakes", "right", (char *)NULL);
    fail("exec");
}

/* Version 1. */

static void right_v1(void) {
    char *a = memory(PAGE);
    watch_v1(a, PAGE, 1, UMMUNOT_INTF_VERSION);
    munmap(a, PAGE);
    while (read_events(sizeof(struct ummunot_event)) > 0)
        continue;
    forget_v1(1);
}

static void last_not_reached_v1(void) {
    char *a = memory(PAGE);
    watch_v1(a, PAGE, 1, UMMUNOT_INTF_VERSION);
    munmap(a, PAGE);
    read_events(sizeof(struct ummunot_event));
    forget_v1(1);
}

static void interface_version(void) {
    watch_v1(memory(PAGE), PAGE, 1, 2);
}

static const struct {
    const char *name;
    void (*make)(void);
    int abi;
} mistakes[] = {
    {"right", right, 2},
    {"last-not-reached", last_not_reached, 2},
    {"goes-on", goes_on, 2},
    {"not-drained", not_drained, 2},
    {"never-unregistered", never_unregistered, 2},
    {"cookie-leaked", cookie_leaked, 2},
    {"cookie-in-use", cookie_in_use, 2},
    {"cookie-unknown", cookie_unknown, 2},
    {"exchange-late", exchange_late, 2},
    {"empty-region", empty_region, 2},
    {"short-read", short_read, 2},
    {"bad-pointer", bad_pointer, 2},
    {"bad-buffer", bad_buffer, 2},
    {"wrong-request", wrong_request, 2},
    {"open-for-writing", open_for_writing, 2},
    {"mmap-too-long", mmap_too_long, 2},
    {"mmap-writable", mmap_writable, 2},
    {"mmap-of-nothing", mmap_of_nothing, 2},
    {"mmap-further-on", mmap_further_on, 2},
    {"mmap-odd-offset", mmap_odd_offset, 2},
    {"parents-device", parents_device, 2},
    {"exec-leaks", exec_leaks, 2},
    {"right-v1", right_v1, 1},
    {"last-not-reached-v1", last_not_reached_v1, 1},
    {"interface-version", interface_version, 1},
};

int main(int argc, char **argv) {
    for (size_t i = 0; i < sizeof mistakes / sizeof *mistakes; i++)
        if (argc == 2 && strcmp(argv[1], mistakes[i].name) == 0) {
            open_device(mistakes[i].abi == 1 ? "/dev/ummunot" : "/dev/ummunotify");
            mistakes[i].make();
            close(device);
            return 0;
        }
    fprintf(stderr, "usage: mistakes KIND\n");
    return 99;
}
