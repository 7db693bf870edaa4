/*
 * Memory for regions and devices that is not malloc's: the program's own malloc can be what calls us, and a signal's
 * handler may ask for it while the thread that it interrupted is inside malloc.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

#include "guard.h"
#include "memory.h"
#include "native.h"
#include "sys.h"

#define CHUNK_BYTES (64 * 1024)
#define CLASS_BYTES 64 /* sizes are rounded up to it; each has its list */
#define CLASSES 8      /* larger ones are mapped one by one */

struct piece {
    struct piece *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct piece *lists[CLASSES];

static size_t class_of(size_t size) {
    return (size + CLASS_BYTES - 1) / CLASS_BYTES - 1;
}

static void *map(size_t size) {
    void *memory = UM_NATIVE(mmap)(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static void refill(size_t class) {
    size_t size = (class + 1) * CLASS_BYTES;
    char *chunk = map(CHUNK_BYTES);
    for (size_t at = 0; chunk && at + size <= CHUNK_BYTES; at += size) {
        struct piece *piece = (struct piece *)(chunk + at);
        piece->next = lists[class];
        lists[class] = piece;
    }
}

void *um_memory_alloc(size_t size) {
    size_t class = class_of(size);
    struct um_guard guard;
    if (class >= CLASSES)
        return map(size);
    um_guard_enter(&guard);
    pthread_mutex_lock(&lock);
    if (!lists[class])
        refill(class);
    struct piece *piece = lists[class];
    if (piece)
        lists[class] = piece->next;
    pthread_mutex_unlock(&lock);
    um_guard_leave(&guard);
    return piece ? memset(piece, 0, size) : NULL;
}

void um_memory_free(void *memory, size_t size) {
    size_t class = class_of(size);
    struct um_guard guard;
    if (!memory)
        return;
    if (class >= CLASSES) {
        munmap(memory, size);
        return;
    }
    um_guard_enter(&guard);
    pthread_mutex_lock(&lock);
    struct piece *piece = memory;
    piece->next = lists[class];
    lists[class] = piece;
    pthread_mutex_unlock(&lock);
    um_guard_leave(&guard);
}

/* A list that was being changed is whole after each store; at worst a piece is lost. */
void um_memory_in_child(void) {
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
}
