/* usermm._core.Memory: mapped pages of files as a buffer. Its methods are documented in _core.pyi. */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>
#include <unistd.h>

#include "module.h"

#include <structmember.h>

#include "pages.h"

#define FAST(function) ((PyCFunction)(void (*)(void))(function))
#define LONG_BYTES ((size_t)1 << 20) /* from here on the interpreter's lock is let go meanwhile */

struct memory {
    PyObject ob_base;
    PyObject *weak_references;
    struct memory *whole; /* of which this is a part; NULL for a mapping of its own */
    char *address;        /* NULL once closed */
    size_t length;
    Py_ssize_t exports;
    pid_t owner;
    bool writable, inherit;
};

static struct memory *of(PyObject *self) {
    return (struct memory *)self;
}

static PyObject *os_error(int result) {
    errno = -result;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static int parse_run(PyObject *item, struct um_run *ret_run) {
    long fd;
    long long offset;
    Py_ssize_t length;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "Memory: a run is a tuple (descriptor, offset in bytes, length in bytes)");
        return -1;
    }
    if (!PyArg_ParseTuple(item, "lLn;Memory: a run is (descriptor, offset in bytes, length in bytes)", &fd, &offset,
                          &length))
        return -1;
    if (fd < 0 || fd > INT32_MAX || offset < 0 || length <= 0) {
        PyErr_SetString(PyExc_ValueError, "Memory: a run has a descriptor, an offset of 0 or more, and a length above");
        return -1;
    }
    *ret_run = (struct um_run){(int)fd, offset, (size_t)length};
    return 0;
}

/* The runs and the sum of their lengths; they are the caller's to free. NULL with an exception. */
static struct um_run *parse_runs(PyObject *object, size_t *ret_count, size_t *ret_total) {
    PyObject *sequence = PySequence_Tuple(object);
    if (!sequence)
        return NULL;
    Py_ssize_t count = PyTuple_Size(sequence);
    struct um_run *runs = count ? PyMem_Malloc((size_t)count * sizeof *runs) : NULL;
    *ret_total = 0;
    if (!count)
        PyErr_SetString(PyExc_ValueError, "Memory: no run was given");
    else if (!runs)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; runs && i < count; i++) {
        if (parse_run(PyTuple_GetItem(sequence, i), &runs[i]) == 0 &&
            !__builtin_add_overflow(*ret_total, runs[i].length, ret_total) && *ret_total <= PY_SSIZE_T_MAX)
            continue;
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "Memory: the runs are longer than an address space");
        PyMem_Free(runs);
        runs = NULL;
    }
    Py_DECREF(sequence);
    *ret_count = (size_t)count;
    return runs;
}

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"runs", "writable", "shared", "inherit", NULL};
    PyObject *sequence;
    int writable, shared, inherit;
    size_t count, total;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O$ppp:Memory", names, &sequence, &writable, &shared, &inherit))
        return NULL;
    struct um_run *runs = parse_runs(sequence, &count, &total);
    if (!runs)
        return NULL;
    struct memory *self = of(((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0));
    if (!self) {
        PyMem_Free(runs);
        return NULL;
    }
    void *address = NULL;
    int prot = PROT_READ | (writable ? PROT_WRITE : 0), flags = shared ? MAP_SHARED : MAP_PRIVATE;
    int result = um_pages_map(runs, count, total, prot, flags, inherit, &address);
    PyMem_Free(runs);
    if (result) {
        Py_DECREF(self);
        return os_error(result);
    }
    self->address = address;
    self->length = total;
    self->owner = getpid();
    self->writable = writable;
    self->inherit = inherit;
    return (PyObject *)self;
}

static int refuse_closed(const struct memory *self, const char *call) {
    if (self->address)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: the memory is unmapped", call);
    return -1;
}

/* Pages of another memory, which cannot be closed meanwhile. */
static PyObject *memory_part(PyObject *type, PyObject *args) {
    PyObject *object;
    Py_ssize_t offset, length;
    PyTypeObject *memory_type = (PyTypeObject *)um_state_of_type((PyTypeObject *)type)->memory_type;
    if (!PyArg_ParseTuple(args, "O!nn:part", memory_type, &object, &offset, &length))
        return NULL;
    struct memory *whole = of(object);
    if (refuse_closed(whole, "part"))
        return NULL;
    if (offset < 0 || length <= 0 || (size_t)offset > whole->length || (size_t)length > whole->length - (size_t)offset) {
        PyErr_Format(PyExc_ValueError, "part(%zd, %zd): the memory has %zu bytes", offset, length, whole->length);
        return NULL;
    }
    struct memory *self = of(((allocfunc)PyType_GetSlot((PyTypeObject *)type, Py_tp_alloc))((PyTypeObject *)type, 0));
    if (!self)
        return NULL;
    self->whole = whole;
    Py_INCREF(object);
    whole->exports++;
    self->address = whole->address + offset;
    self->length = (size_t)length;
    self->owner = whole->owner;
    self->writable = whole->writable;
    self->inherit = whole->inherit;
    return (PyObject *)self;
}

