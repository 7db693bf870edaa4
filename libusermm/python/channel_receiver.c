/*
 * usermm._core.MessageReceiver. What the peer wrote is copied once and looked at before it is used: what it writes
 * meanwhile changes nothing any more.
 */
#include <string.h>

#include "channel.h"

/* Always NULL. */
static PyObject *broken(const struct um_end *self, const char *format, ...) {
    va_list values;
    va_start(values, format);
    PyObject *what = PyUnicode_FromFormatV(format, values);
    va_end(values);
    PyObject *error = what ? PyObject_CallFunction(self->state->protocol_broken, "O", what) : NULL;
    if (error)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    Py_XDECREF(what);
    return NULL;
}

/* A copy of the next descriptor, as it is there: 1, 0 for none, -1 with an exception. */
static int look(const struct um_end *self, struct um_descriptor *ret_descriptor) {
    const struct um_control *peer = um_end_peer(self);
    uint32_t waiting = __atomic_load_n(&peer->messages_sent, __ATOMIC_ACQUIRE) - (uint32_t)self->messages;
    if (waiting == 0)
        return 0;
    if (waiting > self->slots) {
        broken(self, "%u messages in %u slots", waiting, self->slots);
        return -1;
    }
    memcpy(ret_descriptor, &peer->descriptors[self->messages % UM_MOST_SLOTS], sizeof *ret_descriptor);
    __asm__ volatile("" ::: "memory"); /* from here on nothing is read there again */
    return 1;
}

static bool is_sane(const struct um_end *self, const struct um_descriptor *found) {
    if (found->slot >= self->slots || found->length > self->slot_bytes || found->dimensions > UM_MOST_DIMENSIONS)
        broken(self, "a message in slot %u of %llu bytes with %u dimensions", found->slot,
               (unsigned long long)found->length, found->dimensions);
    else if (self->busy >> found->slot & 1)
        broken(self, "a message in slot %u, which is still held", found->slot);
    else
        return true;
    return false;
}

static PyObject *next(PyObject *object, PyObject *unused) {
    struct um_end *self = um_end_of(object);
    struct um_descriptor found;
    (void)unused;
    if (!self->data)
        Py_RETURN_NONE; /* closed: whoever waits looks at that himself */
    struct um_control *own = um_end_control(self, "receive");
    if (!own)
        return NULL;
    int there = look(self, &found);
    if (there == 0)
        Py_RETURN_NONE;
    PyObject *message = there > 0 && is_sane(self, &found) ? um_message_make(self, &found) : NULL;
    if (!message)
        return NULL;
    self->messages++;
    __atomic_store_n(&own->messages_taken, (uint32_t)self->messages, __ATOMIC_RELEASE);
    return message;
}

static PyMethodDef methods[] = {
    {"next", next, METH_NOARGS, "next($self, /)\n--\n\nTakes the next message, or None."},
    {"close", um_end_close, METH_NOARGS, "close($self, /)\n--\n\nLets the memory go; what is held keeps it."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, um_end_new},
    {Py_tp_dealloc, um_end_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec um_message_receiver_spec = {
    .name = "usermm._core.MessageReceiver",
    .basicsize = sizeof(struct um_end),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};
