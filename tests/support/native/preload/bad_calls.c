/* Addresses that fault, sizes and numbers that are wrong: an errno each time, and the device goes on as before. */
#include <sys/uio.h>

#include "../abi.h"

static int device, device_1;
static const volatile uint64_t *generation;
static char *pages, *hole; /* hole: a page that is not mapped, behind one that is */

static void begin(void) {
    device = open_device(O_RDONLY | O_NONBLOCK);
    device_1 = open(DEVICE_1, O_RDONLY | O_NONBLOCK);
    must(device_1 >= 0, "open " DEVICE_1);
    generation = map_generation(device);
    pages = map_pages(4);
    hole = map_pages(2) + PAGE;
    munmap(hole, PAGE);
}

/* Whatever was done to it: it registers, counts, reports. */
static void still_works(void) {
    struct event events[2];
    uint64_t before = *generation;
    char *page = map_pages(1);
    while (read(device, events, sizeof events) > 0)
        ;
    expect(register_range(device, page, PAGE, 4711) == 0);
    expect(munmap(page, PAGE) == 0);
    expect(*generation == before + 1);
    expect(read(device, events, sizeof events) == sizeof events);
    expect(events[0].value == 4711 && events[1].type == LAST && events[1].value == before + 1);
    expect(unregister(device, 4711) == 0);
}

static void ioctl_pointers(void) {
    char *const bad[] = {NULL, (char *)8, hole, hole - 3, (char *)~0xffful, (char *)0xffff800000000000ul};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        expect_errno(EFAULT, ioctl(device, REGISTER, bad[i]));
        expect_errno(EFAULT, ioctl(device, UNREGISTER, bad[i]));
        expect_errno(EFAULT, ioctl(device_1, REGISTER_1, bad[i]));
        expect_errno(EFAULT, ioctl(device_1, UNREGISTER_1, bad[i]));
        int fresh = open_device(O_RDONLY);
        expect_errno(EFAULT, ioctl(fresh, EXCHANGE, bad[i]));
        uint32_t features = 0;
        expect_errno(EINVAL, ioctl(fresh, EXCHANGE, &features)); /* the one that faulted was its one use */
        close(fresh);
    }
    int fresh = open_device(O_RDONLY);
    mprotect(pages, PAGE, PROT_READ);
    expect_errno(EFAULT, ioctl(fresh, EXCHANGE, pages));
    mprotect(pages, PAGE, PROT_NONE);
    expect_errno(EFAULT, ioctl(device, REGISTER, pages));
    close(fresh);
    still_works();
}

static void hit(void) {
    must(register_range(device, pages, PAGE, 1) == 0 || errno == EINVAL, "register");
    must(madvise(pages, PAGE, MADV_DONTNEED) == 0, "madvise");
}

static void read_pointers(void) {
    char *const bad[] = {NULL, (char *)8, hole, (char *)~0xffful, (char *)0xffff800000000000ul};
    struct event event;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct iovec vector = {bad[i], 64};
        expect_errno(EAGAIN, read(device, bad[i], 64));
        hit();
        expect(read(device, bad[i], 31) == 0); /* nothing is written, nothing is lost */
        expect_errno(EFAULT, read(device, bad[i], 64));
        expect_errno(EAGAIN, read(device, &event, sizeof event));
        hit();
        expect_errno(EFAULT, pread(device, bad[i], 64, 0));
        hit();
        expect_errno(EFAULT, readv(device, &vector, 1));
        hit();
        expect_errno(EFAULT, readv(device, (struct iovec *)bad[i], 1));
        while (read(device, &event, sizeof event) > 0)
            ;
    }
    hit();
    struct iovec half[2] = {{&event, sizeof event}, {hole, 64}};
    ssize_t size = readv(device, half, 2);
    expect(size == sizeof event || (size == -1 && errno == EFAULT));
    still_works();
}

