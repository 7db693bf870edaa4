/* Which registrations cover an address. */
#include <errno.h>

#include "cache.h"
#include "sys.h"

#define FIRST_SLOTS 64u /* a power of two */

/* Multiplication by 2^64 over the golden ratio: allocators' addresses differ in their middle bits. */
static uint64_t place_of(uint64_t address, uint64_t mask) {
    return (address * 0x9e3779b97f4a7c15u) >> 32 & mask;
}

static struct um_entry *entry_at(const struct um_table *table, uint64_t place) {
    return atomic_load_explicit(&table->slots[place].entry, memory_order_acquire);
}

/* The address first: who finds the entry may believe the address beside it, and looks at the entry itself anyway. */
static void fill(struct um_table *table, uint64_t place, struct um_entry *entry, uint64_t address) {
    atomic_store_explicit(&table->slots[place].address, address, memory_order_relaxed);
    atomic_store_explicit(&table->slots[place].entry, entry, memory_order_release);
}

static void insert(struct um_table *table, struct um_entry *entry) {
    uint64_t place = place_of(entry->shown.address, table->mask);
    while (entry_at(table, place))
        place = (place + 1) & table->mask;
    fill(table, place, entry, entry->shown.address);
}

int um_index_reserve(struct um_index *index, uint64_t more) {
    struct um_table *table = atomic_load(&index->table);
    uint64_t slots = table ? table->mask + 1 : FIRST_SLOTS;
    while (slots < 2 * (index->count + more))
        slots *= 2;
    if (table && slots == table->mask + 1)
        return 0;
    struct um_table *larger = um_sys_alloc(sizeof *larger + slots * sizeof *larger->slots);
    if (!larger)
        return -ENOMEM;
    larger->mask = slots - 1;
    larger->outgrown = table;
    for (uint64_t place = 0; table && place <= table->mask; place++)
        if (entry_at(table, place))
            insert(larger, entry_at(table, place));
    atomic_store_explicit(&index->table, larger, memory_order_release);
    return 0;
}

void um_index_add(struct um_index *index, struct um_entry *entry) {
    entry->by_address =
        (struct um_node){.key = entry->shown.address, .end = um_entry_end(entry), .serial = entry->shown.serial};
    um_tree_insert(&index->tree, &entry->by_address);
    insert(atomic_load(&index->table), entry);
    index->count++;
}

/* Those behind it that it kept from their own places move up, or a look-up for them would end at the gap. */
static void close_gap(struct um_table *table, uint64_t gap) {
    struct um_entry *entry;
    for (uint64_t place = (gap + 1) & table->mask; (entry = entry_at(table, place));
         place = (place + 1) & table->mask) {
        uint64_t wanted = place_of(entry->shown.address, table->mask);
        if (((place - wanted) & table->mask) < ((place - gap) & table->mask))
            continue;
        fill(table, gap, entry, entry->shown.address);
        gap = place;
    }
    fill(table, gap, NULL, 0);
}

void um_index_remove(struct um_index *index, struct um_entry *entry) {
    struct um_table *table = atomic_load(&index->table);
    uint64_t place = place_of(entry->shown.address, table->mask);
    while (entry_at(table, place) != entry)
        place = (place + 1) & table->mask;
    close_gap(table, place);
    um_tree_remove(&index->tree, &entry->by_address);
    index->count--;
}

/* Without the lock an entry can move meanwhile and be overlooked: then the lock is taken, and nothing is lost. */
struct um_entry *um_index_find_start(const struct um_index *index, uint64_t address, uint64_t length) {
    const struct um_table *table = atomic_load_explicit(&index->table, memory_order_acquire);
    if (!table)
        return NULL;
    uint64_t first = place_of(address, table->mask), place = first;
    do {
        struct um_entry *entry = entry_at(table, place);
        if (!entry)
            return NULL;
        if (atomic_load_explicit(&table->slots[place].address, memory_order_relaxed) == address &&
            __atomic_load_n(&entry->shown.length, __ATOMIC_RELAXED) >= length)
            return entry;
        place = (place + 1) & table->mask;
    } while (place != first);
    return NULL;
}

/* Of the subtree on the left all keys fit, so one that ends late enough is there if its largest end is. */
struct um_entry *um_index_find_cover(const struct um_index *index, uint64_t address, uint64_t length) {
    struct um_entry *entry = um_index_find_start(index, address, length);
    uint64_t end = address + length;
    struct um_node *node = entry ? NULL : index->tree;
    while (node) {
        if (node->key <= address && node->end >= end)
            return um_entry_of_node(node);
        if (node->key > address || (node->left && node->left->max_end >= end))
            node = node->left;
        else
            node = node->right;
    }
    return entry;
}

void um_index_free(struct um_index *index) {
    struct um_table *table = atomic_load(&index->table);
    while (table) {
        struct um_table *outgrown = table->outgrown;
        free(table);
        table = outgrown;
    }
    *index = (struct um_index){0};
}