static void let_go_of_whole(struct memory *self) {
    struct memory *whole = self->whole;
    self->whole = NULL;
    self->address = NULL;
    whole->exports--;
    Py_DECREF((PyObject *)whole);
}

/* Where a forked child inherited nothing, other memory may be mapped at the address by now. */
static void unmap(struct memory *self) {
    char *address = self->address;
    if (self->whole) {
        let_go_of_whole(self);
        return;
    }
    self->address = NULL;
    if (!address || (!self->inherit && getpid() != self->owner))
        return;
    if (self->length < LONG_BYTES) {
        munmap(address, self->length);
        return;
    }
    Py_BEGIN_ALLOW_THREADS
    munmap(address, self->length);
    Py_END_ALLOW_THREADS
}

static int get_buffer(PyObject *self, Py_buffer *view, int flags) {
    struct memory *memory = of(self);
    if (!memory->address) {
        PyErr_SetString(PyExc_BufferError, "the memory is unmapped");
        return -1;
    }
    if (PyBuffer_FillInfo(view, self, memory->address, (Py_ssize_t)memory->length, !memory->writable, flags))
        return -1;
    memory->exports++;
    return 0;
}

static void release_buffer(PyObject *self, Py_buffer *view) {
    (void)view;
    of(self)->exports--;
}

static PyObject *memory_close(PyObject *self, PyObject *unused) {
    (void)unused;
    if (of(self)->address && of(self)->exports) {
        PyErr_SetString(PyExc_BufferError, "close: a view of the memory exists: release it first");
        return NULL;
    }
    unmap(of(self));
    Py_RETURN_NONE;
}

static PyObject *memory_abandon(PyObject *self, PyObject *unused) {
    (void)unused;
    if (of(self)->whole)
        let_go_of_whole(of(self));
    of(self)->address = NULL;
    Py_RETURN_NONE;
}

/* [offset, offset + length) inside the memory, `length` -1 for all that follows. */
static int parse_range(const struct memory *self, PyObject *const *args, Py_ssize_t count, const char *call,
                       size_t *ret_offset, size_t *ret_length) {
    if (refuse_closed(self, call))
        return -1;
    Py_ssize_t offset = count > 0 ? PyLong_AsSsize_t(args[0]) : 0;
    if (PyErr_Occurred())
        return -1;
    Py_ssize_t length = count > 1 ? PyLong_AsSsize_t(args[1]) : (Py_ssize_t)self->length - offset;
    if (PyErr_Occurred())
        return -1;
    if (offset < 0 || length < 0 || (size_t)offset > self->length || (size_t)length > self->length - (size_t)offset) {
        PyErr_Format(PyExc_ValueError, "%s(%zd, %zd): the memory has %zu bytes", call, offset, length, self->length);
        return -1;
    }
    *ret_offset = (size_t)offset;
    *ret_length = (size_t)length;
    return 0;
}

static PyObject *memory_detach(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct memory *memory = of(self);
    size_t offset, length, mask = (size_t)sysconf(_SC_PAGESIZE) - 1;
    int result = 0;
    if (parse_range(memory, args, count, "detach", &offset, &length))
        return NULL;
    if ((offset | length) & mask) {
        PyErr_SetString(PyExc_ValueError, "detach: offset and length are whole pages");
        return NULL;
    }
    memory->exports++; /* nobody closes it meanwhile */
    Py_BEGIN_ALLOW_THREADS
    if (length)
        result = um_pages_detach(memory->address + offset, length, PROT_READ | (memory->writable ? PROT_WRITE : 0),
                                 memory->inherit);
    Py_END_ALLOW_THREADS
    memory->exports--;
    if (result)
        return os_error(result);
    Py_RETURN_NONE;
}

static PyObject *memory_read(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct memory *memory = of(self);
    size_t offset, length;
    if (parse_range(memory, args, count, "read", &offset, &length))
        return NULL;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    if (!bytes)
        return NULL;
    int result = um_pages_read(memory->address + offset, PyBytes_AsString(bytes), length);
    if (result) {
        Py_DECREF(bytes);
        return os_error(result);
    }
    return bytes;
}

