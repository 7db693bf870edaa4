/* The registration cache against a device that keeps account of what it was given. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "test.h"
#include "usermm_cache.h"

#define MOST_HANDLES 4096

/* A device: handle n is a range that was registered and not yet taken back. */
static struct account {
    struct {
        uint64_t address, length;
    } ranges[MOST_HANDLES];
    _Atomic uint64_t last_handle;
    atomic_int live, forgotten;
    int refuse_beyond; /* how many registrations the device has room for; 0: any number */
    void (*during)(struct account *account, uint64_t address, uint64_t length);
} account;

static usermm_cache *cache;

static int register_memory(void *context, uint64_t address, uint64_t length, uint64_t *ret_handle) {
    CHECK(context == &account);
    if (account.refuse_beyond && atomic_load(&account.live) >= account.refuse_beyond)
        return -ENOSPC;
    if (account.during)
        account.during(&account, address, length);
    uint64_t handle = atomic_fetch_add(&account.last_handle, 1) + 1;
    CHECK(handle < MOST_HANDLES);
    account.ranges[handle].address = address;
    account.ranges[handle].length = length;
    atomic_fetch_add(&account.live, 1);
    *ret_handle = handle;
    return 0;
}

static void deregister_memory(void *context, uint64_t handle) {
    CHECK(context == &account && account.ranges[handle].length);
    account.ranges[handle].length = 0;
    atomic_fetch_sub(&account.live, 1);
}

static void forget_memory(void *context, uint64_t handle) {
    CHECK(context == &account && account.ranges[handle].length);
    atomic_fetch_add(&account.forgotten, 1);
}

static void close_cache(void) {
    if (cache)
        usermm_cache_close(cache);
    cache = NULL;
    CHECK(atomic_load(&account.live) == 0 || test_fault_fired());
}

static void open_cache(enum usermm_overlap overlap, uint64_t max_bytes, uint64_t max_count, unsigned flags) {
    struct usermm_registrar registrar = {
        .register_memory = register_memory,
        .deregister_memory = deregister_memory,
        .forget_memory = forget_memory,
        .context = &account,
        .overlap = overlap,
        .granularity = 1,
    };
    struct usermm_cache_options options = {max_bytes, max_count, flags};
    memset(&account, 0, sizeof account);
    test_at_end(close_cache);
    CALL(usermm_cache_open(&registrar, &options, &cache));
}

static struct usermm_registration *get(const void *start, size_t bytes) {
    struct usermm_registration *registration;
    CALL(usermm_cache_get(cache, (uintptr_t)start, bytes, USERMM_PROBE_WAIT, USERMM_REFUSE_HOLES, &registration));
    CHECK(registration->address <= (uintptr_t)start);
    CHECK(registration->address + registration->length >= (uintptr_t)start + bytes);
    CHECK(account.ranges[registration->handle].length == registration->length);
    return registration;
}

/* An injected fault may have another answer, but none that is a registration. */
static bool refused(int result, int expected) {
    return result == expected || (result < 0 && test_fault_fired());
}

static uint64_t look(const void *start, size_t bytes) {
    struct usermm_registration *registration = get(start, bytes);
    uint64_t handle = registration->handle;
    usermm_cache_release(cache, registration);
    return handle;
}

static struct usermm_cache_counts count(void) {
    struct usermm_cache_counts counts;
    usermm_cache_count(cache, &counts);
    return counts;
}

static void finds_what_it_registered(void) {
    char *memory = test_map(8);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 0, 0);
    uint64_t handle = look(memory, 4 * PAGE);
    CHECK(look(memory, 4 * PAGE) == handle);
    CHECK(look(memory, PAGE) == handle);
    CHECK(look(memory + PAGE + 100, 50) == handle);
    CHECK(look(memory + 3 * PAGE, 2 * PAGE) != handle);
    CHECK(count().hits == 3 && count().misses == 2 && count().pinned_bytes == 6 * PAGE);
}

