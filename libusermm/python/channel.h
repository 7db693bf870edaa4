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

/* Both sides' control pages, kept mapped; NULL once closed. */
struct um_link {
    struct um_memory *own, *peer;
    PyObject *notify; /* wakes the peer */
};

/* Takes hold of the memory. -1 with an exception: the memory is closed, too short, or its own is read-only. */
int um_link_open(struct um_link *link, PyObject *own, PyObject *peer, PyObject *notify);
void um_link_close(struct um_link *link);

/* NULL with an exception: closed, or a forked parent's. */
struct um_control *um_link_own(const struct um_link *link, const char *call);
const struct um_control *um_link_peer(const struct um_link *link);

/* After a store: an event for the peer if it sleeps for it. -1 with the exception of `notify`. */
int um_link_wake(const struct um_link *link, uint32_t bit);

/* A memory that nobody unmaps before um_memory_let_go. -1 with an exception when it has less than `length` bytes. */
int um_memory_hold(struct um_memory *memory, size_t length);
void um_memory_let_go(struct um_memory *memory);

/* Where the slots of one direction are in its sender's data. */
struct um_slots {
    uint32_t count;
    size_t first, bytes;
};

/* The constructor's arguments of both ends; `format` and `names` are PyArg_ParseTupleAndKeywords'. False with an
 * exception. */
bool um_slots_parse(PyTypeObject *type, PyObject *args, PyObject *keywords, const char *format, char **names,
                    PyObject **ret_own, PyObject **ret_peer, PyObject **ret_data, PyObject **ret_notify,
                    struct um_slots *ret_slots);

struct um_sender {
    PyObject ob_base;
    const struct module_state *state;
    struct um_link link;
    struct um_memory *data; /* NULL once closed */
    struct um_slots slots;
    uint64_t messages;
    uint64_t loaned;              /* bit n: slot n is on loan */
    uint32_t tags[UM_MOST_SLOTS]; /* of the last message in a slot; 0: it was not sent, or is known to be back */
};

/* Hands over a slot that is on loan; its number from 1. NULL with an exception, and the loan goes on if it is closed.
 */
PyObject *um_sender_publish(struct um_sender *self, struct um_descriptor *made);

struct um_receiver {
    PyObject ob_base;
    const struct module_state *state;
    struct um_link link;
    struct um_memory *data; /* the peer's; NULL once closed */
    struct um_slots slots;
    uint64_t messages;
    uint64_t held; /* bit n: a message in slot n was not given back */
};

/* A message whose descriptor was looked at; its slot is held. NULL with an exception. */
PyObject *um_message_make(struct um_receiver *self, const struct um_descriptor *found);

extern PyType_Spec um_message_sender_spec, um_message_slot_spec, um_message_receiver_spec, um_message_spec;

#endif
