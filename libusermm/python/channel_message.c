/* usermm._core.Message: one that was received. Every view of it holds it, and its end gives the slot back. */
#include "channel.h"

struct message {
    PyObject ob_base;
    struct um_end *receiver; /* NULL once given back */
    struct um_memory *data;  /* stays mapped */
    size_t offset;
    struct um_descriptor descriptor;
};

static struct message *message_of(PyObject *self) {
    return (struct message *)self;
}

PyObject *um_message_make(struct um_end *receiver, const struct um_descriptor *found) {
    PyTypeObject *type = (PyTypeObject *)receiver->state->message_type;
    struct message *message = message_of(((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0));
    if (!message)
        return NULL;
    message->data = um_end_hold_data(receiver, found->slot, &message->offset);
    message->descriptor = *found;
    message->receiver = um_end_of(Py_NewRef((PyObject *)receiver));
    receiver->busy |= UINT64_C(1) << found->slot;
    return (PyObject *)message;
}

/* The slot is the sender's again; takes no lock, since it runs wherever the last view ends. -1 with an exception. */
static int give_back(struct message *message) {
    struct um_end *receiver = message->receiver;
    int result = 0;
    if (!receiver)
        return 0;
    message->receiver = NULL;
    receiver->busy &= ~(UINT64_C(1) << message->descriptor.slot);
    if (receiver->data && !um_memory_is_of_parent(receiver->data)) {
        struct um_control *own = um_end_control(receiver, "release");
        if (own) {
            __atomic_store_n(&own->returned[message->descriptor.slot], message->descriptor.tag, __ATOMIC_RELEASE);
            result = um_end_wake(receiver, UM_WANTS_SLOT);
        } else {
            result = -1;
        }
    }
    Py_DECREF((PyObject *)receiver);
    return result;
}

static PyObject *release(PyObject *self, PyObject *unused) {
    (void)unused;
    return give_back(message_of(self)) ? NULL : Py_NewRef(Py_None);
}

static void dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject *kind, *value, *trace;
    PyErr_Fetch(&kind, &value, &trace);
    if (give_back(message_of(self)))
        PyErr_WriteUnraisable((PyObject *)type);
    PyErr_Restore(kind, value, trace);
    um_memory_let_go(message_of(self)->data);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static int get_buffer(PyObject *self, Py_buffer *view, int flags) {
    struct message *message = message_of(self);
    if (!message->data->address || um_memory_is_of_parent(message->data)) {
        PyErr_SetString(PyExc_BufferError, "the message's memory is mapped in the parent process only");
        return -1;
    }
    return PyBuffer_FillInfo(view, self, message->data->address + message->offset,
                             (Py_ssize_t)message->descriptor.length, 1, flags);
}

static PyObject *get_item_type(PyObject *self, void *closure) {
    (void)closure;
    return um_descriptor_item_type(&message_of(self)->descriptor);
}

static PyObject *get_shape(PyObject *self, void *closure) {
    (void)closure;
    return um_descriptor_shape(&message_of(self)->descriptor);
}

static PyObject *get_offset(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromSize_t(message_of(self)->offset);
}

static Py_ssize_t length_of(PyObject *self) {
    return (Py_ssize_t)message_of(self)->descriptor.length;
}

static PyMethodDef methods[] = {
    {"release", release, METH_NOARGS, "release($self, /)\n--\n\nThe sender may use the slot again."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"item_type", get_item_type, NULL, NULL, NULL},
    {"shape", get_shape, NULL, NULL, NULL},
    {"offset", get_offset, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_dealloc, dealloc},      {Py_tp_methods, methods},  {Py_tp_getset, properties},
    {Py_bf_getbuffer, get_buffer}, {Py_sq_length, length_of}, {0, NULL},
};

PyType_Spec um_message_spec = {
    .name = "usermm._core.Message",
    .basicsize = sizeof(struct message),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