static void forgets_what_went(void) {
    char *memory = test_map(8);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 0, 0);
    uint64_t one = look(memory, PAGE), two = look(memory + 4 * PAGE, 2 * PAGE);
    munmap(memory + 5 * PAGE, PAGE);
    CHECK(look(memory, PAGE) == one);
    CHECK(account.ranges[two].length == 0 && atomic_load(&account.live) == 1);
    CHECK(count().invalidations[USERMM_CAUSE_UNMAP] == 1);
    madvise(memory, PAGE, MADV_DONTNEED);
    CHECK(look(memory, PAGE) != one);
    CHECK(count().invalidations[USERMM_CAUSE_DISCARD] == 1);
    struct usermm_registration *none;
    int result =
        usermm_cache_get(cache, (uintptr_t)memory + 4 * PAGE, 2 * PAGE, USERMM_PROBE_WAIT, USERMM_REFUSE_HOLES, &none);
    CHECK(refused(result, -EFAULT));
}

static void a_holder_keeps_it(void) {
    char *memory = test_map(4);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 0, 0);
    struct usermm_registration *held = get(memory, PAGE);
    uint64_t old = held->handle;
    CHECK(usermm_cache_valid(cache, held) == 1);
    madvise(memory, PAGE, MADV_DONTNEED);
    CHECK(usermm_cache_valid(cache, held) == 0);
    uint64_t handle = look(memory, PAGE);
    CHECK(handle != old && account.ranges[old].length == PAGE && count().held == 1);
    usermm_cache_release(cache, held);
    CHECK(account.ranges[old].length == 0 && count().held == 0);
    CHECK(look(memory, PAGE) == handle);
}

static void again_is_the_same_or_nothing(void) {
    char *memory = test_map(4);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 0, 0);
    struct usermm_registration *first = get(memory, PAGE);
    uint64_t serial = first->serial;
    usermm_cache_release(cache, first);
    CHECK(usermm_cache_again(cache, first, serial));
    usermm_cache_release(cache, first);
    CHECK(!usermm_cache_again(cache, first, serial + 1));
    madvise(memory, PAGE, MADV_DONTNEED);
    CHECK(!usermm_cache_again(cache, first, serial));
    CHECK(get(memory, PAGE)->serial != serial);
    CHECK(!usermm_cache_again(cache, first, serial));
    usermm_cache_release(cache, first);
}

static void limits_are_kept(void) {
    char *memory = test_map(64);
    open_cache(USERMM_OVERLAP_ALLOWED, 8 * PAGE, 4, 0);
    for (int i = 0; i < 8; i++)
        look(memory + (size_t)i * 4 * PAGE, PAGE);
    CHECK(atomic_load(&account.live) == 4 && count().evictions == 4);
    look(memory + 40 * PAGE, 7 * PAGE);
    CHECK(atomic_load(&account.live) == 2 && count().pinned_bytes == 8 * PAGE);
    struct usermm_registration *held = get(memory + 40 * PAGE, 7 * PAGE), *none;
    CHECK(refused(usermm_cache_get(cache, (uintptr_t)memory, 2 * PAGE, USERMM_PROBE_WAIT, 0, &none), -EDQUOT));
    CHECK(refused(usermm_cache_get(cache, (uintptr_t)memory, 9 * PAGE, USERMM_PROBE_WAIT, 0, &none), -EDQUOT));
    look(memory, PAGE);
    usermm_cache_release(cache, held);
    CHECK(count().pinned_bytes_max <= 8 * PAGE);
}

static void a_refused_get_costs_nobody_anything(void) {
    struct usermm_registration *none;
    char *memory = test_map(8);
    open_cache(USERMM_OVERLAP_MERGED, 0, 1, 0);
    uint64_t kept = look(memory, 2 * PAGE);
    munmap(memory + 4 * PAGE, PAGE);
    uint64_t start = (uintptr_t)memory;
    unsigned flags = USERMM_REFUSE_HOLES;
    CHECK(refused(usermm_cache_get(cache, start + 4 * PAGE, PAGE, USERMM_PROBE_WAIT, flags, &none), -EFAULT));
    CHECK(refused(usermm_cache_get(cache, start + PAGE, 4 * PAGE, USERMM_PROBE_WAIT, flags, &none), -EFAULT));
    CHECK(look(memory, PAGE) == kept || test_fault_fired());
}

