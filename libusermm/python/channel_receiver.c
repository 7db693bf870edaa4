/*
 * usermm._core.MessageReceiver. What the peer wrote is copied once and looked at before it is used: what it writes
 * meanwhile changes nothing any more.
 */
#include <string.h>

#include "channel.h"

static struct um_receiver *receiver_of(PyObject *self) {
    return (struct um_receiver *)self;
}

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"own", "peer", "data", "notify", "slots", "first", "slot_bytes", NULL};
    PyObject *own, *peer, *data, *notify;
    struct um_slots slots;
    if (!um_slots_parse(type, args, keywords, "O!O!O!OInn:MessageReceiver", names, &own, &peer, &data, &notify, &slots))
        return NULL;
    struct um_receiver *self = receiver_of(((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0));
    if (!self)
        return NULL;
    self->state = um_state_of_type(type);
    self->slots = slots;
    if (um_link_open(&self->link, own, peer, notify) == 0 &&
        um_memory_hold(um_memory_of(data), slots.first + slots.count * slots.bytes) == 0) {
        self->data = um_memory_of(data);
        return (PyObject *)self;
    }
    Py_DECREF(self);
    return NULL;
}

static void close_now(struct um_receiver *self) {
    struct um_memory *data = self->data;
    self->data = NULL;
    um_memory_let_go(data);
    um_link_close(&self->link);
}

static void dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    close_now(receiver_of(self));
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* Always NULL. */
static PyObject *broken(const struct um_receiver *self, const char *format, ...) {
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
static int look(const struct um_receiver *self, struct um_descriptor *ret_descriptor) {
    const struct um_control *peer = um_link_peer(&self->link);
    uint32_t waiting = __atomic_load_n(&peer->messages_sent, __ATOMIC_ACQUIRE) - (uint32_t)self->messages;
    if (waiting == 0)
        return 0;
    if (waiting > self->slots.count) {
        broken(self, "%u messages in %u slots", waiting, self->slots.count);
        return -1;
    }
    memcpy(ret_descriptor, &peer->descriptors[self->messages % UM_MOST_SLOTS], sizeof *ret_descriptor);
    __asm__ volatile("" ::: "memory"); /* from here on nothing is read there again */
    return 1;
}

static bool is_sane(const struct um_receiver *self, const struct um_descriptor *found) {
    if (found->slot >= self->slots.count || found->length > self->slots.bytes || found->dimensions > UM_MOST_DIMENSIONS)
        broken(self, "a message in slot %u of %llu bytes with %u dimensions", found->slot,
               (unsigned long long)found->length, found->dimensions);
    else if (self->held >> found->slot & 1)
        broken(self, "a message in slot %u, which is still held", found->slot);
    else
        return true;
    return false;
}

static PyObject *next(PyObject *object, PyObject *unused) {
    struct um_receiver *self = receiver_of(object);
    struct um_descriptor found;
    (void)unused;
    if (!self->data)
        Py_RETURN_NONE; /* closed: whoever waits looks at that himself */
    struct um_control *own = um_link_own(&self->link, "receive");
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

static PyObject *close_receiver(PyObject *self, PyObject *unused) {
    (void)unused;
    close_now(receiver_of(self));
    Py_RETURN_NONE;
}

static PyMethodDef receiver_methods[] = {
    {"next", next, METH_NOARGS, "next($self, /)\n--\n\nTakes the next message, or None."},
    {"close", close_receiver, METH_NOARGS, "close($self, /)\n--\n\nLets the memory go; what is held keeps it."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot receiver_slots[] = {
    {Py_tp_new, new},
    {Py_tp_dealloc, dealloc},
    {Py_tp_methods, receiver_methods},
    {0, NULL},
};

PyType_Spec um_message_receiver_spec = {
    .name = "usermm._core.MessageReceiver",
    .basicsize = sizeof(struct um_receiver),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = receiver_slots,
};
