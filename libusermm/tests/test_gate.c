/* Plain loads of the mapped generation: exact, whatever happens to the page and to its address. */
#define _GNU_SOURCE
#include "gate.h"

static void by_munmap(char *page) {
    munmap(page, PAGE);
}
static void by_system_call(char *page) {
    syscall(SYS_munmap, page, PAGE);
}
static void by_mapping_over(char *page) {
    map_at(page, MAP_PRIVATE);
}
static void by_moving(char *page) {
    CHECK(mremap(page, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, page + 2 * PAGE) != MAP_FAILED);
}
static void by_discarding(char *page) {
    madvise(page, PAGE, MADV_DONTNEED);
}
static void by_freeing(char *page) {
    madvise(page, PAGE, MADV_FREE);
}

static void a_load_sees_the_own_call(void) {
    static void (*const causes[])(char *) = {by_munmap, by_system_call, by_mapping_over,
                                             by_moving, by_discarding,  by_freeing};
    usermm_device *device = test_open(2, O_RDONLY);
    generation_page page = map_generation(device);
    char *arena = test_map(8), *memory = arena + PAGE;
    for (unsigned i = 0; i < ROUNDS * 6; i++) {
        map_at(memory, MAP_PRIVATE);
        test_register(device, memory, PAGE, 1);
        uint64_t before = *page;
        causes[i % 6](memory);
        uint64_t after = *page, told = test_generation(device);
        CHECK(after > before && told == after); /* a move is reported twice */
        CALL(usermm_unregister(device, 1));
        map_at(memory, MAP_PRIVATE); /* without a region: not counted, and no watch is left */
    }
}

static void *load_on(void *argument) {
    generation_page page = argument;
    uintptr_t mistakes = 0;
    for (uint64_t last = 0; atomic_load(&going);) {
        uint64_t now = *page;
        if (now < last)
            mistakes++;
        last = now;
    }
    return (void *)mistakes;
}

/* An empty page would be a 0. */
static void loads_of_other_threads_never_go_back(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    generation_page page = map_generation(device);
    char *memory = test_map(1);
    test_register(device, memory, PAGE, 1);
    for (int i = 0; i < LOADERS; i++)
        start_thread(load_on, (void *)(uintptr_t)(i ? page : map_generation(device)));
    changes_are_seen(device, page, memory, ROUNDS);
    atomic_store(&going, false);
    while (thread_count) {
        void *mistakes;
        pthread_join(threads[--thread_count], &mistakes);
        CHECK(!mistakes);
    }
}

struct arrival {
    char *memory;
    _Atomic(generation_page) page;
    atomic_bool ready;
    uint64_t seen;
};

static void *change_and_load(void *argument) {
    struct arrival *arrival = argument;
    atomic_store(&arrival->ready, true);
    munmap(arrival->memory, PAGE);
    generation_page page;
    while (!(page = atomic_load(&arrival->page)) && atomic_load(&going))
        sched_yield();
    arrival->seen = page ? *page : 0;
    return NULL;
}

/* The page is made while the reader may have read, and not applied: what it read has to be waited for. */
static void a_page_that_is_mapped_meanwhile_is_exact(void) {
    test_open(2, O_RDONLY); /* the monitor stays */
    test_at_end(clean);
    for (unsigned i = 0; i < ROUNDS / 4; i++) {
        static struct arrival arrival;
        memset(&arrival, 0, sizeof arrival);
        CALL(usermm_open(2, O_RDONLY, &passing));
        arrival.memory = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        long result = usermm_register(passing, (uintptr_t)arrival.memory, (uintptr_t)arrival.memory + PAGE, 1, 0);
        start_thread(change_and_load, &arrival);
        while (!atomic_load(&arrival.ready))
            sched_yield();
        for (volatile unsigned spin = 0; spin < i % 64 * 100; spin++)
            ;
        CALL(result);
        generation_page page = map_generation(passing);
        atomic_store(&arrival.page, page);
        while (thread_count)
            pthread_join(threads[--thread_count], NULL);
        CHECK(test_generation(passing) == 1);
        CHECK(arrival.seen == 1);
        usermm_close(passing);
        passing = NULL;
        CHECK(*page == 1);
        unmap_generation(page);
    }
}