static void read_sizes(void) {
    struct event events[200];
    expect_errno(EAGAIN, read(device, events, 0));
    expect_errno(EAGAIN, read(device, events, 31));
    for (uint64_t cookie = 0; cookie < 200; cookie++)
        expect(register_range(device, pages, PAGE, cookie) == 0);
    hit();
    expect(read(device, events, 0) == 0);
    expect(read(device, events, 31) == 0);
    expect(read(device, events, 33) == 32 && events[0].value == 199); /* equal starts: the newest first */
    expect(read(device, events, sizeof events) == READ_LIMIT && events[127].value == 199 - 128);
    expect(read(device, events, sizeof events) == 72 * 32 && events[71].type == LAST);
    hit();
    expect(read(device, events, (size_t)1 << 30) == READ_LIMIT);
    ssize_t size = read(device, events, SIZE_MAX);
    expect(size == 73 * 32 || (size == -1 && (errno == EFAULT || errno == EINVAL)));
    still_works();
}

static void vectors(void) {
    struct event events[4];
    struct iovec two[2] = {{events, 32}, {events + 1, 32}}, empty[1] = {{NULL, 0}};
    hit();
    expect_errno(EINVAL, readv(device, two, -1));
    expect_errno(EINVAL, readv(device, two, 1025));
    ssize_t size = readv(device, two, 2);
    expect(size == 64 || size == 32); /* a driver with a plain read is called for each part */
    expect(events[0].type == INVAL);
    if (size == 32)
        expect(read(device, events + 1, 32) == 32);
    expect(events[1].type == LAST);
    hit();
    ssize_t none = readv(device, empty, 0);
    expect(none == 0 || (none == -1 && errno == EAGAIN));
    hit();
    expect(pread(device, events, 64, 1 << 20) == 64); /* the offset is ignored */
    hit();
    expect(pread64(device, events, 64, (off64_t)1 << 40) == 64);
    still_works();
}

static void request_numbers(void) {
    char argument[4096] = {0};
    for (unsigned long number = 0; number < 16; number++)
        for (unsigned long size = 0; size < 64; size += 4)
            for (unsigned long way = 0; way < 4; way++) {
                unsigned long request = way << 30 | size << 16 | 'U' << 8 | number;
                if (request != EXCHANGE && request != REGISTER && request != UNREGISTER)
                    expect_errno(ENOTTY, ioctl(device, request, argument));
                if (request != REGISTER_1 && request != UNREGISTER_1)
                    expect_errno(ENOTTY, ioctl(device_1, request, NULL));
            }
    expect_errno(ENOTTY, ioctl(device, 0));
    expect_errno(ENOTTY, ioctl(device, 0x5401ul /* TCGETS */, argument));
    still_works();
}

/* The kernel looks at 32 bits; programs that keep the number in an int hand on its sign. */
static void wide_request_numbers(void) {
    uint32_t features = 0xffffffff;
    uint64_t cookie = 9;
    struct region region = {(uintptr_t)pages, (uintptr_t)pages + PAGE, 9, 0, 0};
    expect(ioctl(device, (unsigned long)(long)(int)EXCHANGE, &features) == 0 && features == 0);
    expect(ioctl(device, REGISTER | 1ul << 40, &region) == 0);
    expect(ioctl(device, UNREGISTER | ~0ul << 32, &cookie) == 0);
    still_works();
}

/* Requests that the kernel answers for every file. */
static void requests_of_all_files(void) {
    int on = 0;
    expect(ioctl(device, 0x5421ul /* FIONBIO */, &on) == 0);
    expect((fcntl(device, F_GETFL) & O_NONBLOCK) == 0);
    on = 1;
    expect(ioctl(device, 0x5421ul, &on) == 0);
    expect((fcntl(device, F_GETFL) & O_NONBLOCK) != 0);
    expect(ioctl(device, 0x5451ul /* FIOCLEX */) == 0);
    expect(fcntl(device, F_GETFD) == FD_CLOEXEC);
    still_works();
}

