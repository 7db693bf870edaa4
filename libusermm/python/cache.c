/* usermm._core.Cache: a usermm_cache whose lock is the interpreter's. Its methods are documented in _core.pyi. */
#include "cache.h"

#include <errno.h>
#include <stddef.h>
#include <structmember.h>

static PyObject *raise_for(const struct um_python_cache *cache, int result, const char *call) {
    const char *reason = NULL;
    if (result == -EBADF)
        reason = "the cache is closed: make a new one";
    if (result == -EIO)
        reason = "the monitor failed, and nothing is remembered: close this cache and all devices, and make new ones";
    return um_raise(cache->state, result, call, reason);
}

static PyObject *evict(PyObject *self, PyObject *object) {
    struct um_python_cache *cache = um_cache_of(self);
    uint64_t address, length;
    if (um_buffer_range(cache->state, object, &address, &length))
        return NULL;
    int count = usermm_cache_evict(cache->core, address, length);
    um_askers_forget(&cache->askers, object);
    return count < 0 ? raise_for(cache, count, "evict") : PyLong_FromLong(count);
}

static PyObject *clear_all(PyObject *self, PyObject *unused) {
    (void)unused;
    int count = usermm_cache_evict(um_cache_of(self)->core, 0, 0);
    um_askers_clear(&um_cache_of(self)->askers);
    return count < 0 ? raise_for(um_cache_of(self), count, "clear") : PyLong_FromLong(count);
}

static void touch(const struct um_asker *asker, void *context) {
    usermm_cache_touch(context, asker->registration, asker->serial);
}

/* expire(ages) -> how many */
static PyObject *expire(PyObject *self, PyObject *ages) {
    struct um_python_cache *cache = um_cache_of(self);
    uint64_t number;
    if (um_to_u64(cache->state, ages, "ages", &number))
        return NULL;
    if (number > 8) {
        PyErr_Format(cache->state->argument_error, "expire: ages is %S: pass 0 to 8", ages);
        return NULL;
    }
    um_askers_sweep(&cache->askers, touch, cache->core);
    int count = usermm_cache_expire(cache->core, (unsigned)number);
    return count < 0 ? raise_for(cache, count, "expire") : PyLong_FromLong(count);
}

static PyObject *cache_fileno(PyObject *self, PyObject *unused) {
    (void)unused;
    int fd = usermm_cache_fileno(um_cache_of(self)->core);
    return fd < 0 ? raise_for(um_cache_of(self), fd, "fileno") : PyLong_FromLong(fd);
}

static PyObject *cache_close(PyObject *self, PyObject *unused) {
    (void)unused;
    um_registrations_track(um_cache_of(self)->state);
    usermm_cache_shutdown(um_cache_of(self)->core);
    um_askers_clear(&um_cache_of(self)->askers);
    Py_RETURN_NONE;
}

static int set_number(PyObject *dictionary, const char *name, uint64_t value) {
    PyObject *number = PyLong_FromUnsignedLongLong(value);
    int result = number ? PyDict_SetItemString(dictionary, name, number) : -1;
    Py_XDECREF(number);
    return result;
}

static PyObject *counts(PyObject *self, PyObject *unused) {
    struct usermm_cache_counts now;
    (void)unused;
    usermm_cache_refresh(um_cache_of(self)->core); /* closed or failed: then what there was is counted */
    usermm_cache_count(um_cache_of(self)->core, &now);
    const struct {
        const char *name;
        uint64_t value;
    } rows[] = {
        {"registrations", now.registrations},
        {"held", now.held},
        {"pinned", now.pinned},
        {"pinned_bytes", now.pinned_bytes},
        {"pinned_bytes_max", now.pinned_bytes_max},
        {"hits", now.hits},
        {"misses", now.misses},
        {"probes", now.probes},
        {"doubts", now.doubts},
        {"waits", now.waits},
        {"unmapped", now.invalidations[USERMM_CAUSE_UNMAP]},
        {"remapped", now.invalidations[USERMM_CAUSE_REMAP]},
        {"discarded", now.invalidations[USERMM_CAUSE_DISCARD]},
        {"evictions", now.evictions},
        {"expirations", now.expirations},
        {"retirements", now.retirements},
        {"merges", now.merges},
        {"retries", now.retries},
        {"registered", now.registered},
        {"register_failures", now.register_failures},
        {"register_ns", now.register_ns},
        {"deregistered", now.deregistered},
        {"deregister_ns", now.deregister_ns},
    };
    PyObject *dictionary = PyDict_New();
    for (size_t i = 0; dictionary && i < sizeof rows / sizeof *rows; i++)
        if (set_number(dictionary, rows[i].name, rows[i].value))
            Py_CLEAR(dictionary);
    return dictionary;
}

