/* What the test programs share: ends with a line when something is wrong, pages, a clock, random numbers. */
#ifndef PROGRAM_H
#define PROGRAM_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define FAR ((char *)0x0eab00000000) /* from here on the kernel gives out nothing by itself: holes stay holes */

/* For what the test needs and does not test: status 2. */
#define must(condition, what) must_((condition), (what), __FILE__, __LINE__)
/* For what it tests: status 1. */
#define expect(condition) expect_((condition), #condition, __FILE__, __LINE__)
/* The call must fail, with this errno. */
#define expect_errno(number, call) expect_errno_((number), (errno = 0, (long)(call)), #call, __FILE__, __LINE__)

static inline void must_(int condition, const char *what, const char *file, int line) {
    if (condition)
        return;
    fprintf(stderr, "%s:%d: %s: %s\n", file, line, what, strerror(errno));
    _exit(2);
}

static inline void expect_(int condition, const char *text, const char *file, int line) {
    if (condition)
        return;
    fprintf(stderr, "%s:%d: not so: %s (errno: %s)\n", file, line, text, strerror(errno));
    _exit(1);
}

static inline void expect_errno_(int number, long result, const char *text, const char *file, int line) {
    int got = errno;
    if (result == -1 && got == number)
        return;
    fprintf(stderr, "%s:%d: %s gave %ld (%s), not -1 (%s)\n", file, line, text, result, strerror(got),
            strerror(number));
    _exit(1);
}

static inline char *map_at(void *address, size_t length, int flags) {
    return mmap(address, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

static inline char *map_pages(size_t pages) {
    char *memory = map_at(NULL, pages * PAGE, 0);
    must(memory != MAP_FAILED, "mmap");
    return memory;
}

static inline uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* xorshift; the state is the thread's own and never 0. */
static inline uint32_t below(uint32_t *state, uint32_t limit) {
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state % limit;
}

/* Programs with several cases: the case that is named first, or all. */
struct test_case {
    const char *name;
    void (*run)(void);
};

static inline int run_case(const struct test_case *cases, size_t count, int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "list") == 0) {
        for (size_t i = 0; i < count; i++)
            puts(cases[i].name);
        return 0;
    }
    for (size_t i = 0; argc > 1 && i < count; i++)
        if (strcmp(argv[1], cases[i].name) == 0) {
            alarm(60); /* a hang is a failure, whoever started this */
            cases[i].run();
            return 0;
        }
    fprintf(stderr, "no such case\n");
    return 2;
}

#endif
