/* usermm._core.Memory: mapped pages of files as a buffer. Its methods are documented in _core.pyi. */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memory.h"

#include <structmember.h>

#define FAST(function) ((PyCFunction)(void (*)(void))(function))

static struct um_memory *allocate(PyTypeObject *type) {
    return um_memory_of(((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0));
}

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"runs", "writable", "shared", "inherit", "length", NULL};
    const struct module_state *state = um_state_of_type(type);
    PyObject *sequence;
    int writable = -1, shared = -1, inherit = -1, result;
    size_t count, total;
    Py_ssize_t length = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|$pppn:Memory", names, &sequence, &writable, &shared, &inherit,
                                     &length))
        return NULL;
    if (writable < 0 || shared < 0 || inherit < 0) {
        PyErr_SetString(state->argument_type_error, "Memory: say whether it is writable, shared and inherited");
        return NULL;
    }
    struct um_run *runs = um_memory_runs(state, sequence, &count, &total);
    struct um_memory *self = runs ? allocate(type) : NULL;
    if (!self) {
        PyMem_Free(runs);
        return NULL;
    }
    if (length > 0 && (size_t)length > total)
        total = (size_t)length;
    self->owner = um_pages_process();
    self->writable = writable;
    self->shared = shared;
    self->inherit = inherit;
    void *address = NULL;
    result = um_pages_map(runs, count, total, um_memory_mode(self), &address);
    PyMem_Free(runs);
    if (result) {
        um_memory_map_error((PyObject *)self, result);
        Py_DECREF(self);
        return NULL;
    }
    self->address = address;
    self->length = total;
    return (PyObject *)self;
}

/* Pages of another memory, which cannot be closed meanwhile. */
static PyObject *part(PyObject *type, PyObject *args) {
    PyTypeObject *kind = (PyTypeObject *)type;
    const struct module_state *state = um_state_of_type(kind);
    PyObject *object;
    Py_ssize_t offset, length;
    if (!PyArg_ParseTuple(args, "O!nn:part", (PyTypeObject *)state->memory_type, &object, &offset, &length))
        return NULL;
    struct um_memory *whole = um_memory_of(object);
    if (um_memory_refuse(whole, "part"))
        return NULL;
    if (offset < 0 || length <= 0 || (size_t)offset > whole->length || (size_t)length > whole->length - (size_t)offset)
        return um_memory_argument_error(object, false, "part(%zd, %zd): the memory has %zu bytes: stay inside", offset,
                                        length, whole->length);
    struct um_memory *self = allocate(kind);
    if (!self)
        return NULL;
    Py_INCREF(object);
    whole->exports++;
    self->whole = whole;
    self->address = whole->address + offset;
    self->length = (size_t)length;
    self->owner = whole->owner;
    self->writable = whole->writable;
    self->shared = whole->shared;
    self->inherit = whole->inherit;
    return (PyObject *)self;
}

static void let_go_of_whole(struct um_memory *self) {
    struct um_memory *whole = self->whole;
    self->whole = NULL;
    whole->exports--;
    Py_DECREF((PyObject *)whole);
}

static void unmap(struct um_memory *self) {
    char *address = self->address;
    self->address = NULL;
    if (self->whole) {
        let_go_of_whole(self);
        return;
    }
    if (!address || um_memory_is_of_parent(self))
        return;
    if (self->length < UM_LONG_BYTES) {
        munmap(address, self->length);
        return;
    }
    Py_BEGIN_ALLOW_THREADS
    munmap(address, self->length);
    Py_END_ALLOW_THREADS
}

static int get_buffer(PyObject *self, Py_buffer *view, int flags) {
    struct um_memory *memory = um_memory_of(self);
    if (!memory->address || um_memory_is_of_parent(memory)) {
        PyErr_SetString(PyExc_BufferError,
                        memory->address ? "the memory is mapped in the parent process only" : "the memory is unmapped");
        return -1;
    }
    if (PyBuffer_FillInfo(view, self, memory->address, (Py_ssize_t)memory->length, !memory->writable, flags))
        return -1;
    memory->exports++;
    return 0;
}

static void release_buffer(PyObject *self, Py_buffer *view) {
    (void)view;
    um_memory_of(self)->exports--;
}

