/* The page when its device is closed, in forked children, and where other memory has its address. */
#define _GNU_SOURCE
#include "gate.h"

/*
 * Loads all the time, and says for each generation that its parent sends whether it sees the same; then whether its own
 * device has its own. A load of the page that the monitor takes out would make an empty one, for the parent, too.
 */
static int follow(int parent, generation_page page, char *memory) {
    uint64_t told, last = 0;
    usermm_device *own;
    void *own_page;
    for (;;) {
        ssize_t size = recv(parent, &told, sizeof told, MSG_DONTWAIT);
        uint64_t now = *page;
        if (now < last)
            return 1;
        last = now;
        bool same = now == told;
        if (size == sizeof told)
            send(parent, &same, sizeof same, MSG_NOSIGNAL);
        else if (size >= 0 || errno != EAGAIN)
            break;
    }
    if (!test_children_can_start_threads)
        return 0;
    if (usermm_open(2, O_RDONLY, &own) || usermm_map(own, 8, PROT_READ, MAP_SHARED, 0, &own_page))
        return 2;
    if (usermm_register(own, (uintptr_t)memory, (uintptr_t)memory + PAGE, 1, 0) || *(generation_page)own_page != 0)
        return 3;
    munmap(memory, PAGE);
    return *(generation_page)own_page == 1 && own_page != (void *)(uintptr_t)page ? 0 : 4;
}

static void fork_follower(generation_page page, char *memory) {
    int ends[2];
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    child = fork();
    if (child == 0) {
        close(ends[1]);
        _exit(follow(ends[0], page, memory));
    }
    CHECK(child > 0);
    close(ends[0]);
    to_child = ends[1];
}

static void child_loads(uint64_t generation) {
    bool same = false;
    CHECK(send(to_child, &generation, sizeof generation, MSG_NOSIGNAL) == sizeof generation);
    CHECK(recv(to_child, &same, sizeof same, 0) == sizeof same && same);
}

/* The child's mapping shows what the parent's does, also what comes later, and hinders nothing. */
static void a_child_follows_its_parent(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    generation_page page = map_generation(device);
    char *memory = test_map(2);
    test_register(device, memory, PAGE, 1);
    changes_are_seen(device, page, memory, 3);
    fork_follower(page, memory + PAGE);
    for (unsigned i = 0; i < ROUNDS / 4; i++) {
        child_loads(test_generation(device));
        changes_are_seen(device, page, memory, 1);
    }
    CHECK(end_child() == 0);
}

/* The kernel hands out the highest hole, so this one's turn comes, unless somebody else took it. */
static bool map_again_at(generation_page address, usermm_device *device) {
    while (mapped_count < 64)
        if (map_generation(device) == address)
            return true;
    puts("# not run: the address was taken by others");
    return false;
}

/* What a child does to all of its memory must not make an empty page in the file. */
static void a_child_may_lock_its_memory(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    generation_page page = map_generation(device);
    char *memory = test_map(1);
    int ends[2];
    test_register(device, memory, PAGE, 1);
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    child = fork();
    if (child == 0) {
        char byte;
        close(ends[1]);
        while (recv(ends[0], &byte, 1, MSG_DONTWAIT) < 0)
            if (mlockall(MCL_CURRENT) == 0)
                munlockall();
        _exit(0);
    }
    CHECK(child > 0);
    close(ends[0]);
    to_child = ends[1];
    changes_are_seen(device, page, memory, ROUNDS * 5);
    CHECK(end_child() == 0);
}

/* One device's page is mapped where another's was: what was noted first is not what a child has to find there. */
static void a_child_finds_what_is_mapped_there_now(void) {
    usermm_device *devices[] = {test_open(2, O_RDONLY), test_open(2, O_RDONLY)};
    char *memory = test_map(2);
    test_register(devices[0], memory, PAGE, 1);
    for (int i = 0; i < 2; i++)
        unmap_generation(map_generation(devices[i])); /* the first mapping of each takes room for more */
    for (int i = 0; i < 2; i++) {
        generation_page page = map_generation(devices[1 - i]);
        unmap_generation(page);
        if (!map_again_at(page, devices[i]))
            return;
        madvise(memory, PAGE, MADV_DONTNEED);
        uint64_t now = test_generation(devices[i]);
        CHECK(*page == now);
        fork_follower(page, memory + PAGE);
        child_loads(now);
        CHECK(end_child() == 0);
    }
}

static void the_page_outlives_its_device(void) {
    CALL(usermm_open(2, O_RDONLY, &passing));
    test_at_end(clean);
    char *memory = test_map(2);
    generation_page page = map_generation(passing), second = map_generation(passing);
    test_register(passing, memory, PAGE, 1);
    changes_are_seen(passing, page, memory, 5);
    fork_follower(page, memory + PAGE); /* born before */
    child_loads(5);
    munmap(memory, PAGE);
    usermm_shutdown(passing);
    uint64_t last = *page;
    CHECK(last == 6 || test_fault_fired());
    child_loads(last);
    CHECK(end_child() == 0);
    usermm_close(passing);
    passing = NULL;
    CHECK(*page == last && *second == last);
    fork_follower(second, memory + PAGE); /* and after */
    child_loads(last);
    CHECK(end_child() == 0);
    madvise((void *)(uintptr_t)page, PAGE, MADV_DONTNEED);
    CHECK(*page == last);
}

static bool holds_pattern(const char *memory) {
    for (size_t i = 0; i < PAGE; i++)
        if (memory[i] != (char)(i * 7 + 1))
            return false;
    return true;
}

/* What a child inherits: the pattern, or with MADV_DONTFORK nothing at all. */
static int look(const char *memory, bool is_there) {
    unsigned char resident;
    bool found = mincore((void *)(uintptr_t)memory, PAGE, &resident) == 0;
    return found != is_there || (found && !holds_pattern(memory));
}

static void child_finds(const char *memory, bool is_there) {
    child = fork();
    if (child == 0)
        _exit(look(memory, is_there));
    CHECK(end_child() == 0);
}

/* Unmapped behind us: nothing that we do to mappings of the page may hit what is there now. */
static void other_memory_at_the_address_is_left_alone(void) {
    CALL(usermm_open(2, O_RDONLY, &passing));
    test_at_end(clean);
    char *memory = test_map(1), *others[2];
    generation_page stays = map_generation(passing);
    test_register(passing, memory, PAGE, 1);
    for (int i = 0; i < 2; i++) {
        others[i] = map_at((char *)(uintptr_t)map_generation(passing), MAP_PRIVATE); /* stays in `mapped`, for clean */
        for (size_t at = 0; at < PAGE; at++)
            others[i][at] = (char)(at * 7 + 1);
    }
    CHECK(madvise(others[1], PAGE, MADV_DONTFORK) == 0);
    changes_are_seen(passing, stays, memory, 20);
    child_finds(others[0], true);
    CHECK(holds_pattern(others[0]) && holds_pattern(others[1]));
    usermm_close(passing);
    passing = NULL;
    child_finds(others[0], true);
    child_finds(others[1], false);
    CHECK(holds_pattern(others[0]) && holds_pattern(others[1]));
}

int main(void) {
    static const struct test tests[] = {
        TEST(the_page_outlives_its_device),
        TEST(a_child_follows_its_parent),
        TEST(a_child_may_lock_its_memory),
        TEST(a_child_finds_what_is_mapped_there_now),
        TEST(other_memory_at_the_address_is_left_alone),
    };
    return test_main(tests, sizeof tests / sizeof *tests);
}