static void values(void) {
    struct region_1 region = {1, 0, (uintptr_t)pages, (uintptr_t)pages + PAGE, 5};
    uint32_t wrong[] = {0, 2, ~0u};
    for (size_t i = 0; i < 3; i++) {
        region.version = wrong[i];
        expect_errno(EINVAL, ioctl(device_1, REGISTER_1, &region));
    }
    region.version = 1;
    expect(ioctl(device_1, REGISTER_1, &region) == 0);
    expect_errno(EINVAL, ioctl(device_1, REGISTER_1, &region));
    expect_errno(EINVAL, unregister(device, 12345));
    expect(register_range(device, pages, PAGE, ~0ul) == 0);
    expect_errno(EINVAL, register_range(device, pages, PAGE, ~0ul));
    expect(register_range(device, pages + 3, 0, 1) == 0);            /* empty */
    expect(register_range(device, pages + PAGE, -PAGE, 2) == 0);     /* reversed */
    expect(register_range(device, hole, PAGE, 3) == 0);              /* nothing there */
    expect(register_range(device, (char *)-PAGE, PAGE - 1, 4) == 0); /* at the very end of what a pointer can say */
    expect(register_range(device, NULL, 1, 5) == 0);
    expect_errno(EINVAL, ioctl(device, EXCHANGE, wrong)); /* too late */
    for (uint64_t cookie = ~0ul; cookie != 6; cookie++)   /* or what is mapped next can be one of them */
        expect(cookie == 0 || unregister(device, cookie) == 0);
    still_works();
}

static void writing(void) {
    struct iovec vector = {pages, 8};
    expect_errno(EBADF, write(device, pages, 8));
    expect_errno(EBADF, writev(device, &vector, 1));
    expect_errno(EAGAIN, read(device, pages, PAGE)); /* nothing came through */
    still_works();
}

static void odd_mappings(void) {
    void *taken = map_pages(1);
    expect_errno(EINVAL, mmap(NULL, 0, PROT_READ, MAP_SHARED, device, 0));
    expect_errno(EINVAL, mmap(NULL, 4097, PROT_READ, MAP_SHARED, device, 0));
    expect_errno(EINVAL, mmap(NULL, 8, PROT_READ, MAP_SHARED, device, 4096));
    expect_errno(EINVAL, mmap(NULL, 8, PROT_READ, MAP_SHARED, device, 1));
    expect_errno(EINVAL, mmap64(NULL, 8, PROT_READ, MAP_SHARED, device, (off64_t)1 << 40));
    expect(mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, device, 0) == MAP_FAILED);
    expect(mmap(NULL, SIZE_MAX, PROT_READ, MAP_SHARED, device, 0) == MAP_FAILED);
    expect_errno(EEXIST, mmap(taken, 8, PROT_READ, MAP_SHARED | MAP_FIXED_NOREPLACE, device, 0));
    hit();
    const volatile uint64_t *fixed = mmap(taken, 1, PROT_READ, MAP_SHARED | MAP_FIXED, device, 0);
    expect(fixed == taken && *fixed == 1);
    const volatile uint64_t *own = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, device, 0);
    expect(own == MAP_FAILED || *own == 1);
    for (int i = 0; i < 1000; i++) {
        void *page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, device, 0);
        expect(page != MAP_FAILED && *(volatile uint64_t *)page == 1);
        expect(munmap(page, 4096) == 0);
    }
    expect(munmap(taken, PAGE) == 0);
    still_works();
}

/* One mapping after the other goes while others count. */
static void mapping_outlives_the_device(void) {
    hit();
    close(device);
    expect(*generation >= 1);
    expect(munmap(pages, PAGE) == 0);
    expect(munmap((void *)(uintptr_t)generation, PAGE) == 0);
    device = open_device(O_RDONLY | O_NONBLOCK);
    generation = map_generation(device);
    expect(*generation == 0);
    still_works();
}

static const struct test_case cases[] = {
    {"ioctl_pointers", ioctl_pointers},
    {"read_pointers", read_pointers},
    {"read_sizes", read_sizes},
    {"vectors", vectors},
    {"request_numbers", request_numbers},
    {"wide_request_numbers", wide_request_numbers},
    {"requests_of_all_files", requests_of_all_files},
    {"values", values},
    {"writing", writing},
    {"odd_mappings", odd_mappings},
    {"mapping_outlives_the_device", mapping_outlives_the_device},
};

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "list") != 0)
        begin();
    return run_case(cases, sizeof cases / sizeof *cases, argc, argv);
}
