/*
 * Threads that open, copy and close devices, pipes and files of their own all the time, half of the closing past the
 * library, so that the numbers go round between them: each must always find its own behind its number.
 * Usage: torture ROUNDS THREADS; prints the number of devices opened.
 */
#include <pthread.h>
#include <stdatomic.h>

#include "../abi.h"
#include "../raw.h"

static long rounds;
static atomic_long opened;

static void close_somehow(uint32_t *random, int fd) {
    expect((below(random, 2) ? (long)close(fd) : RAW(close, fd, 0, 0, 0, 0, 0)) == 0);
}

static int copy_somehow(uint32_t *random, int fd) {
    int copy = below(random, 2) ? dup(fd) : (int)RAW(dup, fd, 0, 0, 0, 0, 0);
    expect(copy >= 0);
    close_somehow(random, fd);
    return copy;
}

static void use_device(uint32_t *random, char *place) {
    struct event events[4];
    int device = open_device(O_RDONLY | O_NONBLOCK);
    atomic_fetch_add(&opened, 1);
    for (uint32_t i = below(random, 3); i; i--)
        device = copy_somehow(random, device);
    const volatile uint64_t *generation = map_generation(device);
    must(map_at(place, PAGE, MAP_FIXED) == place, "mmap");
    expect(register_range(device, place, PAGE, 3) == 0);
    if (below(random, 2))
        device = copy_somehow(random, device);
    expect(munmap(place, PAGE) == 0);
    expect(*generation == 1);
    if (below(random, 2))
        device = copy_somehow(random, device);
    expect(read(device, events, sizeof events) == 64 && events[0].value == 3 && events[1].value == 1);
    expect_errno(EAGAIN, read(device, events, sizeof events));
    expect(unregister(device, 3) == 0);
    munmap((void *)(uintptr_t)generation, 8);
    close_somehow(random, device);
}

/* What a device has in its pipe looks like nothing that a program writes, but this program writes everything. */
static void use_pipe(uint32_t *random) {
    char sent[64], got[64];
    int ends[2];
    must(pipe2(ends, O_NONBLOCK) == 0, "pipe");
    for (uint32_t i = below(random, 3); i; i--)
        ends[0] = copy_somehow(random, ends[0]);
    expect_errno(EAGAIN, read(ends[0], got, sizeof got));
    for (size_t i = 0; i < sizeof sent; i++)
        sent[i] = (char)below(random, 256);
    expect(write(ends[1], sent, sizeof sent) == sizeof sent);
    expect_errno(ENOTTY, ioctl(ends[0], REGISTER, got));
    expect(read(ends[0], got, sizeof got) == sizeof got && memcmp(sent, got, sizeof got) == 0);
    close_somehow(random, ends[1]);
    expect(read(ends[0], got, sizeof got) == 0);
    close_somehow(random, ends[0]);
}

static void use_file(uint32_t *random) {
    uint64_t zero = 1;
    int file = open("/dev/zero", O_RDONLY);
    expect(file >= 0);
    file = copy_somehow(random, file);
    expect(read(file, &zero, sizeof zero) == sizeof zero && zero == 0);
    expect_errno(ENOTTY, ioctl(file, UNREGISTER, &zero));
    void *page = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, file, 0);
    expect(page != MAP_FAILED && *(volatile uint64_t *)page == 0);
    munmap(page, PAGE);
    close_somehow(random, file);
}

static void *work(void *argument) {
    size_t number = (size_t)argument;
    uint32_t random = 0x9e3779b9u + (uint32_t)number * 7919u;
    for (long i = 0; i < rounds; i++) {
        switch (below(&random, 3)) {
        case 0:
            use_device(&random, FAR + number * 2 * PAGE);
            break;
        case 1:
            use_pipe(&random);
            break;
        default:
            use_file(&random);
        }
    }
    return NULL;
}

int main(int argc, char **argv) {
    pthread_t threads[16];
    must(argc == 3 && atoi(argv[2]) <= 16, "arguments: ROUNDS THREADS");
    rounds = atol(argv[1]);
    for (long i = 0; i < atoi(argv[2]); i++)
        must(pthread_create(&threads[i], NULL, work, (void *)i) == 0, "pthread_create");
    for (int i = 0; i < atoi(argv[2]); i++)
        pthread_join(threads[i], NULL);
    printf("%ld\n", atomic_load(&opened));
    return 0;
}
