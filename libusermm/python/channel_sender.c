/* usermm._core.MessageSender. What a sender knows of itself it keeps here: its pages are never read back. */
#include <errno.h>
#include <string.h>

#include "channel.h"

static struct um_sender *sender_of(PyObject *self) {
    return (struct um_sender *)self;
}

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"own", "peer", "data", "notify", "slots", "first", "slot_bytes", NULL};
    PyObject *own, *peer, *data, *notify;
    struct um_slots slots;
    if (!um_slots_parse(type, args, keywords, "O!O!O!OInn:MessageSender", names, &own, &peer, &data, &notify, &slots))
        return NULL;
    struct um_sender *self = sender_of(((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0));
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

static void close_now(struct um_sender *self) {
    struct um_memory *data = self->data;
    self->data = NULL;
    um_memory_let_go(data);
    um_link_close(&self->link);
}

static void dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    close_now(sender_of(self));
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* The pages to write to; NULL with an exception. */
static struct um_control *control_of(const struct um_sender *self, const char *call) {
    if (self->data)
        return um_link_own(&self->link, call);
    um_raise(self->state, -EBADF, "send", "the channel is closed: connect a new one");
    return NULL;
}

static bool is_back(const struct um_sender *self, const struct um_control *peer, unsigned slot) {
    return !self->tags[slot] || __atomic_load_n(&peer->returned[slot], __ATOMIC_ACQUIRE) == self->tags[slot];
}

static PyObject *take_slot(PyObject *object, PyObject *unused) {
    struct um_sender *self = sender_of(object);
    (void)unused;
    if (!control_of(self, "loan"))
        return NULL;
    for (unsigned slot = 0; slot < self->slots.count; slot++) {
        if (self->loaned >> slot & 1 || !is_back(self, um_link_peer(&self->link), slot))
            continue;
        self->tags[slot] = 0;
        self->loaned |= UINT64_C(1) << slot;
        return PyLong_FromUnsignedLong(slot);
    }
    Py_RETURN_NONE;
}

PyObject *um_sender_publish(struct um_sender *self, struct um_descriptor *made) {
    struct um_control *own = control_of(self, "send");
    if (!own)
        return NULL;
    uint64_t number = self->messages + 1;
    made->tag = (uint32_t)number | UM_TAG;
    memcpy(&own->descriptors[self->messages % UM_MOST_SLOTS], made, sizeof *made);
    self->tags[made->slot] = made->tag;
    self->loaned &= ~(UINT64_C(1) << made->slot);
    self->messages = number;
    __atomic_store_n(&own->messages_sent, (uint32_t)number, __ATOMIC_RELEASE);
    return um_link_wake(&self->link, UM_WANTS_MESSAGE) ? NULL : PyLong_FromUnsignedLongLong(number);
}

static PyObject *unconfirmed(PyObject *object, PyObject *unused) {
    struct um_sender *self = sender_of(object);
    (void)unused;
    if (!control_of(self, "lost"))
        return NULL;
    const struct um_control *peer = um_link_peer(&self->link);
    uint32_t waiting = (uint32_t)self->messages - __atomic_load_n(&peer->messages_taken, __ATOMIC_ACQUIRE), out = 0;
    for (unsigned slot = 0; slot < self->slots.count; slot++)
        out += !is_back(self, peer, slot);
    waiting = waiting < out ? waiting : out;
    return Py_BuildValue("II", waiting, out - waiting);
}

static PyObject *close_sender(PyObject *self, PyObject *unused) {
    (void)unused;
    close_now(sender_of(self));
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"take_slot", take_slot, METH_NOARGS, "take_slot($self, /)\n--\n\nA slot that nobody uses, or None."},
    {"unconfirmed", unconfirmed, METH_NOARGS,
     "unconfirmed($self, /)\n--\n\n(messages not taken, messages taken but not given back)."},
    {"close", close_sender, METH_NOARGS, "close($self, /)\n--\n\nLets the memory go."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, new},
    {Py_tp_dealloc, dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec um_message_sender_spec = {
    .name = "usermm._core.MessageSender",
    .basicsize = sizeof(struct um_sender),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};
