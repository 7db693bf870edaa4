/* What a device reports for each way to lose memory, and what it answers to mistakes. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <unistd.h>

#include "test.h"

static bool polls_readable(usermm_device *device) {
    struct pollfd ready = {.fd = (int)CALL(usermm_fileno(device)), .events = POLLIN | POLLOUT};
    poll(&ready, 1, 0);
    CHECK(!(ready.revents & ~POLLIN));
    return ready.revents == POLLIN;
}

static void reports_an_unmapping(void) {
    struct usermm_event events[4];
    usermm_device *device = test_open(2, O_RDONLY);
    char *memory = test_map(8);
    test_register(device, memory, 4 * PAGE, 7);
    CHECK(test_generation(device) == 0 && !polls_readable(device));
    munmap(memory + PAGE, PAGE);
    CHECK(test_generation(device) == 1);
    CHECK(CALL(usermm_check(device, 0, USERMM_PROBE_WAIT)) == 0);
    CHECK(test_read(device, events, 4) == 2);
    CHECK(events[0].type == USERMM_EVENT_INVAL && events[0].flags == USERMM_EVENT_FLAG_HINT);
    CHECK(events[0].hint_start == (uintptr_t)memory + PAGE && events[0].hint_end == (uintptr_t)memory + 2 * PAGE);
    CHECK(events[0].user_cookie_counter == 7);
    CHECK(events[1].type == USERMM_EVENT_LAST && events[1].user_cookie_counter == 1);
    CHECK(!polls_readable(device) && test_read(device, events, 4) == 0);
}

static uint64_t notifications(void) {
    struct usermm_counts counts;
    usermm_count(&counts);
    return counts.notifications;
}

static void retired_memory_is_unmapped_unseen(void) {
    usermm_device *device = test_open(2, O_RDONLY), *other = test_open(2, O_RDONLY);
    char *memory = test_map(8);
    test_register(device, memory, 2 * PAGE, 1);
    test_register(device, memory + 3 * PAGE, 2 * PAGE, 2);
    test_register(other, memory + 4 * PAGE, 2 * PAGE, 3);
    uint64_t before = notifications();
    CALL(usermm_retire(device, 1));
    CHECK(usermm_retire(device, 1) == -EINVAL);
    munmap(memory, 2 * PAGE);
    CHECK(notifications() == before || test_fault_fired());
    CALL(usermm_retire(device, 2));
    munmap(memory + 4 * PAGE, PAGE);
    CHECK(test_generation(other) == 1 && test_generation(device) == 0);
}

static void expect_one_more(usermm_device *device, uint64_t *generation) {
    uint64_t now = test_generation(device);
    CHECK(now > *generation);
    *generation = now;
}

static void every_cause_moves_the_generation(void) {
    uint64_t generation = 0;
    usermm_device *device = test_open(2, O_RDONLY);
    char *memory = test_map(64);
    test_register(device, memory, 32 * PAGE, 1);
    madvise(memory, PAGE, MADV_DONTNEED);
    expect_one_more(device, &generation);
    madvise(memory, PAGE, MADV_FREE);
    expect_one_more(device, &generation);
    mmap(memory + PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    expect_one_more(device, &generation);
    CHECK(mremap(memory + 2 * PAGE, 2 * PAGE, PAGE, 0) != MAP_FAILED);
    expect_one_more(device, &generation);
    CHECK(mremap(memory + 4 * PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, memory + 40 * PAGE) != MAP_FAILED);
    expect_one_more(device, &generation);
    CHECK(mremap(memory + 50 * PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, memory + 5 * PAGE) != MAP_FAILED);
    expect_one_more(device, &generation);
    char *copy =
        mremap(memory + 6 * PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL); /* libc passes the fifth on */
    CHECK(copy != MAP_FAILED);
    expect_one_more(device, &generation);
    munmap(copy, PAGE);
    mprotect(memory + 8 * PAGE, PAGE, PROT_READ);
    munmap(memory + 33 * PAGE, PAGE);
    CHECK(test_generation(device) == generation);
}

static void a_shrinking_heap_moves_the_generation(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    char *top = sbrk(0), *start = (char *)(((uintptr_t)top + PAGE - 1) & ~(PAGE - 1));
    CHECK(brk(start + 4 * PAGE) == 0);
    long result = usermm_register(device, (uintptr_t)start, (uintptr_t)start + 4 * PAGE, 1, USERMM_REFUSE_HOLES);
    CHECK(brk(top) == 0); /* before a failed CALL may jump away: malloc must find its heap as it was */
    CALL(result);
    CHECK(test_generation(device) == 1);
}