static void *make_noise(void *argument) {
    usermm_device *device = argument;
    while (atomic_load(&going)) {
        char *memory = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        usermm_register(device, (uintptr_t)memory, (uintptr_t)memory + PAGE, (uintptr_t)memory, 0);
        munmap(memory, PAGE);
        usermm_unregister(device, (uintptr_t)memory);
    }
    return NULL;
}

/* The window is open for another thread's change most of the time: who leaves in it must not take the page along. */
static void a_device_may_be_closed_meanwhile(void) {
    char *memory = test_map(1);
    start_thread(make_noise, test_open(2, O_RDONLY));
    for (unsigned i = 0; i < 2 * ROUNDS; i++) {
        CALL(usermm_open(2, O_RDONLY, &passing));
        generation_page page = map_generation(passing);
        test_register(passing, memory, PAGE, 1);
        changes_are_seen(passing, page, memory, 1);
        usermm_close(passing);
        passing = NULL;
        CHECK(*page == 1 || test_fault_fired());
        unmap_generation(page);
    }
}

/* With the monitor at work for another thread: it meets mappings in the middle of a move. */
static void a_page_may_be_moved(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    generation_page page = map_generation(device);
    char *memory = test_map(1), *places = test_map(4);
    test_register(device, memory, PAGE, 1);
    start_thread(make_noise, test_open(2, O_RDONLY));
    mapped_count--; /* `places` is unmapped as a whole */
    for (unsigned i = 0; i < ROUNDS / 4; i++) {
        char *place = places + i % 2 * 2 * PAGE;
        void *moved = mremap((void *)(uintptr_t)page, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place);
        CHECK(moved == place);
        page = moved;
        changes_are_seen(device, page, memory, 2);
    }
}

static void a_discarded_page_comes_back(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    generation_page page = map_generation(device);
    void *address = (void *)(uintptr_t)page;
    char *memory = test_map(1);
    test_register(device, memory, PAGE, 1);
    start_thread(make_noise, test_open(2, O_RDONLY));
    for (unsigned i = 0; i < ROUNDS / 4; i++) {
        changes_are_seen(device, page, memory, 1);
        madvise(address, PAGE, i % 2 ? MADV_DONTNEED : MADV_WILLNEED);
        uint64_t now = *page;
        CHECK(test_generation(device) == now);
    }
}

static void many_mappings_come_and_go(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    generation_page stays = map_generation(device);
    char *memory = test_map(1);
    test_register(device, memory, PAGE, 1);
    for (int i = 0; i < 100; i++)
        map_generation(device);
    changes_are_seen(device, stays, memory, 1);
    for (size_t i = 0; i < mapped_count; i++)
        CHECK(*mapped[i] == 1);
    while (mapped_count > 1)
        unmap_generation(mapped[1]);
    for (int i = 0; i < 100; i++) {
        generation_page page = map_generation(device);
        changes_are_seen(device, page, memory, 1);
        unmap_generation(page);
    }
    changes_are_seen(device, stays, memory, 1);
}

/* Without the right to lock so much there is nothing to see. MADV_DONTNEED refuses what is locked. */
static void all_memory_may_be_locked(void) {
    usermm_device *device = test_open(2, O_RDONLY), *later;
    generation_page page = map_generation(device);
    char *memory = test_map(2);
    test_register(device, memory, 2 * PAGE, 1);
    if (mlockall(MCL_CURRENT | MCL_FUTURE)) {
        puts("# not run: mlockall needs CAP_IPC_LOCK or a larger RLIMIT_MEMLOCK");
        return;
    }
    later = test_open(2, O_RDONLY);
    generation_page second = map_generation(later);
    test_register(later, memory + PAGE, PAGE, 2);
    for (unsigned i = 0; i < ROUNDS / 4; i++) {
        uint64_t before = *page;
        map_at(memory, MAP_PRIVATE);
        uint64_t after = *page;
        CHECK(test_generation(device) == after && after == before + 1);
        CALL(usermm_unregister(device, 1));
        test_register(device, memory, 2 * PAGE, 1);
    }
    munmap(memory + PAGE, PAGE);
    uint64_t now = *second;
    CHECK(test_generation(later) == now && now == 1);
    munlockall();
    changes_are_seen(device, page, memory, 10);
}

