/* What programs do to the mapped page and to all their memory; each load afterwards has to be exact as before. */
#include <pthread.h>
#include <sys/resource.h>

#include "../abi.h"
#include "../raw.h"
#include "noise.h"

#define DONTNEED_LOCKED 24 /* MADV_DONTNEED_LOCKED of Linux 5.18: the other one refuses locked memory */

static int device;
static const volatile uint64_t *generation;
static char *page;

static void begin(int flags) {
    device = open_device(O_RDONLY | O_NONBLOCK);
    void *mapped = mmap(NULL, PAGE, PROT_READ, MAP_SHARED | flags, device, 0);
    must(mapped != MAP_FAILED, "mmap");
    generation = mapped;
    page = map_pages(1);
    must(register_range(device, page, PAGE, 1) == 0, "register");
}

/* A load that follows at once, many times: a page that the library lost sight of would show old numbers, or 0. */
static void is_exact_after(int advice) {
    for (int i = 0; i < 5000; i++) {
        struct event events[2];
        uint64_t before = *generation;
        long result = RAW(madvise, page, PAGE, advice, 0, 0, 0);
        uint64_t after = *generation;
        must(result == 0, "madvise");
        expect(after == before + 1);
        if (i % 10 == 0)
            expect(read(device, events, sizeof events) == 64);
    }
}

static void is_exact(void) {
    is_exact_after(MADV_DONTNEED);
}

static void plain(void) {
    begin(0);
    is_exact();
}

static void populated(void) {
    begin(MAP_POPULATE | MAP_LOCKED);
    is_exact();
}

static void all_is_locked(void) {
    must(mlockall(MCL_CURRENT | MCL_FUTURE) == 0, "mlockall");
    begin(0);
    is_exact_after(DONTNEED_LOCKED);
}

static void all_is_locked_later(void) {
    begin(0);
    is_exact();
    must(mlockall(MCL_CURRENT | MCL_FUTURE) == 0, "mlockall");
    is_exact_after(DONTNEED_LOCKED);
    must(munlockall() == 0, "munlockall");
    is_exact();
    expect(mlock((const void *)(uintptr_t)generation, 8) == 0 || errno == ENOMEM || errno == EAGAIN || errno == EFAULT);
    is_exact();
}

static void moved(void) {
    begin(0);
    is_exact();
    for (int i = 0; i < 100; i++) {
        void *old = (void *)(uintptr_t)generation, *place = FAR + (size_t)(i % 2) * 16 * PAGE;
        void *now = mremap(old, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place);
        expect(now == place);
        generation = now;
        uint64_t before = *generation;
        RAW(madvise, page, PAGE, MADV_DONTNEED, 0, 0, 0);
        expect(*generation == before + 1);
    }
    is_exact();
}

/* The page is moved, mapped and unmapped while the monitor is at work for another thread. */
static void moved_meanwhile(void) {
    pthread_t noise;
    begin(0);
    must(pthread_create(&noise, NULL, make_noise, NULL) == 0, "pthread_create");
    moved();
    for (int i = 0; i < 2000; i++) {
        uint64_t before = *generation;
        const volatile uint64_t *second = map_generation(device);
        expect(*second == before);
        RAW(madvise, page, PAGE, MADV_DONTNEED, 0, 0, 0);
        expect(*second == before + 1 && *generation == before + 1);
        expect(munmap((void *)(uintptr_t)second, 8) == 0);
    }
    stop = true;
    pthread_join(noise, NULL);
}

static void discarded(void) {
    begin(0);
    void *mapped = (void *)(uintptr_t)generation;
    is_exact();
    uint64_t before = *generation;
    (void)!madvise(mapped, PAGE, MADV_DONTNEED);
    expect(*generation == before);
    (void)!madvise(mapped, PAGE, MADV_WILLNEED);
    (void)!madvise(mapped, PAGE, MADV_PAGEOUT);
    expect(*generation == before);
    is_exact();
    expect(mprotect(mapped, PAGE, PROT_NONE) == 0);
    RAW(madvise, page, PAGE, MADV_DONTNEED, 0, 0, 0);
    expect(mprotect(mapped, PAGE, PROT_READ) == 0);
    expect(*generation == before + 5001);
    is_exact();
}

/* A system call may meet the page in the moment in which it is out: EFAULT, and nothing else than that or the truth. */
static void by_system_calls(void) {
    int pair[2];
    long refused = 0;
    pthread_t noise;
    begin(0);
    must(pipe(pair) == 0, "pipe");
    must(pthread_create(&noise, NULL, make_noise, NULL) == 0, "pthread_create");
    for (uint64_t i = 1; i <= 20000; i++) {
        uint64_t seen = 0;
        RAW(madvise, page, PAGE, MADV_DONTNEED, 0, 0, 0);
        if (write(pair[1], (const void *)(uintptr_t)generation, 8) == 8)
            expect(read(pair[0], &seen, 8) == 8 && seen == i);
        else {
            expect(errno == EFAULT);
            refused++;
        }
    }
    stop = true;
    pthread_join(noise, NULL);
    printf("%ld of 20000 system calls met the gate\n", refused);
}

static void many_mappings(void) {
    const volatile uint64_t *all[200];
    begin(0);
    for (int i = 0; i < 200; i++)
        all[i] = map_generation(device);
    for (int i = 0; i < 200; i++) {
        RAW(madvise, page, PAGE, MADV_DONTNEED, 0, 0, 0);
        for (int j = 0; j < 200; j++)
            expect(*all[j] == (uint64_t)i + 1);
        expect(munmap((void *)(uintptr_t)all[i], 8) == 0);
        all[i] = map_generation(device);
    }
    is_exact();
}

/* A client that writes to its view has broken its own view, if it can; nobody else's. */
static void written(void) {
    begin(0);
    const volatile uint64_t *mine = map_generation(device);
    if (mprotect((void *)(uintptr_t)mine, PAGE, PROT_READ | PROT_WRITE) == 0)
        *(volatile uint64_t *)mine = 12345;
    is_exact();
    expect(*map_generation(device) == *generation);
}

static void little_memory(void) {
    struct rlimit limit = {64ul << 20, 64ul << 20};
    begin(0);
    must(setrlimit(RLIMIT_AS, &limit) == 0, "setrlimit");
    is_exact();
    int second = open(DEVICE_2, O_RDONLY | O_NONBLOCK);
    expect(second >= 0 || errno == ENOMEM);
    is_exact();
}

static const struct test_case cases[] = {
    {"plain", plain},
    {"populated", populated},
    {"all_is_locked", all_is_locked},
    {"all_is_locked_later", all_is_locked_later},
    {"moved", moved},
    {"moved_meanwhile", moved_meanwhile},
    {"discarded", discarded},
    {"by_system_calls", by_system_calls},
    {"many_mappings", many_mappings},
    {"written", written},
    {"little_memory", little_memory},
};

int main(int argc, char **argv) {
    return run_case(cases, sizeof cases / sizeof *cases, argc, argv);
}