static void shared_memory_is_watched(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    char *memory = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    uint64_t start = (uintptr_t)memory;
    long result = usermm_register(device, start, start + 4 * PAGE, 1, USERMM_REFUSE_HOLES | USERMM_REFUSE_FILES);
    madvise(memory, PAGE, MADV_REMOVE);
    munmap(memory, 4 * PAGE);
    CALL(result);
    CHECK(test_generation(device) == 2);
}

static void refuses_what_can_change_unseen(void) {
    const unsigned strict = USERMM_REFUSE_HOLES | USERMM_REFUSE_FILES;
    usermm_device *device = test_open(2, O_RDONLY);
    char *memory = test_map(4);
    uint64_t start = (uintptr_t)memory;
    munmap(memory + PAGE, PAGE);
    long hole = usermm_register(device, start, start + 4 * PAGE, 1, strict);
    CHECK(hole == -EFAULT || CALL(hole) < 0);
    int fd = memfd_create("test", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, PAGE) == 0);
    CHECK(mmap(memory + PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED);
    close(fd);
    long file = usermm_register(device, start, start + 4 * PAGE, 1, strict);
    CHECK(file == -EOPNOTSUPP || CALL(file) < 0);
    int segment = shmget(IPC_PRIVATE, PAGE, 0600);
    CHECK(segment >= 0 && shmat(segment, memory + PAGE, SHM_REMAP) == memory + PAGE);
    shmctl(segment, IPC_RMID, NULL);
    long sysv = usermm_register(device, start, start + 4 * PAGE, 1, 0);
    shmdt(memory + PAGE);
    CHECK(sysv == -EOPNOTSUPP || CALL(sysv) < 0);
    CALL(usermm_register(device, start, start + 4 * PAGE, 1, 0)); /* the ABI takes holes; nothing was left behind */
    long again = usermm_register(device, start, start, 1, 0);
    CHECK(again == -EINVAL || CALL(again) < 0);
    CALL(usermm_unregister(device, 1));
    CHECK(usermm_unregister(device, 1) == -EINVAL);
}

static void devices_do_not_share_queues(void) {
    struct usermm_event events[4];
    usermm_device *first = test_open(2, O_RDONLY), *second = test_open(1, O_RDONLY);
    char *memory = test_map(4);
    test_register(first, memory, PAGE, 1);
    test_register(second, memory, 4 * PAGE, 2);
    madvise(memory + 2 * PAGE, PAGE, MADV_DONTNEED);
    CHECK(test_generation(first) == 0 && test_generation(second) == 1);
    CHECK(test_read(first, events, 4) == 0 && test_read(second, events, 4) == 2);
    madvise(memory, PAGE, MADV_DONTNEED);
    CHECK(test_generation(first) == 1 && test_generation(second) == 2);
}

static void bad_pointers_are_errors(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    char *memory = test_map(1), *nowhere = test_map(1);
    mprotect(nowhere, PAGE, PROT_NONE);
    test_register(device, memory, PAGE, 1);
    madvise(memory, PAGE, MADV_DONTNEED);
    ssize_t size = usermm_read(device, nowhere, 64);
    CHECK(size == -EFAULT || CALL(size) < 0);
    CHECK(usermm_read(device, nowhere, 64) < 0); /* the events are lost */
    CHECK(usermm_ioctl(device, 0x40205502, nowhere) < 0);
    CHECK(usermm_ioctl(device, 0x12345678, NULL) == -ENOTTY || CALL(test_generation(device)) < 0);
}

static void list_open(bool *ret_was_open, int limit) {
    for (int fd = 0; fd < limit; fd++)
        ret_was_open[fd] = fcntl(fd, F_GETFD) >= 0;
}

/* Puts the read end of a pipe in every number that the library took. */
static void put_strangers(const bool *was_open, int limit, const int *ends) {
    for (int fd = 0; fd < limit; fd++)
        if (!was_open[fd] && fd != ends[0] && fd != ends[1])
            dup2(ends[0], fd);
}

/* What a daemon does; only descriptors of the library, which the harness then expects to be gone. */
static void close_new_descriptors(const bool *was_open, int limit) {
    for (int fd = 0; fd < limit; fd++)
        if (!was_open[fd])
            close(fd);
}

