/* usermm._core.MessageSlot: memory on loan, to be filled in and sent. Its end without that gives it back unsent. */
#include <errno.h>
#include <string.h>

#include "channel.h"

struct slot {
    PyObject ob_base;
    struct um_sender *sender; /* NULL once sent or cancelled */
    struct um_memory *data;   /* stays mapped */
    size_t offset;
    struct um_descriptor descriptor;
};

static struct slot *slot_of(PyObject *self) {
    return (struct slot *)self;
}

/* What the message will be, but for its slot; the descriptor is zeros so far. False with an exception. */
static bool describe(struct um_descriptor *descriptor, const struct um_sender *sender, Py_ssize_t length,
                     PyObject *item_type, PyObject *shape) {
    char *type;
    Py_ssize_t type_length, dimensions = PyTuple_Size(shape);
    if (PyBytes_AsStringAndSize(item_type, &type, &type_length))
        return false;
    if (length < 0 || (size_t)length > sender->end.slot_bytes || (size_t)type_length > sizeof descriptor->item_type ||
        dimensions > UM_MOST_DIMENSIONS) {
        PyErr_Format(sender->end.state->argument_error,
                     "loan: %zd bytes of %zu, a type of %zd bytes, %zd dimensions: pass less", length,
                     sender->end.slot_bytes, type_length, dimensions);
        return false;
    }
    descriptor->length = (uint64_t)length;
    memcpy(descriptor->item_type, type, (size_t)type_length);
    descriptor->dimensions = (uint32_t)dimensions;
    for (Py_ssize_t i = 0; i < dimensions; i++)
        descriptor->shape[i] = PyLong_AsUnsignedLongLong(PyTuple_GetItem(shape, i));
    return !PyErr_Occurred();
}

/* In one call, so that no exception can come between the slot and who gives it back. */
static PyObject *take(PyObject *type, PyObject *args) {
    const struct module_state *state = um_state_of_type((PyTypeObject *)type);
    PyObject *object, *item_type, *shape;
    Py_ssize_t length;
    struct um_descriptor made = {0};
    if (!PyArg_ParseTuple(args, "O!nO!O!:take", (PyTypeObject *)state->sender_type, &object, &length, &PyBytes_Type,
                          &item_type, &PyTuple_Type, &shape))
        return NULL;
    struct um_sender *sender = (struct um_sender *)object;
    if (!describe(&made, sender, length, item_type, shape))
        return NULL;
    int number = um_sender_free_slot(sender);
    if (number < 0)
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    struct slot *self =
        slot_of(((allocfunc)PyType_GetSlot((PyTypeObject *)type, Py_tp_alloc))((PyTypeObject *)type, 0));
    if (!self)
        return NULL;
    made.slot = (uint32_t)number;
    self->data = um_end_hold_data(&sender->end, made.slot, &self->offset);
    self->descriptor = made;
    self->sender = (struct um_sender *)Py_NewRef(object);
    sender->tags[number] = 0;
    sender->end.busy |= UINT64_C(1) << number;
    return (PyObject *)self;
}

static void cancel_now(struct slot *self) {
    struct um_sender *sender = self->sender;
    self->sender = NULL;
    if (sender) {
        sender->end.busy &= ~(UINT64_C(1) << self->descriptor.slot);
        Py_DECREF((PyObject *)sender);
    }
}

static void dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    cancel_now(slot_of(self));
    um_memory_let_go(slot_of(self)->data);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static bool is_spent(struct slot *self) {
    if (self->sender)
        return false;
    const struct module_state *state = um_state_of_type(Py_TYPE((PyObject *)self));
    um_raise(state, -EBADF, "slot", "it was sent or cancelled: ask for another loan");
    return true;
}

static bool is_unmapped(const struct slot *self) {
    if (self->data->address && !um_memory_is_of_parent(self->data))
        return false;
    PyErr_SetString(PyExc_BufferError, "slot: its memory is mapped in the parent process only");
    return true;
}

/* Lets the interpreter's lock go for what takes long. */
static void copy(struct slot *self, const Py_buffer *data) {
    char *at = self->data->address + self->offset;
    if (data->len < (Py_ssize_t)UM_LONG_BYTES) {
        memmove(at, data->buf, (size_t)data->len);
        return;
    }
    Py_BEGIN_ALLOW_THREADS
    memmove(at, data->buf, (size_t)data->len);
    Py_END_ALLOW_THREADS
}

static PyObject *fill(PyObject *object, PyObject *buffer) {
    struct slot *self = slot_of(object);
    Py_buffer data;
    PyObject *answer = NULL;
    if (is_spent(self) || PyObject_GetBuffer(buffer, &data, PyBUF_C_CONTIGUOUS))
        return NULL;
    if ((uint64_t)data.len != self->descriptor.length)
        PyErr_Format(um_state_of_type(Py_TYPE(object))->argument_error, "fill: the slot has %llu bytes, the data %zd",
                     (unsigned long long)self->descriptor.length, data.len);
    else if (!is_unmapped(self)) {
        copy(self, &data);
        answer = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&data);
    return answer;
}

static PyObject *send(PyObject *object, PyObject *unused) {
    struct slot *self = slot_of(object);
    (void)unused;
    if (is_spent(self))
        return NULL;
    struct um_sender *sender = self->sender;
    self->sender = NULL;
    PyObject *number = um_sender_publish(sender, &self->descriptor);
    Py_DECREF((PyObject *)sender);
    return number;
}

static PyObject *cancel(PyObject *self, PyObject *unused) {
    (void)unused;
    cancel_now(slot_of(self));
    Py_RETURN_NONE;
}

static int get_buffer(PyObject *object, Py_buffer *view, int flags) {
    struct slot *self = slot_of(object);
    if (is_unmapped(self))
        return -1;
    return PyBuffer_FillInfo(view, object, self->data->address + self->offset, (Py_ssize_t)self->descriptor.length, 0,
                             flags);
}

static PyObject *get_view(PyObject *self, void *closure) {
    (void)closure;
    return is_spent(slot_of(self)) ? NULL : PyMemoryView_FromObject(self);
}

static PyObject *get_item_type(PyObject *self, void *closure) {
    (void)closure;
    return um_descriptor_item_type(&slot_of(self)->descriptor);
}

static PyObject *get_shape(PyObject *self, void *closure) {
    (void)closure;
    return um_descriptor_shape(&slot_of(self)->descriptor);
}

static Py_ssize_t length_of(PyObject *self) {
    return (Py_ssize_t)slot_of(self)->descriptor.length;
}

static PyMethodDef methods[] = {
    {"take", take, METH_VARARGS | METH_CLASS,
     "take($type, sender, length, item_type, shape, /)\n--\n\nA slot that nobody uses, or None."},
    {"fill", fill, METH_O, "fill($self, data, /)\n--\n\nCopies a contiguous buffer of just this length."},
    {"send", send, METH_NOARGS, "send($self, /)\n--\n\nHands it over; the message's number, from 1."},
    {"cancel", cancel, METH_NOARGS, "cancel($self, /)\n--\n\nGives the slot back unsent."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"view", get_view, NULL, NULL, NULL},
    {"item_type", get_item_type, NULL, NULL, NULL},
    {"shape", get_shape, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_dealloc, dealloc},      {Py_tp_methods, methods},  {Py_tp_getset, properties},
    {Py_bf_getbuffer, get_buffer}, {Py_sq_length, length_of}, {0, NULL},
};

PyType_Spec um_message_slot_spec = {
    .name = "usermm._core.MessageSlot",
    .basicsize = sizeof(struct slot),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