static void the_least_recently_used_goes(void) {
    char *memory = test_map(16);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 3, 0);
    uint64_t a = look(memory, PAGE);
    look(memory + 4 * PAGE, PAGE);
    look(memory + 8 * PAGE, PAGE);
    CHECK(look(memory, PAGE) == a);
    look(memory + 12 * PAGE, PAGE);
    CHECK(look(memory, PAGE) == a);
}

static void a_full_device_makes_room(void) {
    char *memory = test_map(16);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 0, 0);
    account.refuse_beyond = 2;
    look(memory, PAGE);
    struct usermm_registration *held = get(memory + 2 * PAGE, PAGE), *other, *none;
    other = get(memory + 4 * PAGE, PAGE);
    CHECK(count().evictions == 1);
    CHECK(refused(usermm_cache_get(cache, (uintptr_t)memory, PAGE, USERMM_PROBE_WAIT, 0, &none), -ENOSPC));
    usermm_cache_release(cache, other);
    usermm_cache_release(cache, held);
}

static void merged(enum usermm_overlap overlap) {
    char *memory = test_map(16);
    open_cache(overlap, 0, 0, 0);
    look(memory, 2 * PAGE);
    look(memory + 3 * PAGE, 2 * PAGE);
    uint64_t whole = look(memory + PAGE, 3 * PAGE);
    CHECK(atomic_load(&account.live) == 1 && account.ranges[whole].length == 5 * PAGE);
    CHECK(look(memory, 5 * PAGE) == whole && count().merges == 2);
}

static void overlaps_are_merged(void) {
    merged(USERMM_OVERLAP_MERGED);
    struct usermm_registration *held = get(account.ranges[3].address ? (char *)account.ranges[3].address : NULL, PAGE);
    usermm_cache_release(cache, held);
}

static void overlaps_are_refused(void) {
    merged(USERMM_OVERLAP_REFUSED);
    char *memory = (char *)account.ranges[3].address; /* the whole, five pages */
    struct usermm_registration *held = get(memory, PAGE), *none;
    int result = usermm_cache_get(cache, (uintptr_t)memory + 4 * PAGE, 2 * PAGE, USERMM_PROBE_WAIT, 0, &none);
    CHECK(refused(result, -EADDRINUSE) && (usermm_cache_valid(cache, held) || test_fault_fired()));
    madvise(memory, PAGE, MADV_DONTNEED);
    result = usermm_cache_get(cache, (uintptr_t)memory, PAGE, USERMM_PROBE_WAIT, 0, &none);
    CHECK(refused(result, -EADDRINUSE)); /* dead, but the device still has it */
    usermm_cache_release(cache, held);
    look(memory, PAGE);
}

static int changes_left;
static void discard(struct account *unused, uint64_t address, uint64_t length) {
    (void)unused, (void)length;
    if (changes_left-- > 0)
        madvise((void *)address, PAGE, MADV_DONTNEED);
}

static void looks_again_after_registering(void) {
    struct usermm_registration *none;
    char *memory = test_map(4);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 0, 0);
    account.during = discard;
    changes_left = 3;
    look(memory, PAGE);
    CHECK(count().retries == 3 && atomic_load(&account.live) == 1);
    changes_left = 1000;
    CHECK(refused(usermm_cache_get(cache, (uintptr_t)memory + PAGE, PAGE, USERMM_PROBE_WAIT, 0, &none), -EAGAIN));
    CHECK(atomic_load(&account.live) == 1 || test_fault_fired());
}

