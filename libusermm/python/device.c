/* usermm._core.Device: a thin skin over usermm_device. Documentation of its methods is in _core.pyi. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>

#include "module.h"

#define FIRST_OWN_COOKIE (UINT64_C(1) << 63) /* far from the numbers and pointers that people choose */
#define LONGEST_WAIT_MS 1000000
#define EXCHANGE_FEATURES 0xC0045501ul /* the one request that writes to its argument */

struct device {
    PyObject ob_base;
    usermm_device *core; /* never NULL: opened before there is an object */
    uint64_t next_cookie;
    uint64_t shown;     /* the generation that was handed out last */
    PyObject *shown_as; /* and its int: above 256 a new one each time would be a third of the property's price */
    const struct module_state *state; /* alive as long as the type, which keeps its module */
};

static usermm_device *core_of(PyObject *self) {
    return ((struct device *)self)->core;
}

static const struct module_state *state_of(PyObject *self) {
    return ((struct device *)self)->state;
}

static void device_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    usermm_device *core = core_of(self);
    Py_BEGIN_ALLOW_THREADS /* the last close waits for the reader to end */
    usermm_close(core);
    Py_END_ALLOW_THREADS
    Py_XDECREF(((struct device *)self)->shown_as);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static int device_traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    return 0;
}

__attribute__((flatten)) static PyObject *get_generation(PyObject *self, void *closure) {
    uint64_t generation;
    (void)closure;
    int result = usermm_generation(core_of(self), &generation);
    if (result)
        return um_raise(state_of(self), result, "generation", NULL);
    struct device *device = (struct device *)self;
    if (!device->shown_as || device->shown != generation) {
        PyObject *number = PyLong_FromUnsignedLongLong(generation), *old = device->shown_as;
        if (!number)
            return NULL;
        device->shown = generation;
        device->shown_as = number;
        Py_XDECREF(old);
    }
    return Py_NewRef(device->shown_as);
}

/* Most callers ask about the very int that `generation` gave them. */
static int parse_seen(const struct device *device, PyObject *object, uint64_t *ret_seen) {
    if (object != device->shown_as)
        return um_to_u64(device->state, object, "seen", ret_seen);
    *ret_seen = device->shown;
    return 0;
}

static PyObject *get_closed(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(usermm_fileno(core_of(self)) == -EBADF);
}

static PyObject *get_flags(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLong(usermm_flags(core_of(self)));
}

/* Names in calls are interned strings, so the same name is nearly always the same object. */
static int is_probe(const struct module_state *state, PyObject *name) {
    return name == state->probe_name || PyUnicode_Compare(name, state->probe_name) == 0;
}

/* 1 or 0, or -1 with an exception. */
static int parse_probe(const struct module_state *state, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    Py_ssize_t named = names ? PyTuple_Size(names) : 0;
    if (count < 1 || count + named > 2 || (named == 1 && !is_probe(state, PyTuple_GetItem(names, 0)))) {
        PyErr_SetString(state->argument_type_error, "check takes the generation seen, and probe=True or False");
        return -1;
    }
    return count + named == 1 || args[1] == Py_True ? 1 : args[1] == Py_False ? 0 : PyObject_IsTrue(args[1]);
}

__attribute__((flatten)) static PyObject *check(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                                PyObject *names) {
    const struct module_state *state = state_of(self);
    uint64_t seen;
    int probe = parse_probe(state, args, count, names);
    if (probe < 0 || parse_seen((struct device *)self, args[0], &seen))
        return NULL;
    int result = usermm_check(core_of(self), seen, probe ? USERMM_PROBE_TRY : USERMM_PROBE_NONE);
    if (result == -EAGAIN) {
        Py_BEGIN_ALLOW_THREADS
        result = usermm_check(core_of(self), seen, USERMM_PROBE_WAIT);
        Py_END_ALLOW_THREADS
    }
    return result < 0 ? um_raise(state, result, "check", NULL) : Py_NewRef(result ? Py_True : Py_False);
}