/* Rows are copied first and turned into objects then: making objects can run finalizers, which may change the cache. */
struct row {
    uint64_t address, length, holders;
    PyObject *handle;
};

struct rows {
    struct row *rows; /* NULL: they are only counted */
    size_t count, room;
};

static void copy_row(const struct usermm_registration *registered, uint64_t holders, void *context) {
    struct rows *rows = context;
    if (rows->count < rows->room)
        rows->rows[rows->count] = (struct row){registered->address, registered->length, holders,
                                               Py_NewRef((PyObject *)(uintptr_t)registered->handle)};
    rows->count++;
}

static PyObject *list_of(struct rows *rows) {
    PyObject *list = PyList_New(0);
    for (size_t i = 0; i < rows->room; i++) {
        const struct row *row = &rows->rows[i];
        PyObject *tuple = NULL;
        if (list)
            tuple = Py_BuildValue("KKKO", (unsigned long long)row->address, (unsigned long long)row->length,
                                  (unsigned long long)row->holders, row->handle);
        if (list && (!tuple || PyList_Append(list, tuple)))
            Py_CLEAR(list);
        Py_XDECREF(tuple);
        Py_DECREF(row->handle);
    }
    return list;
}

/* overlapping(address, length) -> [(address, length, holders, handle)]; length 0: all */
static PyObject *overlapping(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct um_python_cache *cache = um_cache_of(self);
    uint64_t address, length;
    if (count != 2) {
        PyErr_SetString(cache->state->argument_type_error, "overlapping takes an address and a length");
        return NULL;
    }
    if (um_to_u64(cache->state, args[0], "address", &address) || um_to_u64(cache->state, args[1], "length", &length))
        return NULL;
    int result = usermm_cache_refresh(cache->core);
    if (result)
        return raise_for(cache, result, "overlapping");
    struct rows rows = {0};
    usermm_cache_visit(cache->core, address, length, copy_row, &rows);
    rows.room = rows.count;
    rows.count = 0;
    rows.rows = PyMem_Malloc((rows.room ? rows.room : 1) * sizeof *rows.rows);
    if (!rows.rows)
        return PyErr_NoMemory();
    usermm_cache_visit(cache->core, address, length, copy_row, &rows);
    PyObject *list = list_of(&rows);
    PyMem_Free(rows.rows);
    return list;
}

/* remembers(buffer) -> whether this very object would be answered without a probe */
static PyObject *remembers(PyObject *self, PyObject *object) {
    struct um_python_cache *cache = um_cache_of(self);
    uint64_t address, length;
    if (um_buffer_range(cache->state, object, &address, &length))
        return NULL;
    struct um_asker *asker = um_askers_find(&cache->askers, object, address, length);
    return PyBool_FromLong(asker && asker->registration->serial == asker->serial &&
                           usermm_cache_valid(cache->core, asker->registration));
}

/* The object's own life. */

static int visit_handle(PyObject *handle, visitproc visit, void *arg) {
    Py_VISIT(handle);
    return 0;
}

struct visit {
    visitproc visit;
    void *arg;
    int result;
};

