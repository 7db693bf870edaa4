/* Two rules make it exact: watch before pinning, and ask whether something changed after looking up or pinning. */
#include "cache.h"

#include <errno.h>

#include "watch.h"

#define ENTRIES 64

struct entry {
    uint64_t start, end, key; /* key 0: free */
};

static struct entry entries[ENTRIES];

static void forget(struct entry *entry) {
    watch_remove((uintptr_t)entry);
    card_unpin(entry->key);
    entry->key = 0;
}

static void lost(uint64_t cookie) {
    forget((struct entry *)(uintptr_t)cookie);
}

void cache_close(void) {
    for (struct entry *entry = entries; entry < entries + ENTRIES; entry++)
        if (entry->key)
            forget(entry);
}

static struct entry *find(uint64_t start, uint64_t end) {
    for (struct entry *entry = entries; entry < entries + ENTRIES; entry++)
        if (entry->key && entry->start <= start && end <= entry->end)
            return entry;
    return NULL;
}

/* The cookie is the entry's address. */
static int make(uint64_t start, uint64_t end) {
    for (struct entry *entry = entries; entry < entries + ENTRIES; entry++) {
        if (entry->key)
            continue;
        int result = watch_add(start, end, (uintptr_t)entry);
        if (result)
            return result;
        *entry = (struct entry){start, end, card_pin(start, end)};
        return 0;
    }
    return -ENOSPC;
}

/* What was just made is looked up again: if the memory changed while it was pinned, it is not found. */
uint64_t cache_get(void *address, size_t length) {
    uint64_t start = (uintptr_t)address, end = start + length;
    for (;;) {
        int result = watch_changed() ? watch_drain(lost) : 0;
        struct entry *entry = result ? NULL : find(start, end);
        if (entry)
            return entry->key;
        if (result)
            cache_close();
        else
            result = make(start, end);
        if (result) {
            errno = -result;
            return 0;
        }
    }
}
