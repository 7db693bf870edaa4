/* What both ends of a channel's messages do with their control pages. */
#include "channel.h"

#include <errno.h>

int um_memory_hold(struct um_memory *memory, size_t length) {
    if (um_memory_refuse(memory, "channel"))
        return -1;
    if (memory->length < length) {
        um_memory_argument_error((PyObject *)memory, false, "channel: it needs %zu bytes, and the memory has %zu",
                                 length, memory->length);
        return -1;
    }
    memory->exports++;
    Py_INCREF((PyObject *)memory);
    return 0;
}

void um_memory_let_go(struct um_memory *memory) {
    if (!memory)
        return;
    memory->exports--;
    Py_DECREF((PyObject *)memory);
}

bool um_slots_parse(PyTypeObject *type, PyObject *args, PyObject *keywords, const char *format, char **names,
                    PyObject **ret_own, PyObject **ret_peer, PyObject **ret_data, PyObject **ret_notify,
                    struct um_slots *ret_slots) {
    const struct module_state *state = um_state_of_type(type);
    PyTypeObject *memory = (PyTypeObject *)state->memory_type;
    Py_ssize_t first, bytes, end;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, format, names, memory, ret_own, memory, ret_peer, memory, ret_data,
                                     ret_notify, &ret_slots->count, &first, &bytes))
        return false;
    if (ret_slots->count < 1 || ret_slots->count > UM_MOST_SLOTS || first < 0 || bytes < 1 ||
        __builtin_mul_overflow((Py_ssize_t)ret_slots->count, bytes, &end) || __builtin_add_overflow(end, first, &end)) {
        PyErr_Format(state->argument_error, "channel: %u slots of %zd bytes from %zd on", ret_slots->count, bytes,
                     first);
        return false;
    }
    ret_slots->first = (size_t)first;
    ret_slots->bytes = (size_t)bytes;
    return true;
}

int um_link_open(struct um_link *link, PyObject *own, PyObject *peer, PyObject *notify) {
    if (!um_memory_of(own)->writable) {
        um_memory_argument_error(own, false, "channel: the control pages of one's own are read-only");
        return -1;
    }
    if (um_memory_hold(um_memory_of(own), sizeof(struct um_control)))
        return -1;
    link->own = um_memory_of(own);
    if (um_memory_hold(um_memory_of(peer), sizeof(struct um_control)))
        return -1;
    link->peer = um_memory_of(peer);
    link->notify = Py_NewRef(notify);
    return 0;
}

void um_link_close(struct um_link *link) {
    struct um_memory *own = link->own, *peer = link->peer;
    link->own = link->peer = NULL;
    um_memory_let_go(own);
    um_memory_let_go(peer);
    Py_CLEAR(link->notify);
}

struct um_control *um_link_own(const struct um_link *link, const char *call) {
    if (um_memory_refuse(link->own, call) || um_memory_refuse(link->peer, call))
        return NULL;
    return (struct um_control *)(void *)link->own->address;
}

const struct um_control *um_link_peer(const struct um_link *link) {
    return (const struct um_control *)(const void *)link->peer->address;
}

int um_link_wake(const struct um_link *link, uint32_t bit) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* what was stored is seen before it is asked who sleeps */
    if (!(__atomic_load_n(&um_link_peer(link)->waiting, __ATOMIC_RELAXED) & bit))
        return 0;
    PyObject *notify = Py_NewRef(link->notify); /* whose code may let another thread close this end */
    PyObject *answer = PyObject_CallNoArgs(notify);
    Py_DECREF(notify);
    Py_XDECREF(answer);
    return answer ? 0 : -1;
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