static void visit_registration(const struct usermm_registration *registered, uint64_t holders, void *context) {
    struct visit *visit = context;
    (void)holders;
    if (visit->result == 0)
        visit->result = visit_handle((PyObject *)(uintptr_t)registered->handle, visit->visit, visit->arg);
}

static int traverse(PyObject *self, visitproc visit, void *arg) {
    struct um_python_cache *cache = um_cache_of(self);
    struct visit handles = {visit, arg, 0};
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(cache->register_call);
    Py_VISIT(cache->deregister_call);
    Py_VISIT(cache->buffer_type);
    Py_VISIT(cache->askers.unremembered);
    usermm_cache_visit(cache->core, 0, 0, visit_registration, &handles);
    return handles.result;
}

/* Before anything of a cycle that the cache is in is taken apart: the registrar is still whole. */
static void finalize(PyObject *self) {
    PyObject *kind, *value, *traceback;
    PyErr_Fetch(&kind, &value, &traceback);
    usermm_cache_shutdown(um_cache_of(self)->core);
    PyErr_Restore(kind, value, traceback);
}

static int clear(PyObject *self) {
    struct um_python_cache *cache = um_cache_of(self);
    PyTypeObject *type = cache->buffer_type;
    cache->buffer_type = NULL;
    um_askers_clear(&cache->askers);
    Py_XDECREF((PyObject *)type);
    return 0;
}

static void warn_of_stranded(PyObject *self, int count) {
    PyObject *kind, *value, *traceback;
    PyErr_Fetch(&kind, &value, &traceback);
    if (PyErr_WarnFormat(PyExc_ResourceWarning, 1,
                         "a cache was dropped outside its registrar's thread: %d registrations stay with the device; "
                         "close() it there",
                         count))
        PyErr_WriteUnraisable((PyObject *)Py_TYPE(self));
    PyErr_Restore(kind, value, traceback);
}

static void dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    struct um_python_cache *cache = um_cache_of(self);
    PyObject_GC_UnTrack(self);
    clear(self); /* before the core: the weak references have callbacks into it */
    int stranded = usermm_cache_close(cache->core);
    if (stranded)
        warn_of_stranded(self, stranded);
    Py_XDECREF(cache->register_call);
    Py_XDECREF(cache->deregister_call);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* The core is opened first: an object is in the collector's sight, and so in everybody's, as soon as it exists. */
static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *keywords[] = {"register",    "deregister",  "overlap", "merge_adjacent", "one_thread",
                               "granularity", "max_length",  "writes",  "max_bytes",      "max_count",
                               "uncached",    "watch_flags", NULL};
    struct usermm_registrar registrar = um_python_registrar;
    struct usermm_cache_options options = {.flags = USERMM_CACHE_SERIALIZED};
    PyObject *register_call, *deregister_call;
    unsigned overlap, watch_flags;
    unsigned long long granularity, max_length, max_bytes, max_count;
    int merge_adjacent, one_thread, writes, uncached;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO$IppKKpKKpI:Cache", keywords, &register_call, &deregister_call,
                                     &overlap, &merge_adjacent, &one_thread, &granularity, &max_length, &writes,
                                     &max_bytes, &max_count, &uncached, &watch_flags))
        return NULL;
    registrar.overlap = (enum usermm_overlap)overlap;
    registrar.merge_adjacent = merge_adjacent != 0;
    registrar.one_thread = one_thread != 0;
    registrar.granularity = granularity;
    registrar.max_length = max_length;
    options.max_bytes = max_bytes;
    options.max_count = max_count;
    options.flags |= uncached ? USERMM_CACHE_UNCACHED : 0;
    usermm_cache *core;
    int result = usermm_cache_open(&registrar, &options, &core);
    if (result)
        return um_raise(um_state_of_type(type), result, "RegistrationCache", NULL);
    struct um_python_cache *cache = (struct um_python_cache *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!cache) {
        usermm_cache_close(core);
        return NULL;
    }
    usermm_cache_bind(core, cache);
    cache->core = core;
    cache->register_call = Py_NewRef(register_call);
    cache->deregister_call = Py_NewRef(deregister_call);
    cache->buffer_flags = PyBUF_ANY_CONTIGUOUS | (writes ? PyBUF_WRITABLE : 0);
    cache->watch_flags = watch_flags;
    cache->state = um_state_of_type(type);
    return (PyObject *)cache;
}

