/* The blocks of memory that come and go, and the ways in which they do. */
#ifndef BLOCKS_H
#define BLOCKS_H

#include "ledger.h" /* Python.h comes first */
#include "givers.h"

#define BASE ((char *)0x0eab00000000) /* far from where the kernel hands out addresses */
#define STRIDE (1ul << 20)
#define BLOCKS 64
#define PATIENCE 10000000 /* attempts to map a block that is being unmapped */

struct block {
    char *start;
    size_t length;
    unsigned readers;
    bool busy, disturbed; /* disturbed: it is to change while it is registered next */
    PyObject *object;
};

/* As the Python half sees it (soak_library.Work). */
static struct work {
    uint64_t changes, given, disturbances;
} work;

static struct block blocks[BLOCKS];
static const size_t block_pages[] = {1, 1, 2, 4, 8, 16, 32, 128};

static char *aside(void) {
    return BASE + BLOCKS * STRIDE;
}

static char *map_at(char *start, size_t length, int flags) {
    return mmap(start, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

static bool map_blocks(void) {
    for (unsigned i = 0; i < BLOCKS; i++) {
        struct block *block = &blocks[i];
        block->start = BASE + i * STRIDE;
        block->length = block_pages[i % (sizeof block_pages / sizeof *block_pages)] * PAGE;
        if (map_at(block->start, block->length, MAP_FIXED_NOREPLACE) != block->start)
            return false;
    }
    return true;
}

static void unmap_blocks(void) {
    for (unsigned i = 0; i < BLOCKS; i++)
        munmap(blocks[i].start, blocks[i].length);
    munmap(aside(), (GIVERS + 1) * STRIDE);
}

static struct block *block_at(uint64_t address) {
    return &blocks[(address - (uint64_t)(uintptr_t)BASE) / STRIDE];
}

static struct block *claim(void) {
    for (;;) {
        struct block *block = &blocks[below(BLOCKS)];
        if (block->busy || block->readers)
            continue;
        block->busy = true;
        return block;
    }
}

/* In this thread: when the call has returned, the next look-up knows. The object is still the one that asked before. */
static void change_here(const struct block *block) {
    char *start = block->start;
    size_t pages = block->length / PAGE, first = below((uint32_t)pages);
    char *page = start + first * PAGE;
    switch (below(4)) {
    case 0:
        munmap(start, block->length);
        map_at(start, block->length, MAP_FIXED);
        break;
    case 1:
        map_at(page, (pages - first) * PAGE, MAP_FIXED);
        break;
    case 2:
        madvise(page, (pages - first) * PAGE, MADV_DONTNEED);
        break;
    default:
        mremap(page, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, aside() + GIVERS * STRIDE);
        map_at(page, PAGE, MAP_FIXED);
    }
    work.changes++;
}

/* By a thread that still is inside munmap(2) or mremap(2) when this one has the address again. */
static bool change_there(const struct block *block) {
    if (!ask_a_giver(block->start, block->length, below(4) == 0, aside(), STRIDE))
        return false;
    for (int i = 1; map_at(block->start, block->length, MAP_FIXED_NOREPLACE) != block->start; i++) {
        if (i == PATIENCE)
            Py_FatalError("a block is not unmapped by the thread that was asked to, or somebody else has its address");
        if (i % 64 == 0)
            sched_yield();
    }
    work.changes++;
    work.given++;
    return true;
}

/* The memory changes after the device has taken it, and before the cache knows that it has. The change is over before
 * the registration is: whoever asks for memory may not have it unmapped by somebody else meanwhile. */
static void disturb(struct block *block) {
    block->disturbed = false;
    work.disturbances++;
    if (below(2) || !change_there(block))
        change_here(block);
    await_givers();
}

#endif