/* watch(start, end, cookie or None, flags) -> cookie */
static PyObject *watch(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    const struct module_state *state = state_of(self);
    struct device *device = (struct device *)self;
    uint64_t start, end, cookie, flags;
    if (count != 4 || names) {
        PyErr_SetString(state->argument_type_error, "watch takes start, end, cookie and flags");
        return NULL;
    }
    int own = args[2] == Py_None;
    if (um_to_u64(state, args[0], "start", &start) || um_to_u64(state, args[1], "end", &end) ||
        um_to_u64(state, args[3], "flags", &flags) || (!own && um_to_u64(state, args[2], "cookie", &cookie)))
        return NULL;
    int result;
    do {
        if (own)
            cookie = FIRST_OWN_COOKIE + device->next_cookie++;
        Py_BEGIN_ALLOW_THREADS
        result = usermm_register(device->core, start, end, cookie, (unsigned)flags);
        Py_END_ALLOW_THREADS
    } while (own && result == -EINVAL);
    if (result == 0)
        return PyLong_FromUnsignedLongLong(cookie);
    char call[96];
    snprintf(call, sizeof call, "register(0x%llx-0x%llx, cookie=%llu)", (unsigned long long)start,
             (unsigned long long)end, (unsigned long long)cookie);
    if (result == -EINVAL)
        return um_raise_cookie(state, call, "the cookie is registered already: unregister it first, or leave it out");
    return um_raise(state, result, call, NULL);
}

static PyObject *forget(PyObject *self, PyObject *const *args, Py_ssize_t count, const PyObject *names,
                        const char *name, int (*function)(usermm_device *, uint64_t)) {
    const struct module_state *state = state_of(self);
    char call[64];
    uint64_t cookie;
    if (count != 1 || names) {
        snprintf(call, sizeof call, "%s takes one cookie", name);
        PyErr_SetString(state->argument_type_error, call);
        return NULL;
    }
    if (um_to_u64(state, args[0], "cookie", &cookie))
        return NULL;
    int result = function(core_of(self), cookie);
    if (result == 0)
        Py_RETURN_NONE;
    snprintf(call, sizeof call, "%s(%llu)", name, (unsigned long long)cookie);
    if (result == -EINVAL)
        return um_raise_cookie(state, call, "no region has this cookie: pass one that register returned, once");
    return um_raise(state, result, call, NULL);
}

static PyObject *unregister(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    return forget(self, args, count, names, "unregister", usermm_unregister);
}

static PyObject *retire(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    return forget(self, args, count, names, "retire", usermm_retire);
}

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* Waits for something to read; -EAGAIN after the deadline, 1 with a Python exception pending. */
static int wait_readable(usermm_device *core, double deadline_s) {
    double left_s = deadline_s - now_s();
    int result, timeout_ms = left_s * 1000 < LONGEST_WAIT_MS ? (int)ceil(left_s * 1000) : LONGEST_WAIT_MS;
    if (left_s <= 0)
        return -EAGAIN;
    Py_BEGIN_ALLOW_THREADS
    result = usermm_wait(core, timeout_ms);
    Py_END_ALLOW_THREADS
    if (PyErr_CheckSignals())
        return 1;
    return result == -EINTR || result > 0 ? 0 : result;
}

/* The device's read that waits until the deadline. -errno, or -1 with `*ret_raised` set. */
static Py_ssize_t read_until(usermm_device *core, void *buffer, size_t size, double deadline_s, int *ret_raised) {
    for (*ret_raised = 0;;) {
        Py_ssize_t done = usermm_read(core, buffer, size);
        if (done != -EAGAIN)
            return done;
        int result = wait_readable(core, deadline_s);
        *ret_raised = result == 1;
        if (result)
            return result == 1 ? -1 : result;
    }
}

/* timeout: None for ever, else seconds of at least 0. */
static int parse_deadline(const struct module_state *state, PyObject *timeout, double *ret_deadline_s) {
    *ret_deadline_s = INFINITY;
    if (timeout == Py_None)
        return 0;
    double timeout_s = PyFloat_AsDouble(timeout);
    if (timeout_s == -1.0 && PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_TypeError))
        return -1; /* the object's own __float__ failed */
    if (timeout_s == -1.0 && PyErr_Occurred())
        return um_raise_from_pending(state->argument_type_error, "timeout must be seconds or None");
    if (!(timeout_s >= 0)) {
        PyErr_SetString(state->argument_error, "timeout must be None or at least 0 seconds");
        return -1;
    }
    *ret_deadline_s = timeout_s == 0 ? 0 : now_s() + timeout_s;
    return 0;
}

/* read_within(timeout, count) -> bytes, empty after the timeout */
static PyObject *read_within(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    const struct module_state *state = state_of(self);
    char buffer[4096];
    uint64_t size;
    double deadline_s;
    int raised;
    if (count != 2 || names) {
        PyErr_SetString(state->argument_type_error, "read_within takes a timeout and a count of bytes");
        return NULL;
    }
    if (parse_deadline(state, args[0], &deadline_s) || um_to_u64(state, args[1], "count", &size))
        return NULL;
    if (size > sizeof buffer)
        size = sizeof buffer;
    Py_ssize_t done = read_until(core_of(self), buffer, (size_t)size, deadline_s, &raised);
    if (raised)
        return NULL;
    if (done == -EAGAIN)
        done = 0;
    return done < 0 ? um_raise(state, done, "read", NULL) : PyBytes_FromStringAndSize(buffer, done);
}