/* Each subclass gets a `get` of its own: the interpreter calls a method of exactly the object's class a fifth faster.
 */
static PyObject *init_subclass(PyObject *class, PyObject *args, PyObject *kwargs);

#define FAST(function) (PyCFunction)(void (*)(void)) function
static PyMethodDef methods[] = {
    {"get", FAST(um_cache_get), METH_FASTCALL | METH_KEYWORDS,
     "get($self, buffer, /, *, probe=None)\n--\n\nA registration of this memory: a remembered one, or a new one."},
    {"__init_subclass__", FAST(init_subclass), METH_CLASS | METH_VARARGS | METH_KEYWORDS, NULL},
    {"evict", evict, METH_O,
     "evict($self, buffer, /)\n--\n\nTakes out what overlaps this memory; says how many that were."},
    {"clear", clear_all, METH_NOARGS, "clear($self, /)\n--\n\nTakes everything out; says how many that were."},
    {"expire", expire, METH_O,
     "expire($self, ages, /)\n--\n\nTakes out what nobody asked for since `ages` calls of this method ago."},
    {"overlapping", FAST(overlapping), METH_FASTCALL,
     "overlapping($self, address, length, /)\n--\n\nRows of address, length, holders, handle; length 0: all."},
    {"remembers", remembers, METH_O,
     "remembers($self, buffer, /)\n--\n\nWhether this very object would be answered without a probe."},
    {"memory_of", um_cache_memory_of, METH_O,
     "memory_of($self, buffer, /)\n--\n\nAddress and length of a buffer that get would take."},
    {"counts", counts, METH_NOARGS, "counts($self, /)\n--\n\nSee usermm.Statistics."},
    {"fileno", cache_fileno, METH_NOARGS,
     "fileno($self, /)\n--\n\nPolls readable once memory of a registration went, until expire()."},
    {"close", cache_close, METH_NOARGS, "close($self, /)\n--\n\nTakes everything out for good."},
    {NULL, NULL, 0, NULL},
};

static int add_own_get(PyObject *class) {
    PyObject *own = PyObject_GetAttrString(class, "__dict__");
    int defines = own ? PyMapping_HasKeyString(own, "get") : 1;
    Py_XDECREF(own);
    PyObject *method = defines ? NULL : PyDescr_NewMethod((PyTypeObject *)class, &methods[0]);
    int result = method ? PyObject_SetAttrString(class, "get", method) : PyErr_Occurred() ? -1 : 0;
    Py_XDECREF(method);
    return result;
}

static PyObject *init_subclass(PyObject *class, PyObject *args, PyObject *kwargs) {
    PyObject *cache_type = um_state_of_type((PyTypeObject *)class)->cache_type;
    PyObject *super = PyObject_CallFunctionObjArgs((PyObject *)&PySuper_Type, cache_type, class, NULL);
    PyObject *next = super ? PyObject_GetAttrString(super, "__init_subclass__") : NULL;
    PyObject *result = next && add_own_get(class) == 0 ? PyObject_Call(next, args, kwargs) : NULL;
    Py_XDECREF(next);
    Py_XDECREF(super);
    return result;
}

static PyMemberDef members[] = {
    {"upkeep_due", T_BOOL, offsetof(struct um_python_cache, upkeep_due), 0, "Whether _begin_upkeep is to be called."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_members, members}, {Py_tp_finalize, finalize}, {Py_tp_new, new},     {Py_tp_dealloc, dealloc},
    {Py_tp_methods, methods}, {Py_tp_traverse, traverse}, {Py_tp_clear, clear}, {0, NULL},
};

PyType_Spec um_cache_spec = {
    .name = "usermm._core.Cache",
    .basicsize = sizeof(struct um_python_cache),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
