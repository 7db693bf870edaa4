/* usermm._core.Owner: the callback of a weak reference to an object that owns the memory of a registration. */
#include "owner.h"

#define PAGE_BYTES 4096u
#define HEADER_BYTES 64u /* what allocators put before a block that is a mapping of its own */
#define MOST_BYTES                                                                                                     \
    (1u << 19) /* beyond 128 pages taking off the watch costs more than the event: docs/decisions/0010                 \
                */

struct owner {
    PyObject ob_base;
    PyObject *cache; /* a weak reference: the interpreter calls this even if the cache died a moment before */
    struct usermm_registration *registered;
    uint64_t serial;
};

/* Memory from the heap is used again, not unmapped, and its registration then stays true for the next object. */
static int looks_like_a_mapping(const struct usermm_registration *registered) {
    return registered->address % PAGE_BYTES <= HEADER_BYTES && registered->length >= PAGE_BYTES &&
           registered->length <= MOST_BYTES;
}

/* An array that is no view, or a mapping. Of other types nobody knows. */
static int owns_memory(const struct module_state *state, PyObject *object) {
    if ((PyObject *)Py_TYPE(object) == state->mmap_type)
        return 1;
    PyObject *base = PyObject_GetAttr(object, state->base_name);
    int owns = base == Py_None;
    Py_XDECREF(base);
    if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_Exception))
        PyErr_Clear();
    return owns;
}

PyObject *um_owner_new(struct um_python_cache *cache, PyObject *object, struct usermm_registration *registered) {
    PyTypeObject *type = (PyTypeObject *)cache->state->owner_type;
    if (!looks_like_a_mapping(registered) || !owns_memory(cache->state, object))
        return NULL;
    PyObject *reference = PyWeakref_NewRef((PyObject *)cache, NULL);
    struct owner *self = reference ? (struct owner *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0) : NULL;
    if (!self) {
        Py_XDECREF(reference);
        PyErr_Clear();
        return NULL;
    }
    self->cache = reference;
    self->registered = registered;
    self->serial = registered->serial;
    return (PyObject *)self;
}

/* Called by the interpreter with the dead reference, in the object's deallocator: the memory is still there. */
static PyObject *call(PyObject *object, PyObject *args, PyObject *kwargs) {
    struct owner *self = (struct owner *)object;
    (void)args, (void)kwargs;
    PyObject *cache = PyWeakref_GetObject(self->cache);
    if (!cache || cache == Py_None)
        Py_RETURN_NONE;
    Py_INCREF(cache);
    usermm_cache_retire(um_cache_of(cache)->core, self->registered, self->serial);
    Py_DECREF(cache);
    Py_RETURN_NONE;
}

static void dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    Py_XDECREF(((struct owner *)object)->cache);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyType_Slot slots[] = {
    {Py_tp_call, call},
    {Py_tp_dealloc, dealloc},
    {0, NULL},
};

PyType_Spec um_owner_spec = {
    .name = "usermm._core.Owner",
    .basicsize = sizeof(struct owner),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