static PyObject *unmap_memory(PyObject *self, PyObject *unused) {
    (void)unused;
    bool was_mapped = um_memory_of(self)->address;
    if (was_mapped && um_memory_of(self)->exports) {
        PyErr_SetString(PyExc_BufferError, "close: a view of the memory exists: release it first");
        return NULL;
    }
    unmap(um_memory_of(self));
    return PyBool_FromLong(was_mapped);
}

static PyObject *close_memory(PyObject *self, PyObject *unused) {
    PyObject *was_mapped = unmap_memory(self, unused);
    if (!was_mapped)
        return NULL;
    Py_DECREF(was_mapped);
    Py_RETURN_NONE;
}

static PyObject *abandon(PyObject *self, PyObject *unused) {
    (void)unused;
    bool was_mapped = um_memory_of(self)->address;
    um_memory_of(self)->address = NULL;
    if (um_memory_of(self)->whole)
        let_go_of_whole(um_memory_of(self));
    return PyBool_FromLong(was_mapped);
}

static Py_ssize_t length_of(PyObject *self) {
    return (Py_ssize_t)um_memory_of(self)->length;
}

static PyObject *get_address(PyObject *self, void *closure) {
    (void)closure;
    if (!um_memory_of(self)->address)
        return um_memory_argument_error(self, false, "address: the memory is unmapped");
    return PyLong_FromVoidPtr(um_memory_of(self)->address);
}

static PyObject *get_closed(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(!um_memory_of(self)->address);
}

static PyObject *get_writable(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(um_memory_of(self)->writable);
}

static PyObject *get_exports(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromSsize_t(um_memory_of(self)->exports);
}

static void dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (um_memory_of(self)->weak_references)
        PyObject_ClearWeakRefs(self);
    unmap(um_memory_of(self));
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"part", part, METH_VARARGS | METH_CLASS,
     "part($type, memory, offset, length, /)\n--\n\nBytes of another memory, which unmaps them in the end."},
    {"close", close_memory, METH_NOARGS, "close($self, /)\n--\n\nUnmaps it."},
    {"unmap", unmap_memory, METH_NOARGS, "unmap($self, /)\n--\n\nclose(); whether it was mapped until now."},
    {"abandon", abandon, METH_NOARGS, "abandon($self, /)\n--\n\nIt is closed, and nothing is unmapped."},
    {"fill", FAST(um_memory_fill), METH_FASTCALL, "fill($self, offset, runs, /)\n--\n\nMaps the runs there."},
    {"detach", FAST(um_memory_detach), METH_FASTCALL,
     "detach($self, offset, length, descriptor, /)\n--\n\nPages of a file of one's own in the place of these."},
    {"read", FAST(um_memory_read), METH_FASTCALL, "read($self, offset=0, length=<the rest>, /)\n--\n\nA copy."},
    {"write", FAST(um_memory_write), METH_FASTCALL, "write($self, offset, data, /)\n--\n\nCopies data there."},
    {"load", FAST(um_memory_load), METH_FASTCALL, "load($self, offset, /)\n--\n\nThe u32 there (acquire)."},
    {"store", FAST(um_memory_store), METH_FASTCALL, "store($self, offset, value, /)\n--\n\nStores a u32 (release)."},
    {"exchange", FAST(um_memory_exchange), METH_FASTCALL,
     "exchange($self, offset, value, /)\n--\n\nStores a u32 and returns the one before (sequentially consistent)."},
    {"add", FAST(um_memory_add), METH_FASTCALL,
     "add($self, offset, change, /)\n--\n\nAdds to a u32 and returns the sum (sequentially consistent)."},
    {"fence", um_memory_fence, METH_NOARGS, "fence($self, /)\n--\n\nOrders what is before and after it."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"address", get_address, NULL, NULL, NULL},
    {"closed", get_closed, NULL, NULL, NULL},
    {"writable", get_writable, NULL, NULL, NULL},
    {"exports", get_exports, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(struct um_memory, weak_references), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, new},
    {Py_tp_dealloc, dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {Py_tp_members, members},
    {Py_bf_getbuffer, get_buffer},
    {Py_bf_releasebuffer, release_buffer},
    {Py_sq_length, length_of},
    {0, NULL},
};

PyType_Spec um_memory_spec = {
    .name = "usermm._core.Memory",
    .basicsize = sizeof(struct um_memory),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = slots,
};