static PyObject *memory_write(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct memory *memory = of(self);
    size_t offset, room;
    Py_buffer data;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "write takes an offset and a buffer");
        return NULL;
    }
    if (parse_range(memory, args, 1, "write", &offset, &room) || PyObject_GetBuffer(args[1], &data, PyBUF_SIMPLE))
        return NULL;
    int result = -EINVAL;
    if (memory->writable && (size_t)data.len <= room && memory->address)
        result = um_pages_write(memory->address + offset, data.buf, (size_t)data.len);
    PyBuffer_Release(&data);
    if (result == -EINVAL) {
        PyErr_SetString(PyExc_ValueError, memory->writable ? "write: the data does not fit" : "write: it is read-only");
        return NULL;
    }
    if (result)
        return os_error(result);
    Py_RETURN_NONE;
}

/* The u32 at an offset, which must be a multiple of 4 inside the memory. NULL with an exception. */
static uint32_t *word_at(struct memory *self, PyObject *const *args, Py_ssize_t count, Py_ssize_t wanted,
                         const char *call) {
    if (count != wanted) {
        PyErr_Format(PyExc_TypeError, "%s takes %zd arguments", call, wanted);
        return NULL;
    }
    if (refuse_closed(self, call))
        return NULL;
    Py_ssize_t offset = PyLong_AsSsize_t(args[0]);
    if (offset == -1 && PyErr_Occurred())
        return NULL;
    if (offset < 0 || offset % 4 || self->length < 4 || (size_t)offset > self->length - 4) {
        PyErr_Format(PyExc_ValueError, "%s(%zd): pass a multiple of 4 inside the %zu bytes", call, offset, self->length);
        return NULL;
    }
    if (wanted == 2 && !self->writable) {
        PyErr_Format(PyExc_ValueError, "%s(%zd): the memory is read-only", call, offset);
        return NULL;
    }
    return (uint32_t *)(void *)(self->address + offset);
}

static PyObject *memory_load(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    uint32_t *word = word_at(of(self), args, count, 1, "load");
    return word ? PyLong_FromUnsignedLong(__atomic_load_n(word, __ATOMIC_ACQUIRE)) : NULL;
}

static PyObject *memory_store(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    uint32_t *word = word_at(of(self), args, count, 2, "store");
    unsigned long value = word ? PyLong_AsUnsignedLongMask(args[1]) : 0;
    if (!word || PyErr_Occurred())
        return NULL;
    __atomic_store_n(word, (uint32_t)value, __ATOMIC_RELEASE);
    Py_RETURN_NONE;
}

static PyObject *memory_exchange(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    uint32_t *word = word_at(of(self), args, count, 2, "exchange");
    unsigned long value = word ? PyLong_AsUnsignedLongMask(args[1]) : 0;
    if (!word || PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLong(__atomic_exchange_n(word, (uint32_t)value, __ATOMIC_SEQ_CST));
}

static PyObject *memory_add(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    uint32_t *word = word_at(of(self), args, count, 2, "add");
    long change = word ? PyLong_AsLong(args[1]) : 0;
    if (!word || PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLong(__atomic_add_fetch(word, (uint32_t)change, __ATOMIC_SEQ_CST));
}

static PyObject *memory_fence(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}

static Py_ssize_t memory_length(PyObject *self) {
    return (Py_ssize_t)of(self)->length;
}

static PyObject *get_address(PyObject *self, void *closure) {
    (void)closure;
    return refuse_closed(of(self), "address") ? NULL : PyLong_FromVoidPtr(of(self)->address);
}

static PyObject *get_closed(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(!of(self)->address);
}

static PyObject *get_writable(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(of(self)->writable);
}

static PyObject *get_exports(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromSsize_t(of(self)->exports);
}

static void dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (of(self)->weak_references)
        PyObject_ClearWeakRefs(self);
    unmap(of(self));
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"part", memory_part, METH_VARARGS | METH_CLASS, NULL},
    {"close", memory_close, METH_NOARGS, NULL},
    {"abandon", memory_abandon, METH_NOARGS, NULL},
    {"detach", FAST(memory_detach), METH_FASTCALL, NULL},
    {"read", FAST(memory_read), METH_FASTCALL, NULL},
    {"write", FAST(memory_write), METH_FASTCALL, NULL},
    {"load", FAST(memory_load), METH_FASTCALL, NULL},
    {"store", FAST(memory_store), METH_FASTCALL, NULL},
    {"exchange", FAST(memory_exchange), METH_FASTCALL, NULL},
    {"add", FAST(memory_add), METH_FASTCALL, NULL},
    {"fence", memory_fence, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"address", get_address, NULL, NULL, NULL},   {"closed", get_closed, NULL, NULL, NULL},
    {"writable", get_writable, NULL, NULL, NULL}, {"exports", get_exports, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(struct memory, weak_references), READONLY, NULL},
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
    {Py_sq_length, memory_length},
    {0, NULL},
};

PyType_Spec um_memory_spec = {
    .name = "usermm._core.Memory",
    .basicsize = sizeof(struct memory),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = slots,
};