static void a_lost_descriptor_fails_closed(void) {
    bool was_open[64];
    list_open(was_open, 64);
    usermm_device *device = test_open(2, O_RDONLY), *another;
    char *memory = test_map(2);
    test_register(device, memory, 2 * PAGE, 1);
    CHECK(CALL(usermm_check(device, 0, USERMM_PROBE_WAIT)) == 1);
    usleep(20000); /* the reader sleeps in poll by then, which keeps the file alive */
    close_new_descriptors(was_open, 64);
    uint64_t generation;
    CHECK(usermm_check(device, 0, USERMM_PROBE_WAIT) == -EIO);
    CHECK(usermm_generation(device, &generation) == -EIO);
    CHECK(usermm_register(device, 0, PAGE, 2, 0) == -EIO);
    CHECK(usermm_open(2, O_RDONLY, &another) < 0);
    munmap(memory, PAGE); /* the last message: the reader ends, and with it the userfaultfd */
    munmap(memory + PAGE, PAGE);
}

/* The next event of a monitor whose number is another file by now must not take that file's data. */
static void a_stranger_in_our_number_is_not_read(void) {
    bool was_open[64];
    char byte = 'x';
    int data[2];
    list_open(was_open, 64);
    usermm_device *device = test_open(2, O_RDONLY);
    char *memory = test_map(1);
    test_register(device, memory, PAGE, 1);
    CHECK(pipe2(data, O_CLOEXEC) == 0);
    CHECK(write(data[1], &byte, 1) == 1);
    usleep(20000);
    put_strangers(was_open, 64, data);
    munmap(memory, PAGE);
    uint64_t generation;
    CHECK(usermm_check(device, 0, USERMM_PROBE_WAIT) == -EIO && usermm_generation(device, &generation) == -EIO);
    CHECK(read(data[0], &byte, 1) == 1 && byte == 'x');
    close_new_descriptors(was_open, 64);
}

/* poll keeps our file alive but looks at the stranger's, which never gets ready: whoever unmaps must not wait for ever.
 */
static void a_silent_stranger_does_not_hang_who_unmaps(void) {
    bool was_open[64];
    int silent[2];
    list_open(was_open, 64);
    usermm_device *device = test_open(2, O_RDONLY);
    char *memory = test_map(1);
    test_register(device, memory, PAGE, 1);
    CHECK(pipe2(silent, O_CLOEXEC) == 0);
    usleep(20000);
    put_strangers(was_open, 64, silent);
    munmap(memory, PAGE);
    uint64_t generation;
    CHECK(usermm_check(device, 0, USERMM_PROBE_WAIT) == -EIO && usermm_generation(device, &generation) == -EIO);
    close_new_descriptors(was_open, 64);
}

/* Closing everything, the device too, and starting again gives the new userfaultfd the old number. */
static void a_monitor_can_be_started_again_after_a_loss(void) {
    bool was_open[64];
    list_open(was_open, 64);
    usermm_device *device;
    char *memory = test_map(2);
    CALL(usermm_open(2, O_RDONLY, &device));
    uint64_t start = (uintptr_t)memory;
    int result = usermm_register(device, start, start + PAGE, 1, 0);
    usleep(20000);
    close_new_descriptors(was_open, 64);
    usermm_close(device);
    CALL(result);
    device = test_open(2, O_RDONLY);
    test_register(device, memory + PAGE, PAGE, 1);
    munmap(memory, 2 * PAGE);
    CHECK(test_generation(device) == 1);
}

int main(void) {
    static const struct test tests[] = {
        TEST(retired_memory_is_unmapped_unseen),
        TEST(reports_an_unmapping),
        TEST(every_cause_moves_the_generation),
        TEST(a_shrinking_heap_moves_the_generation),
        TEST(shared_memory_is_watched),
        TEST(refuses_what_can_change_unseen),
        TEST(devices_do_not_share_queues),
        TEST(bad_pointers_are_errors),
        TEST(a_lost_descriptor_fails_closed),
        TEST(a_stranger_in_our_number_is_not_read),
        TEST(a_silent_stranger_does_not_hang_who_unmaps),
        TEST(a_monitor_can_be_started_again_after_a_loss),
    };
    return test_main(tests, sizeof tests / sizeof *tests);
}
