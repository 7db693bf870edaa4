/* usermm._core.MessageSender. What a sender knows of itself it keeps here: its pages are never read back. */
#include <errno.h>
#include <string.h>

#include "channel.h"

static struct um_sender *sender_of(PyObject *self) {
    return (struct um_sender *)self;
}

/* The pages to write to; NULL with an exception. */
static struct um_control *control_of(const struct um_sender *self, const char *call) {
    if (self->end.data)
        return um_end_control(&self->end, call);
    um_raise(self->end.state, -EBADF, call, "the channel is closed: connect a new one");
    return NULL;
}

static bool is_back(const struct um_sender *self, const struct um_control *peer, unsigned slot) {
    return !self->tags[slot] || __atomic_load_n(&peer->returned[slot], __ATOMIC_ACQUIRE) == self->tags[slot];
}

int um_sender_free_slot(const struct um_sender *self) {
    if (!control_of(self, "loan"))
        return -1;
    for (unsigned slot = 0; slot < self->end.slots; slot++)
        if (!(self->end.busy >> slot & 1) && is_back(self, um_end_peer(&self->end), slot))
            return (int)slot;
    return -1;
}

PyObject *um_sender_publish(struct um_sender *self, struct um_descriptor *made) {
    struct um_control *own = control_of(self, "send");
    if (!own)
        return NULL;
    uint64_t number = self->end.messages + 1;
    made->tag = (uint32_t)number | UM_TAG;
    memcpy(&own->descriptors[self->end.messages % UM_MOST_SLOTS], made, sizeof *made);
    self->tags[made->slot] = made->tag;
    self->end.busy &= ~(UINT64_C(1) << made->slot);
    self->end.messages = number;
    __atomic_store_n(&own->messages_sent, (uint32_t)number, __ATOMIC_RELEASE);
    return um_end_wake(&self->end, UM_WANTS_MESSAGE) ? NULL : PyLong_FromUnsignedLongLong(number);
}

static PyObject *unconfirmed(PyObject *object, PyObject *unused) {
    struct um_sender *self = sender_of(object);
    (void)unused;
    if (!control_of(self, "lost"))
        return NULL;
    const struct um_control *peer = um_end_peer(&self->end);
    uint32_t waiting = (uint32_t)self->end.messages - __atomic_load_n(&peer->messages_taken, __ATOMIC_ACQUIRE), out = 0;
    for (unsigned slot = 0; slot < self->end.slots; slot++)
        out += !is_back(self, peer, slot);
    waiting = waiting < out ? waiting : out;
    return Py_BuildValue("II", waiting, out - waiting);
}

static PyMethodDef methods[] = {
    {"unconfirmed", unconfirmed, METH_NOARGS,
     "unconfirmed($self, /)\n--\n\n(messages not taken, messages taken but not given back)."},
    {"close", um_end_close, METH_NOARGS, "close($self, /)\n--\n\nLets the memory go."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, um_end_new},
    {Py_tp_dealloc, um_end_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec um_message_sender_spec = {
    .name = "usermm._core.MessageSender",
    .basicsize = sizeof(struct um_sender),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};