static int reentered;
static void reenter(struct account *unused, uint64_t address, uint64_t length) {
    struct usermm_registration *inner;
    (void)unused;
    reentered = usermm_cache_get(cache, address, length, USERMM_PROBE_WAIT, 0, &inner);
}

static void a_registrar_may_not_ask_for_the_same(void) {
    char *memory = test_map(4);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 0, 0);
    account.during = reenter;
    look(memory, PAGE);
    CHECK(reentered == -EDEADLK);
}

/* Not CALL: it may only jump in the test's own thread. */
static void *look_in_thread(void *memory) {
    struct usermm_registration *registration;
    if (usermm_cache_get(cache, (uintptr_t)memory, PAGE, USERMM_PROBE_WAIT, USERMM_REFUSE_HOLES, &registration))
        return NULL;
    uint64_t handle = registration->handle;
    usermm_cache_release(cache, registration);
    return (void *)(uintptr_t)handle;
}

static void pause_a_little(struct account *unused, uint64_t address, uint64_t length) {
    (void)unused, (void)address, (void)length;
    usleep(20000);
}

static void two_threads_register_once(void) {
    pthread_t threads[4];
    void *handles[4];
    char *memory = test_map(4);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 0, 0);
    account.during = pause_a_little;
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, look_in_thread, memory) == 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], &handles[i]);
    bool same = handles[0] && handles[0] == handles[1] && handles[1] == handles[2] && handles[2] == handles[3];
    CHECK((same && count().misses == 1 && count().hits == 3) || test_fault_fired());
}

static void expires_what_nobody_asks_for(void) {
    char *memory = test_map(16);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 0, 0);
    uint64_t kept = look(memory, PAGE);
    struct usermm_registration *held = get(memory + 4 * PAGE, PAGE);
    uint64_t old = look(memory + 8 * PAGE, PAGE);
    CHECK(CALL(usermm_cache_expire(cache, 2)) == 0);
    CHECK(look(memory, PAGE) == kept);
    CHECK(CALL(usermm_cache_expire(cache, 2)) == 0);
    CHECK(CALL(usermm_cache_expire(cache, 2)) == 1);
    CHECK(account.ranges[old].length == 0 && account.ranges[kept].length == PAGE);
    usermm_cache_release(cache, held);
    CHECK(CALL(usermm_cache_expire(cache, 2)) == 0); /* both were looked at a moment ago */
    CHECK(CALL(usermm_cache_expire(cache, 2)) == 2);
}

static uint64_t notifications(void) {
    struct usermm_counts counts;
    usermm_count(&counts);
    return counts.notifications;
}

static void retiring_takes_off_the_watch(void) {
    char *memory = test_map(8);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 0, 0);
    struct usermm_registration *first = get(memory, PAGE);
    uint64_t serial = first->serial, before = notifications();
    usermm_cache_retire(cache, first, serial); /* held: it stays */
    CHECK(usermm_cache_valid(cache, first));
    usermm_cache_release(cache, first);
    usermm_cache_retire(cache, first, serial + 1); /* another's */
    CHECK(count().registrations == 1);
    usermm_cache_retire(cache, first, serial);
    CHECK(count().registrations == 0 && count().retirements == 1 && atomic_load(&account.live) == 0);
    munmap(memory, PAGE);
    CHECK(notifications() == before || test_fault_fired());
}

/* Half a page each: the watch is of whole pages. */
static void retiring_leaves_the_watch_that_others_need(void) {
    char *memory = test_map(8);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 0, 0);
    usermm_device *device = test_open(2, O_RDONLY);
    test_register(device, memory + PAGE / 2, PAGE / 2, 1);
    struct usermm_registration *first = get(memory, PAGE / 2);
    uint64_t serial = first->serial;
    usermm_cache_release(cache, first);
    usermm_cache_retire(cache, first, serial);
    munmap(memory, PAGE);
    CHECK(test_generation(device) == 1);
}

