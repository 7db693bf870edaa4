/* Memory that is exchanged: by whatever call, what was in the pages is gone afterwards, and there are others. */
#ifndef STRESS_MEMORY_H
#define STRESS_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096ul

static void must(bool condition, const char *what) {
    if (!condition) {
        perror(what);
        _exit(2);
    }
}

static char *map_at(char *address, size_t pages, int flags) {
    return mmap(address, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

static void by_munmap(char *page, size_t pages, char *aside) {
    (void)aside;
    munmap(page, pages * PAGE);
    must(map_at(page, pages, MAP_FIXED) == page, "mmap");
}
static void by_map_fixed(char *page, size_t pages, char *aside) {
    (void)aside;
    must(map_at(page, pages, MAP_FIXED) == page, "mmap");
}
static void by_dontneed(char *page, size_t pages, char *aside) {
    (void)aside;
    must(madvise(page, pages * PAGE, MADV_DONTNEED) == 0, "madvise");
}
static void by_mremap(char *page, size_t pages, char *aside) {
    (void)pages; /* one page is always one mapping */
    must(mremap(page, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, aside) == aside, "mremap");
    must(map_at(page, 1, MAP_FIXED) == page, "mmap");
}
/* `aside`: where pages are moved to. */
static void (*const causes[])(char *page, size_t pages, char *aside) = {by_munmap, by_map_fixed, by_dontneed,
                                                                        by_mremap};

#endif
