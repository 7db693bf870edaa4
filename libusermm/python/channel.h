/* The messages of a usermm.Channel, shared between the sender's and the receiver's end: docs/channels.md. */
#ifndef UM_CHANNEL_H
#define UM_CHANNEL_H

#include <assert.h>
#include <stddef.h>

#include "memory.h"

#define UM_MOST_SLOTS 64
#define UM_MOST_DIMENSIONS 8
#define UM_WANTS_MESSAGE 1u
#define UM_WANTS_SLOT 2u
#define UM_TAG 0x80000000u /* no tag is 0, which is what a fresh page says */

struct um_descriptor {
    uint32_t slot, tag;
    uint64_t length;
    char item_type[16];
    uint32_t dimensions, unused;
    uint64_t shape[UM_MOST_DIMENSIONS];
    char reserved[24];
};

/* The control pages of one side: it alone writes there, and only the other side reads. */
struct um_control {
    _Alignas(64) uint32_t waiting;
    _Alignas(64) uint32_t messages_sent;
    _Alignas(64) uint32_t messages_taken;
    _Alignas(64) uint32_t bytes_sent;
    _Alignas(64) uint32_t bytes_taken;
    _Alignas(64) uint32_t returned[UM_MOST_SLOTS];
    _Alignas(4096) struct um_descriptor descriptors[UM_MOST_SLOTS];
};
static_assert(offsetof(struct um_control, returned) == 320, "the layout is a protocol");
static_assert(sizeof(struct um_descriptor) == 128 && sizeof(struct um_control) == 3 * 4096, "the layout is a protocol");

/* As a Python object: bytes without NULs at the end, a tuple. NULL with an exception. */
PyObject *um_descriptor_item_type(const struct um_descriptor *descriptor);
PyObject *um_descriptor_shape(const struct um_descriptor *descriptor);

/* What both ends of one direction have; the type of a receiver's, and the beginning of a sender's. */
struct um_end {
    PyObject ob_base;
    const struct module_state *state;
    struct um_memory *own, *peer; /* control pages, kept mapped; NULL once closed, as the next */
    struct um_memory *data;       /* the sender's: `slots` of `slot_bytes`, from byte `first` on */
    PyObject *notify;             /* wakes the peer */
    uint32_t slots;
    size_t first, slot_bytes;
    uint64_t messages; /* sent, or taken */
    uint64_t busy;     /* bit n: slot n is on loan here, or a message in it was not given back */
};

static inline struct um_end *um_end_of(PyObject *self) {
    return (struct um_end *)self;
}

/* The constructor, destructor and close() of both ends. */
PyObject *um_end_new(PyTypeObject *type, PyObject *args, PyObject *keywords);
void um_end_dealloc(PyObject *self);
PyObject *um_end_close(PyObject *self, PyObject *unused);

/* The control pages to write to, of an end that is not closed. NULL with an exception in a forked child. */
struct um_control *um_end_control(const struct um_end *end, const char *call);
const struct um_control *um_end_peer(const struct um_end *end);

/* After a store: an event for the peer if it sleeps for it. -1 with the exception of `notify`. */
int um_end_wake(const struct um_end *end, uint32_t bit);

/* The slot's memory, kept mapped until um_memory_let_go. */
struct um_memory *um_end_hold_data(const struct um_end *end, unsigned slot, size_t *ret_offset);
void um_memory_let_go(struct um_memory *memory);

struct um_sender {
    struct um_end end;
    uint32_t tags[UM_MOST_SLOTS]; /* of the last message in a slot; 0: it was not sent, or is known to be back */
};

/* A slot that nobody uses; -1: none, or an exception. */
int um_sender_free_slot(const struct um_sender *self);
/* Hands over a slot that is on loan; its number from 1. NULL with an exception. */
PyObject *um_sender_publish(struct um_sender *self, struct um_descriptor *made);

/* A message whose descriptor was looked at; its slot is held. NULL with an exception. */
PyObject *um_message_make(struct um_end *receiver, const struct um_descriptor *found);

extern PyType_Spec um_message_sender_spec, um_message_slot_spec, um_message_receiver_spec, um_message_spec;

#endif
