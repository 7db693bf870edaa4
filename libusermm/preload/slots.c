#define _GNU_SOURCE
#include "slots.h"

#include <sys/mman.h>

#define SLOTS_PER_CHUNK 1024u
#define MAX_CHUNKS 1024u

static _Atomic uint32_t slots; /* ever used */
static struct um_client *_Atomic chunks[MAX_CHUNKS];

struct um_client *um_slot_at(uint32_t slot) {
    return &atomic_load(&chunks[slot / SLOTS_PER_CHUNK])[slot % SLOTS_PER_CHUNK];
}

uint32_t um_slot_count(void) {
    return atomic_load(&slots);
}

static struct um_client *make_slot(uint32_t slot) {
    uint32_t chunk = slot / SLOTS_PER_CHUNK;
    if (chunk >= MAX_CHUNKS)
        return NULL;
    if (!atomic_load(&chunks[chunk])) {
        void *memory = mmap(NULL, SLOTS_PER_CHUNK * sizeof(struct um_client), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED)
            return NULL;
        atomic_store(&chunks[chunk], memory);
    }
    atomic_store(&slots, slot + 1);
    um_slot_at(slot)->slot = slot;
    return um_slot_at(slot);
}

/* A slot that nobody uses; the first of them is looked for from where the last one was found. */
struct um_client *um_slot_find(uint32_t *ret_slot) {
    static uint32_t next;
    uint32_t count = atomic_load(&slots);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t slot = (next + i) % count;
        if (i >= SLOTS_PER_CHUNK)
            break; /* rather a new one than a long look */
        if (atomic_load(&um_slot_at(slot)->holders) == 0) {
            next = slot + 1;
            *ret_slot = slot;
            return um_slot_at(slot);
        }
    }
    *ret_slot = count;
    return make_slot(count);
}
