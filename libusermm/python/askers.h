/* Which objects asked a cache, and what they were given: the very object that asks again needs no probe. */
#ifndef UM_ASKERS_H
#define UM_ASKERS_H

#include "module.h"
#include "usermm_cache.h"

struct um_asker {
    PyObject *object;  /* only compared: it may be dead, and another object be there; NULL: never used */
    PyObject *weakref; /* owned; to `object` while that lives; NULL: the slot is free */
    uint64_t address, length;
    struct usermm_registration *registration;
    uint64_t serial;
    /* Views that are made for one call come to the same place again and again, and a weak reference costs more than all
     * else: a slot whose objects die without having asked twice lets some pass before it remembers one. */
    unsigned char asked_again, patience, passed;
    char unused[13]; /* so that a slot is one cache line */
};

struct um_askers {
    struct um_asker *slots;     /* NULL: none, and mask is 0 */
    size_t mask;                /* slots - 1 */
    unsigned shift;             /* 64 - log2(slots) */
    size_t used;                /* slots whose object is not NULL */
    PyTypeObject *unremembered; /* the latest type seen whose objects take no weak reference */
};

/* The top bits of the product: the middle ones crowd objects that an allocator set at regular distances. */
static inline size_t um_askers_place(const struct um_askers *askers, const PyObject *object) {
    return ((uintptr_t)object >> 4) * UINT64_C(0x9e3779b97f4a7c15) >> askers->shift & askers->mask;
}

/* Starts to load what find will look at: the buffer can be taken meanwhile. */
static inline void um_askers_prefetch(const struct um_askers *askers, const PyObject *object) {
    const struct um_asker *asker = &askers->slots[um_askers_place(askers, object)];
    if (!askers->slots)
        return;
    __builtin_prefetch(asker->registration);
    __builtin_prefetch((const char *)asker->weakref + 16);
}

/* The slot of this living object with this memory, or NULL. The interpreter's lock is held in all of these. */
struct um_asker *um_askers_find(const struct um_askers *askers, PyObject *object, uint64_t address, uint64_t length);
/*
 * Never fails: what cannot be remembered pays the probe again. Leaves a pending exception alone. `made`: the
 * registration was made for this object. `callback`, or NULL, is called when it dies, if it was not remembered before.
 */
void um_askers_remember(struct um_askers *askers, PyObject *object, uint64_t address, uint64_t length,
                        struct usermm_registration *registration, bool made, PyObject *callback);
/* Calls `alive` for each whose object lives or lived at the last sweep, and forgets the dead. */
void um_askers_sweep(struct um_askers *askers, void (*alive)(const struct um_asker *asker, void *context),
                     void *context);
/* Drops the weak reference to it, if there is one: NumPy resizes no array that has any. */
void um_askers_forget(struct um_askers *askers, PyObject *object);
void um_askers_clear(struct um_askers *askers);

#endif
