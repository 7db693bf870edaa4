/* usermm._core.Registration: one holder of a registration. Its methods are documented in _core.pyi. */
#include "cache.h"

struct registration {
    PyObject ob_base;
    struct um_python_cache *cache;          /* NULL once released */
    struct usermm_registration *registered; /* likewise; held */
    bool is_pooled;                         /* its memory goes back to the pool */
    bool is_tracked;                        /* by the garbage collector */
};

static struct registration *allocate(struct module_state *state, PyTypeObject *type) {
    struct registration *self = (struct registration *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self)
        return NULL;
    self->is_tracked = true;
    self->is_pooled = state->pool_count < UM_POOL;
    if (self->is_pooled) {
        state->pool[state->pool_count++] = (PyObject *)self;
        PyObject_GC_UnTrack(self);
        self->is_tracked = false;
    }
    return self;
}

/*
 * Each get makes one and most live for a moment, so some are kept, which saves half of what an object costs. Those are
 * shown to the garbage collector only if they live on: see um_registrations_track.
 */
PyObject *um_registration_new(struct um_python_cache *cache, struct usermm_registration *registered) {
    struct module_state *state = cache->state;
    PyTypeObject *type = (PyTypeObject *)state->registration_type;
    struct registration *self;
    if (state->spare_count) {
        self = (struct registration *)state->spares[--state->spare_count];
        Py_SET_REFCNT((PyObject *)self, 1); /* it kept its type */
    } else {
        self = allocate(state, type);
    }
    if (!self) {
        usermm_cache_release(cache->core, registered);
        return NULL;
    }
    Py_INCREF((PyObject *)cache);
    self->cache = cache;
    self->registered = registered;
    return (PyObject *)self;
}

void um_registrations_track(struct module_state *state) {
    for (int i = 0; i < state->pool_count; i++) {
        struct registration *self = (struct registration *)state->pool[i];
        if (self->cache && !self->is_tracked)
            PyObject_GC_Track(self);
        self->is_tracked |= self->cache != NULL;
    }
}

/* The fields first: deregistering runs Python code, which may come back here. */
static void let_go(struct registration *self) {
    struct um_python_cache *cache = self->cache;
    struct usermm_registration *registered = self->registered;
    self->cache = NULL;
    self->registered = NULL;
    if (!cache)
        return;
    usermm_cache_release(cache->core, registered);
    Py_DECREF((PyObject *)cache);
}

static int traverse(PyObject *object, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((struct registration *)object)->cache);
    return 0;
}

static int clear(PyObject *object) {
    let_go((struct registration *)object);
    return 0;
}

/* Its memory would keep the mark of having been finalized. */
static void leave_pool(struct registration *self) {
    struct module_state *state = PyType_GetModuleState(Py_TYPE((PyObject *)self));
    for (int i = 0; self->is_pooled && i < state->pool_count; i++)
        if (state->pool[i] == (PyObject *)self)
            state->pool[i] = state->pool[--state->pool_count];
    self->is_pooled = false;
}

/* Of a cycle, before anything in it is taken apart: the registrar is still whole. */
static void finalize(PyObject *object) {
    PyObject *kind, *value, *traceback;
    leave_pool((struct registration *)object);
    PyErr_Fetch(&kind, &value, &traceback);
    let_go((struct registration *)object);
    PyErr_Restore(kind, value, traceback);
}

static void dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    struct registration *self = (struct registration *)object;
    struct module_state *state = self->cache ? self->cache->state : PyType_GetModuleState(type);
    if (self->is_tracked)
        PyObject_GC_UnTrack(object);
    self->is_tracked = false;
    let_go(self);
    if (self->is_pooled) {
        state->spares[state->spare_count++] = object;
        return;
    }
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static struct registration *held(PyObject *object, const char *name) {
    struct registration *self = (struct registration *)object;
    if (self->cache)
        return self;
    PyErr_Format(PyExc_ValueError, "registration.%s: it was released: get it from the cache again", name);
    return NULL;
}

static PyObject *get_handle(PyObject *object, void *closure) {
    struct registration *self = held(object, "handle");
    (void)closure;
    return self ? Py_NewRef((PyObject *)(uintptr_t)self->registered->handle) : NULL;
}

static PyObject *get_address(PyObject *object, void *closure) {
    struct registration *self = held(object, "address");
    (void)closure;
    return self ? PyLong_FromUnsignedLongLong(self->registered->address) : NULL;
}

static PyObject *get_length(PyObject *object, void *closure) {
    struct registration *self = held(object, "length");
    (void)closure;
    return self ? PyLong_FromUnsignedLongLong(self->registered->length) : NULL;
}

static PyObject *get_valid(PyObject *object, void *closure) {
    struct registration *self = (struct registration *)object;
    struct um_python_cache *cache = self->cache;
    (void)closure;
    if (!cache)
        Py_RETURN_FALSE;
    Py_INCREF((PyObject *)cache); /* what is deregistered meanwhile may release this very registration */
    int valid = usermm_cache_valid(cache->core, self->registered) && self->cache;
    Py_DECREF((PyObject *)cache);
    return PyBool_FromLong(valid);
}

static PyObject *release(PyObject *object, PyObject *unused) {
    (void)unused;
    let_go((struct registration *)object);
    Py_RETURN_NONE;
}

static PyObject *enter(PyObject *object, PyObject *unused) {
    (void)unused;
    return held(object, "__enter__") ? Py_NewRef(object) : NULL;
}

static PyObject *leave(PyObject *object, PyObject *arguments) {
    (void)arguments;
    let_go((struct registration *)object);
    Py_RETURN_NONE;
}

static PyObject *describe(PyObject *object) {
    struct registration *self = (struct registration *)object;
    if (!self->cache)
        return PyUnicode_FromString("<usermm.Registration, released>");
    PyObject *handle = Py_NewRef((PyObject *)(uintptr_t)self->registered->handle); /* its repr may release us */
    char range[64];
    PyOS_snprintf(range, sizeof range, "%llu bytes at 0x%llx", (unsigned long long)self->registered->length,
                  (unsigned long long)self->registered->address);
    PyObject *text = PyUnicode_FromFormat("<usermm.Registration of %s, handle %R>", range, handle);
    Py_DECREF(handle);
    return text;
}

static PyMethodDef methods[] = {
    {"release", release, METH_NOARGS, "release($self, /)\n--\n\nLets go; may be called again."},
    {"__enter__", enter, METH_NOARGS, NULL},
    {"__exit__", leave, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"handle", get_handle, NULL, "What the registrar returned.", NULL},
    {"address", get_address, NULL, "Where the registered memory starts.", NULL},
    {"length", get_length, NULL, "How many bytes are registered.", NULL},
    {"valid", get_valid, NULL, "Whether this still is the memory that is mapped there.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_dealloc, dealloc}, {Py_tp_traverse, traverse}, {Py_tp_clear, clear},   {Py_tp_finalize, finalize},
    {Py_tp_methods, methods}, {Py_tp_getset, getset},     {Py_tp_repr, describe}, {0, NULL},
};

PyType_Spec um_registration_spec = {
    .name = "usermm._core.Registration",
    .basicsize = sizeof(struct registration),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
