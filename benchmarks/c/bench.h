/* What the programs of the benchmarks share: a clock, samples, lines in and out. Compiled with -D_GNU_SOURCE. */
#ifndef BENCH_H
#define BENCH_H

#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE_BYTES 4096ul

static inline uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* A benchmark that cannot do what its row says must not print a figure. */
static inline void need(int condition, const char *what) {
    if (!condition) {
        fprintf(stderr, "benchmarks: %s failed\n", what);
        exit(1);
    }
}

static inline char *map_pages(size_t pages) {
    char *memory = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    need(memory != MAP_FAILED, "mmap");
    return memory;
}

/* The calling thread, and those that it makes from here on. -1: where the scheduler likes. */
static inline void pin(int cpu) {
    static cpu_set_t everywhere;
    cpu_set_t one;
    if (CPU_COUNT(&everywhere) == 0)
        need(sched_getaffinity(0, sizeof everywhere, &everywhere) == 0, "sched_getaffinity");
    CPU_ZERO(&one);
    if (cpu >= 0)
        CPU_SET(cpu, &one);
    need(sched_setaffinity(0, sizeof one, cpu < 0 ? &everywhere : &one) == 0, "sched_setaffinity");
}

static inline int ascending(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Prints one line: mean and median in ns. Sorts the samples. */
static inline void print_samples(uint64_t *samples_ns, size_t count) {
    double sum_ns = 0;
    for (size_t i = 0; i < count; i++)
        sum_ns += (double)samples_ns[i];
    qsort(samples_ns, count, sizeof *samples_ns, ascending);
    printf("%.1f %llu\n", sum_ns / (double)count, (unsigned long long)samples_ns[count / 2]);
    fflush(stdout);
}

/* Each line on stdin asks for one round of so many operations; 0 at the end of the input. */
static inline size_t next_round(void) {
    char line[32];
    return fgets(line, sizeof line, stdin) ? strtoul(line, NULL, 10) : 0;
}

#endif
