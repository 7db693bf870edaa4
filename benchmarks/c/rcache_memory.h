/* Memory of which nothing is known yet, neither to a cache nor to the kernel. For rcache.c alone. */
#ifndef RCACHE_MEMORY_H
#define RCACHE_MEMORY_H

#include "bench.h"

#define REGION_BYTES 65536ul

static inline void make_inaccessible(char *start, size_t bytes) {
    need(mprotect(start, bytes, PROT_NONE) == 0, "mprotect");
}

/*
 * Aligned, as suits UCX's radix tree best: a region that begins elsewhere takes 16 of its entries. Between two regions
 * that are inaccessible, so that it merges with no neighbour, whose history would be part of every split's price.
 */
static inline char *reserve(size_t bytes) {
    size_t all = bytes + 3 * REGION_BYTES;
    char *mapped = mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    need(mapped != MAP_FAILED, "mmap");
    size_t before = -(uintptr_t)mapped % REGION_BYTES;
    char *first = mapped + before, *last = first + REGION_BYTES + bytes;
    need(before == 0 || munmap(mapped, before) == 0, "munmap");
    need(munmap(last + REGION_BYTES, REGION_BYTES - before) == 0, "munmap");
    make_inaccessible(first, REGION_BYTES);
    make_inaccessible(last, REGION_BYTES);
    return first + REGION_BYTES;
}

static inline void discard(char *memory, size_t bytes) {
    need(munmap(memory - REGION_BYTES, bytes + 2 * REGION_BYTES) == 0, "munmap");
}

/* One mapping for each region. */
static inline void separate(char *memory, size_t count, size_t pitch) {
    for (size_t i = 1; i < count; i++)
        make_inaccessible(memory + i * pitch - REGION_BYTES, REGION_BYTES);
}

/* As memory in use. */
static inline void touch(char *memory, size_t count, size_t pitch) {
    for (size_t i = 0; i < count; i++)
        for (size_t offset = 0; offset < REGION_BYTES; offset += PAGE_BYTES)
            *(volatile char *)(memory + i * pitch + offset) = 1;
}

#endif
