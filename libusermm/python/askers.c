/* Which objects asked a cache: a hash table by object, each entry worth no more than its weak reference. */
#include "askers.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define HUGE_PAGE_BYTES (2u << 20)
#define FIRST_SLOTS 64u
#define MOST_SLOTS (1u << 21) /* 128 MiB; beyond a million living askers the oldest pay the probe again */
#define WINDOW 16u            /* slots that an object can be in */
#define MOST_PATIENCE 15

static int is_alive(const struct um_asker *asker) {
    return asker->weakref && PyWeakref_GetObject(asker->weakref) == asker->object;
}

struct um_asker *um_askers_find(const struct um_askers *askers, PyObject *object, uint64_t address, uint64_t length) {
    size_t place = um_askers_place(askers, object);
    for (unsigned i = 0; askers->slots && i < WINDOW; i++) {
        struct um_asker *asker = &askers->slots[(place + i) & askers->mask];
        if (!asker->object)
            return NULL;
        if (asker->object != object)
            continue;
        __builtin_prefetch(asker->registration); /* both are most likely far away, and independent */
        if (!is_alive(asker) || asker->address != address || asker->length != length)
            return NULL;
        if (!asker->asked_again)
            asker->asked_again = 1;
        return asker;
    }
    return NULL;
}

/* Used, so that look-ups go on behind it, but free. */
static void empty(struct um_asker *asker) {
    static char nobody; /* no object is here */
    PyObject *weakref = asker->weakref;
    *asker = (struct um_asker){.object = (PyObject *)&nobody, .patience = asker->patience};
    Py_XDECREF(weakref);
}

/* The slot that the object has, else a free one, else NULL. */
static struct um_asker *slot_for(const struct um_askers *askers, const PyObject *object) {
    struct um_asker *free_one = NULL;
    size_t place = um_askers_place(askers, object);
    for (unsigned i = 0; askers->slots && i < WINDOW; i++) {
        struct um_asker *asker = &askers->slots[(place + i) & askers->mask];
        if (asker->object == object)
            return asker;
        if (!free_one && !is_alive(asker))
            free_one = asker;
        if (!asker->object)
            break;
    }
    return free_one;
}

static void fill(struct um_askers *askers, struct um_asker *slot, struct um_asker value) {
    PyObject *before = slot->weakref;
    askers->used += slot->object == NULL;
    *slot = value;
    Py_XDECREF(before);
}

static int allocate(struct um_askers *askers, size_t slots) {
    size_t size = slots * sizeof(struct um_asker);
    struct um_asker *fresh = aligned_alloc(size < HUGE_PAGE_BYTES ? sizeof *fresh : HUGE_PAGE_BYTES, size);
    if (!fresh)
        return -1;
    if (size >= HUGE_PAGE_BYTES)
        madvise(fresh, size, MADV_HUGEPAGE); /* random look-ups miss the TLB otherwise */
    memset(fresh, 0, size);
    unsigned shift = 64 - (unsigned)__builtin_ctzll(slots);
    *askers = (struct um_askers){fresh, slots - 1, shift, 0, askers->unremembered};
    return 0;
}

/* Into a table of this many slots; the dead stay behind. */
static void move_to(struct um_askers *askers, size_t slots) {
    struct um_askers old = *askers;
    if (allocate(askers, slots))
        return;
    for (size_t i = 0; old.slots && i <= old.mask; i++) {
        struct um_asker *slot = is_alive(&old.slots[i]) ? slot_for(askers, old.slots[i].object) : NULL;
        if (slot)
            fill(askers, slot, old.slots[i]);
        else
            Py_XDECREF(old.slots[i].weakref);
    }
    free(old.slots);
}

/* Half full, the dead included, is full: they go first, and if the living alone are many, the table doubles. */
static void make_room(struct um_askers *askers) {
    if (!askers->slots)
        move_to(askers, FIRST_SLOTS);
    else if (2 * askers->used > askers->mask)
        move_to(askers, askers->mask + 1);
    if (askers->slots && 3 * askers->used > askers->mask && askers->mask < MOST_SLOTS)
        move_to(askers, 2 * (askers->mask + 1));
}

/* NULL, without an exception, for an object that takes none. */
static PyObject *weakref_to(struct um_askers *askers, PyObject *object, PyObject *callback) {
    if (Py_TYPE(object) == askers->unremembered)
        return NULL;
    PyObject *kind, *value, *traceback;
    PyErr_Fetch(&kind, &value, &traceback);
    PyObject *weakref = PyWeakref_NewRef(object, callback);
    if (!weakref) {
        PyTypeObject *before = askers->unremembered;
        askers->unremembered = (PyTypeObject *)Py_NewRef((PyObject *)Py_TYPE(object));
        Py_XDECREF((PyObject *)before);
    }
    PyErr_Restore(kind, value, traceback);
    return weakref;
}

/* Whether the slot is to let this object pass; it has learned from the ones before. */
static bool passes(struct um_asker *slot, bool made) {
    if (slot->weakref && !slot->asked_again)
        slot->patience = slot->patience < MOST_PATIENCE ? (unsigned char)(2 * slot->patience + 1) : MOST_PATIENCE;
    else if (slot->weakref)
        slot->patience = 0;
    if (made || slot->passed >= slot->patience)
        return false;
    slot->passed++;
    return true;
}

void um_askers_remember(struct um_askers *askers, PyObject *object, uint64_t address, uint64_t length,
                        struct usermm_registration *registration, bool made, PyObject *callback) {
    struct um_asker value = {object, NULL, address, length, registration, registration->serial, 0, 0, 0, {0}};
    struct um_asker *slot = slot_for(askers, object);
    if (slot && slot->object == object && is_alive(slot)) { /* it has moved, or was given another registration */
        value.weakref = slot->weakref;
        *slot = value;
        return;
    }
    bool pass = slot && passes(slot, made);
    value.patience = slot ? slot->patience : 0;
    value.passed = pass ? slot->passed : 0;
    if (pass) {
        fill(askers, slot, value);
        return;
    }
    value.weakref = weakref_to(askers, object, callback);
    if (!value.weakref)
        return;
    make_room(askers);
    slot = slot_for(askers, object);
    if (!slot && askers->slots)
        slot = &askers->slots[um_askers_place(askers, object)]; /* the window is full by chance: one pays again */
    if (slot)
        fill(askers, slot, value);
    else
        Py_DECREF(value.weakref);
}

void um_askers_sweep(struct um_askers *askers, void (*alive)(const struct um_asker *asker, void *context),
                     void *context) {
    for (size_t i = 0; askers->slots && i <= askers->mask; i++) {
        struct um_asker *asker = &askers->slots[i];
        if (asker->weakref)
            alive(asker, context); /* who died since the last sweep was alive until now, as far as anybody knows */
        if (asker->weakref && !is_alive(asker))
            empty(asker);
    }
}

void um_askers_forget(struct um_askers *askers, PyObject *object) {
    struct um_asker *asker = slot_for(askers, object);
    if (asker && asker->object == object)
        empty(asker);
}

void um_askers_clear(struct um_askers *askers) {
    struct um_askers old = *askers;
    *askers = (struct um_askers){0};
    for (size_t i = 0; old.slots && i <= old.mask; i++)
        Py_XDECREF(old.slots[i].weakref);
    free(old.slots);
    Py_XDECREF((PyObject *)old.unremembered);
}