static double abi_deadline_s(usermm_device *core) {
    return usermm_flags(core) & O_NONBLOCK ? 0 : INFINITY;
}

static PyObject *read_bytes(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    const struct module_state *state = state_of(self);
    char buffer[4096];
    uint64_t size = sizeof buffer;
    int raised;
    if (count > 1 || names) {
        PyErr_SetString(state->argument_type_error, "read_bytes takes one count of bytes");
        return NULL;
    }
    if (count == 1 && um_to_u64(state, args[0], "count", &size))
        return NULL;
    if (size > sizeof buffer)
        size = sizeof buffer;
    Py_ssize_t done = read_until(core_of(self), buffer, (size_t)size, abi_deadline_s(core_of(self)), &raised);
    if (raised)
        return NULL;
    return done < 0 ? um_raise(state, done, "read_bytes", NULL) : PyBytes_FromStringAndSize(buffer, done);
}

static PyObject *readinto(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    const struct module_state *state = state_of(self);
    uint64_t address, size;
    int raised;
    if (count != 2 || names) {
        PyErr_SetString(state->argument_type_error, "readinto takes an address and a count of bytes");
        return NULL;
    }
    if (um_to_u64(state, args[0], "address", &address) || um_to_u64(state, args[1], "count", &size))
        return NULL;
    Py_ssize_t done =
        read_until(core_of(self), (void *)(uintptr_t)address, (size_t)size, abi_deadline_s(core_of(self)), &raised);
    if (raised)
        return NULL;
    return done < 0 ? um_raise(state, done, "readinto",
                               done == -EFAULT ? "the address is not writable; the events are lost" : NULL)
                    : PyLong_FromSsize_t(done);
}

/* The request's number says how large its structure is; another size is a mistake that the ABI could not notice. */
static int check_size(const struct module_state *state, unsigned long request, const Py_buffer *view) {
    char message[128];
    size_t size = (request >> 16) & 0x3fff;
    if ((size_t)view->len == size || ((request >> 8) & 0xff) != 'U') /* others are unknown, whatever their size */
        return 0;
    snprintf(message, sizeof message, "ioctl(0x%lx): argument has %zd bytes, the request takes %zu: pack it again",
             request, view->len, size);
    PyErr_SetString(state->argument_error, message);
    return -1;
}

/* A read-only buffer will do where the request writes nothing back: REGISTER and UNREGISTER never do. */
static int get_argument(const struct module_state *state, unsigned long request, PyObject *object,
                        Py_buffer *ret_view) {
    if (PyObject_GetBuffer(object, ret_view, PyBUF_WRITABLE) == 0)
        return 0;
    if (request == EXCHANGE_FEATURES)
        return um_raise_from_pending(state->argument_error, "ioctl: the features are written back: pass a bytearray");
    PyErr_Clear();
    if (PyObject_GetBuffer(object, ret_view, PyBUF_SIMPLE))
        return um_raise_from_pending(state->argument_type_error,
                                     "ioctl: argument must be an address or a contiguous buffer");
    return 0;
}