/* A program that registers all of a range in which its own page happens to be: the rest is watched. */
static void a_region_may_contain_the_page(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    char *memory = test_map(4);
    void *moved =
        mremap((void *)(uintptr_t)map_generation(device), PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, memory + PAGE);
    mapped_count--;
    CHECK(moved == memory + PAGE);
    long strict = usermm_register(device, (uintptr_t)memory, (uintptr_t)memory + 4 * PAGE, 1, USERMM_REFUSE_FILES);
    CHECK(strict == -EOPNOTSUPP || CALL(strict) < 0);
    CALL(usermm_register(device, (uintptr_t)memory, (uintptr_t)memory + 4 * PAGE, 1, 0));
    changes_are_seen(device, moved, memory, 5);
    changes_are_seen(device, moved, memory + 2 * PAGE, 5);
    CALL(usermm_register(device, (uintptr_t)moved, (uintptr_t)moved + PAGE, 2, 0));
    munmap(memory + 3 * PAGE, PAGE);
    uint64_t now = *(generation_page)moved;
    CHECK(test_generation(device) == now && now == 11);
}

static int nth_userfaultfd(int n) {
    char path[64], name[64];
    for (int fd = 0; fd < FDS; fd++) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        ssize_t size = readlink(path, name, sizeof name);
        if (size > 0 && strncmp(name, "anon_inode:[userfaultfd]", (size_t)size) == 0 && n-- == 0)
            return fd;
    }
    return -1;
}

/* The first is that of the watched memory, the second the gate's. Loads are exact again once the reader has noticed. */
static void fails_closed_without(int n) {
    for (int fd = 0; fd < FDS; fd++)
        was_open[fd] = fcntl(fd, F_GETFD) >= 0;
    test_at_end(clean);
    CALL(usermm_open(2, O_RDONLY, &passing)); /* closed before what it then leaves open */
    closes_all = true;
    generation_page page = map_generation(passing);
    char *memory = test_map(2);
    test_register(passing, memory, 2 * PAGE, 1);
    changes_are_seen(passing, page, memory, 1);
    start_thread(load_on, (void *)(uintptr_t)page);
    usleep(20000); /* the reader sleeps in poll by then, which keeps the file alive */
    uint64_t before = *page, generation;
    CHECK(close(nth_userfaultfd(n)) == 0);
    munmap(memory, PAGE);
    CHECK(usermm_check(passing, before, USERMM_PROBE_WAIT) == -EIO && usermm_generation(passing, &generation) == -EIO);
    CHECK(*page == before + 1 || test_fault_fired());
    before = *page;
    munmap(memory + PAGE, PAGE);
    CHECK(*page == before);
    stop_threads();
}

static void a_lost_userfaultfd_lets_loads_go_on(void) {
    fails_closed_without(0);
}
static void a_lost_gate_lets_loads_go_on(void) {
    fails_closed_without(1);
}

int main(void) {
    static const struct test tests[] = {
        TEST(a_load_sees_the_own_call),
        TEST(loads_of_other_threads_never_go_back),
        TEST(a_page_that_is_mapped_meanwhile_is_exact),
        TEST(a_device_may_be_closed_meanwhile),
        TEST(a_page_may_be_moved),
        TEST(a_discarded_page_comes_back),
        TEST(many_mappings_come_and_go),
        TEST(all_memory_may_be_locked),
        TEST(a_region_may_contain_the_page),
        TEST(a_lost_userfaultfd_lets_loads_go_on),
        TEST(a_lost_gate_lets_loads_go_on),
    };
    return test_main(tests, sizeof tests / sizeof *tests);
}