static void uncached_registers_each_time(void) {
    char *memory = test_map(4);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 0, USERMM_CACHE_UNCACHED);
    uint64_t first = look(memory, PAGE);
    CHECK(atomic_load(&account.live) == 0 && look(memory, PAGE) != first);
}

static void a_child_begins_empty(void) {
    char *memory = test_map(8);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 0, 0);
    uint64_t handle = look(memory, PAGE);
    struct usermm_registration *held = get(memory + 4 * PAGE, PAGE);
    pid_t child = test_children_can_start_threads ? fork() : -1;
    if (child == 0) {
        struct usermm_registration *own;
        if (usermm_cache_get(cache, (uintptr_t)memory, PAGE, USERMM_PROBE_WAIT, 0, &own))
            _exit(2);
        bool right = own->handle != handle && atomic_load(&account.live) == 3 && atomic_load(&account.forgotten) == 1 &&
                     usermm_cache_valid(cache, held) == 0;
        usermm_cache_release(cache, held);
        usermm_cache_release(cache, own);
        right = right && atomic_load(&account.forgotten) == 2 && count().pinned == 1;
        usermm_cache_close(cache);
        _exit(right && atomic_load(&account.live) == 2 ? 0 : 1);
    }
    int status = 0;
    CHECK(child == -1 || waitpid(child, &status, 0) == child);
    CHECK(status == 0 || test_fault_fired());
    CHECK(look(memory, PAGE) == handle && usermm_cache_valid(cache, held));
    usermm_cache_release(cache, held);
}

static void shutting_down_waits_for_holders(void) {
    struct usermm_registration *none;
    char *memory = test_map(8);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 0, 0);
    struct usermm_registration *held = get(memory, PAGE);
    look(memory + 4 * PAGE, PAGE);
    usermm_cache_shutdown(cache);
    CHECK(atomic_load(&account.live) == 1 && usermm_cache_valid(cache, held) == 0);
    CHECK(refused(usermm_cache_get(cache, (uintptr_t)memory, PAGE, USERMM_PROBE_NONE, 0, &none), -EBADF));
    usermm_cache_release(cache, held);
}

static void many_are_found(void) {
    enum { MANY = 2000 };
    static uint64_t handles[MANY];
    char *memory = test_map(2 * MANY);
    open_cache(USERMM_OVERLAP_ALLOWED, 0, 0, 0);
    for (size_t i = 0; i < MANY; i++)
        handles[i] = look(memory + 2 * i * PAGE, PAGE);
    for (size_t i = 0; i < MANY; i += 3)
        CHECK(usermm_cache_evict(cache, (uintptr_t)memory + 2 * i * PAGE, PAGE) == 1);
    for (size_t i = 0; i < MANY; i++)
        CHECK((look(memory + 2 * i * PAGE, PAGE) == handles[i]) == (i % 3 != 0));
    CHECK(usermm_cache_evict(cache, 0, 0) == MANY && atomic_load(&account.live) == 0);
}

static const struct test tests[] = {
    TEST(finds_what_it_registered),
    TEST(forgets_what_went),
    TEST(a_holder_keeps_it),
    TEST(again_is_the_same_or_nothing),
    TEST(limits_are_kept),
    TEST(a_refused_get_costs_nobody_anything),
    TEST(the_least_recently_used_goes),
    TEST(a_full_device_makes_room),
    TEST(overlaps_are_merged),
    TEST(overlaps_are_refused),
    TEST(looks_again_after_registering),
    TEST(a_registrar_may_not_ask_for_the_same),
    TEST(two_threads_register_once),
    TEST(expires_what_nobody_asks_for),
    TEST(retiring_takes_off_the_watch),
    TEST(retiring_leaves_the_watch_that_others_need),
    TEST(uncached_registers_each_time),
    TEST(a_child_begins_empty),
    TEST(shutting_down_waits_for_holders),
    TEST(many_are_found),
};

int main(void) {
    return test_main(tests, sizeof tests / sizeof *tests);
}
