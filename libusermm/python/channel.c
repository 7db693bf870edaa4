/* What both ends of a channel's messages have: memory that stays mapped, and control pages. */
#include "channel.h"

static int hold(struct um_memory *memory, size_t length, struct um_memory **ret_held) {
    if (um_memory_refuse(memory, "channel"))
        return -1;
    if (memory->length < length) {
        um_memory_argument_error((PyObject *)memory, false, "channel: it needs %zu bytes, and the memory has %zu",
                                 length, memory->length);
        return -1;
    }
    memory->exports++;
    Py_INCREF((PyObject *)memory);
    *ret_held = memory;
    return 0;
}

void um_memory_let_go(struct um_memory *memory) {
    if (!memory)
        return;
    memory->exports--;
    Py_DECREF((PyObject *)memory);
}

/* How many bytes of data the slots need, or 0 with an exception. */
static size_t parse(const struct module_state *state, PyObject *args, PyObject *keywords, struct um_end *ret_end,
                    PyObject *memories[3]) {
    static char *names[] = {"own", "peer", "data", "notify", "slots", "first", "slot_bytes", NULL};
    PyTypeObject *memory = (PyTypeObject *)state->memory_type;
    Py_ssize_t slots, first, bytes, end;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!O!O!Onnn", names, memory, &memories[0], memory, &memories[1],
                                     memory, &memories[2], &ret_end->notify, &slots, &first, &bytes))
        return 0;
    if (slots < 1 || slots > UM_MOST_SLOTS || first < 0 || bytes < 1 || __builtin_mul_overflow(slots, bytes, &end) ||
        __builtin_add_overflow(end, first, &end)) {
        PyErr_Format(state->argument_error, "channel: %zd slots of %zd bytes from %zd on", slots, bytes, first);
        return 0;
    }
    if (!um_memory_of(memories[0])->writable) {
        PyErr_SetString(state->argument_error, "channel: the control pages of one's own are read-only");
        return 0;
    }
    ret_end->slots = (uint32_t)slots;
    ret_end->first = (size_t)first;
    ret_end->slot_bytes = (size_t)bytes;
    return (size_t)end;
}

PyObject *um_end_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    const struct module_state *state = um_state_of_type(type);
    struct um_end parsed = {0};
    PyObject *memories[3];
    size_t length = parse(state, args, keywords, &parsed, memories);
    struct um_end *self = length ? um_end_of(((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0)) : NULL;
    if (!self)
        return NULL;
    self->state = state;
    self->notify = Py_NewRef(parsed.notify);
    self->slots = parsed.slots;
    self->first = parsed.first;
    self->slot_bytes = parsed.slot_bytes;
    if (hold(um_memory_of(memories[0]), sizeof(struct um_control), &self->own) == 0 &&
        hold(um_memory_of(memories[1]), sizeof(struct um_control), &self->peer) == 0 &&
        hold(um_memory_of(memories[2]), length, &self->data) == 0)
        return (PyObject *)self;
    Py_DECREF((PyObject *)self);
    return NULL;
}

PyObject *um_end_close(PyObject *self, PyObject *unused) {
    struct um_end *end = um_end_of(self);
    struct um_memory *held[] = {end->own, end->peer, end->data};
    (void)unused;
    end->own = end->peer = end->data = NULL; /* first: what is let go may run somebody's code */
    for (int i = 0; i < 3; i++)
        um_memory_let_go(held[i]);
    Py_CLEAR(end->notify);
    Py_RETURN_NONE;
}

void um_end_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_DECREF(um_end_close(self, NULL));
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

struct um_control *um_end_control(const struct um_end *end, const char *call) {
    if (um_memory_refuse(end->own, call) || um_memory_refuse(end->peer, call))
        return NULL;
    return (struct um_control *)(void *)end->own->address;
}

const struct um_control *um_end_peer(const struct um_end *end) {
    return (const struct um_control *)(const void *)end->peer->address;
}

int um_end_wake(const struct um_end *end, uint32_t bit) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* what was stored is seen before it is asked who sleeps */
    if (!(__atomic_load_n(&um_end_peer(end)->waiting, __ATOMIC_RELAXED) & bit))
        return 0;
    PyObject *notify = Py_NewRef(end->notify); /* whose code may let another thread close this end */
    PyObject *answer = PyObject_CallNoArgs(notify);
    Py_DECREF(notify);
    Py_XDECREF(answer);
    return answer ? 0 : -1;
}

struct um_memory *um_end_hold_data(const struct um_end *end, unsigned slot, size_t *ret_offset) {
    end->data->exports++;
    Py_INCREF((PyObject *)end->data);
    *ret_offset = end->first + slot * end->slot_bytes;
    return end->data;
}

PyObject *um_descriptor_item_type(const struct um_descriptor *descriptor) {
    size_t length = sizeof descriptor->item_type;
    while (length && !descriptor->item_type[length - 1])
        length--;
    return PyBytes_FromStringAndSize(descriptor->item_type, (Py_ssize_t)length);
}

PyObject *um_descriptor_shape(const struct um_descriptor *descriptor) {
    PyObject *shape = PyTuple_New(descriptor->dimensions);
    for (unsigned i = 0; shape && i < descriptor->dimensions; i++) {
        PyObject *size = PyLong_FromUnsignedLongLong(descriptor->shape[i]);
        if (!size || PyTuple_SetItem(shape, i, size))
            Py_CLEAR(shape);
    }
    return shape;
}