static int ioctl_buffer(const struct module_state *state, usermm_device *core, unsigned long request, PyObject *object,
                        int *ret_result) {
    Py_buffer view;
    if (get_argument(state, request, object, &view))
        return -1;
    int bad = check_size(state, request, &view);
    if (!bad) {
        Py_BEGIN_ALLOW_THREADS
        *ret_result = usermm_ioctl(core, request, view.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&view);
    return bad;
}

static PyObject *device_ioctl(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    const struct module_state *state = state_of(self);
    uint64_t request, address;
    int result = 0;
    if (count != 2 || names) {
        PyErr_SetString(state->argument_type_error, "ioctl takes a request and an address or a buffer");
        return NULL;
    }
    if (um_to_u64(state, args[0], "request", &request))
        return NULL;
    if (PyLong_Check(args[1])) {
        if (um_to_u64(state, args[1], "argument", &address))
            return NULL;
        Py_BEGIN_ALLOW_THREADS
        result = usermm_ioctl(core_of(self), (unsigned long)request, (void *)(uintptr_t)address);
        Py_END_ALLOW_THREADS
    } else if (ioctl_buffer(state, core_of(self), (unsigned long)request, args[1], &result)) {
        return NULL;
    }
    if (result == 0)
        return PyLong_FromLong(0);
    char call[48];
    snprintf(call, sizeof call, "ioctl(0x%llx)", (unsigned long long)request);
    return um_raise(state, result, call, NULL);
}

/* map_page(length, prot, flags, offset) -> memoryview */
static PyObject *map_page(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    const struct module_state *state = state_of(self);
    uint64_t length, prot, flags, offset;
    void *address;
    if (count != 4 || names) {
        PyErr_SetString(state->argument_type_error, "map_page takes length, prot, flags and offset");
        return NULL;
    }
    if (um_to_u64(state, args[0], "length", &length) || um_to_u64(state, args[1], "prot", &prot) ||
        um_to_u64(state, args[2], "flags", &flags) || um_to_u64(state, args[3], "offset", &offset))
        return NULL;
    if (!(prot & PROT_READ)) {
        PyErr_SetString(state->argument_error, "mmap: prot must include PROT_READ, or the view could not be read");
        return NULL;
    }
    int result = usermm_map(core_of(self), (size_t)length, (int)prot, (int)flags, (int64_t)offset, &address);
    return result ? um_raise(state, result, "mmap", NULL) : um_page_view(state, address, (size_t)length);
}

static PyObject *device_fileno(PyObject *self, PyObject *unused) {
    (void)unused;
    int fd = usermm_fileno(core_of(self));
    return fd < 0 ? um_raise(state_of(self), fd, "fileno", NULL) : PyLong_FromLong(fd);
}

static PyObject *device_close(PyObject *self, PyObject *unused) {
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    usermm_shutdown(core_of(self));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *device_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *keywords[] = {"abi", "flags", NULL};
    int abi = USERMM_ABI_UMMUNOTIFY, flags = O_RDONLY, result;
    const struct module_state *state = um_state_of_type(type);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|i$i:Ummunotify", keywords, &abi, &flags)) {
        int wrong_type = PyErr_ExceptionMatches(PyExc_TypeError);
        um_raise_from_pending(wrong_type ? state->argument_type_error : state->argument_error,
                              "Ummunotify takes abi=1 or 2 and flags as of open(2)");
        return NULL;
    }
    /* Opened first: an object is in the garbage collector's sight as soon as it exists, and so in other threads'. */
    usermm_device *core;
    Py_BEGIN_ALLOW_THREADS
    result = usermm_open(abi, flags, &core);
    Py_END_ALLOW_THREADS
    if (result)
        return um_raise(state, result, "open",
                        result == -EINVAL ? "abi must be 1 or 2, and flags must not ask for writing" : NULL);
    struct device *device = (struct device *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!device) {
        usermm_close(core);
        return NULL;
    }
    device->core = core;
    device->state = state;
    return (PyObject *)device;
}

/* Short ones, for help(): units, errors and their causes are in _core.pyi. */
#define FAST(function) (PyCFunction)(void (*)(void)) function, METH_FASTCALL | METH_KEYWORDS
static PyMethodDef methods[] = {
    {"check", FAST(check),
     "check($self, seen, /, probe=True)\n--\n\nTrue when no region of this device lost memory since `seen`."},
    {"watch", FAST(watch),
     "watch($self, start, end, cookie, flags, /)\n--\n\nRegisters addresses; see register_range."},
    {"unregister", FAST(unregister), "unregister($self, cookie, /)\n--\n\nForgets a region and its event."},
    {"retire", FAST(retire),
     "retire($self, cookie, /)\n--\n\nunregister, and unmapping the memory costs no event any more."},
    {"read_within", FAST(read_within), "read_within($self, timeout, count, /)\n--\n\nThe events' bytes; see read."},
    {"read_bytes", FAST(read_bytes),
     "read_bytes($self, count=4096, /)\n--\n\nThe ABI's read: 32 bytes for each event."},
    {"readinto", FAST(readinto), "readinto($self, address, count, /)\n--\n\nThe ABI's read, to an address."},
    {"ioctl", FAST(device_ioctl),
     "ioctl($self, request, argument, /)\n--\n\nThe ABI's ioctl: `argument` is an address or a buffer of the right "
     "size."},
    {"map_page", FAST(map_page), "map_page($self, length, prot, flags, offset, /)\n--\n\nSee mmap."},
    {"fileno", device_fileno, METH_NOARGS,
     "fileno($self, /)\n--\n\nA descriptor that polls readable exactly while read() has something."},
    {"close", device_close, METH_NOARGS, "close($self, /)\n--\n\nForgets all regions and ends every waiting read."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"generation", get_generation, NULL, "How many notifications hit this device.", NULL},
    {"closed", get_closed, NULL, "Whether close() was called.", NULL},
    {"flags", get_flags, NULL, "The flags it was opened with.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, device_new}, {Py_tp_dealloc, device_dealloc},   {Py_tp_methods, methods},
    {Py_tp_getset, getset},  {Py_tp_traverse, device_traverse}, {0, NULL},
};

PyType_Spec um_device_spec = {
    .name = "usermm._core.Device",
    .basicsize = sizeof(struct device),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
