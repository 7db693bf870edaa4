/* usermm._core.Memory, shared between what it is and how it is accessed. */
#ifndef UM_MEMORY_H
#define UM_MEMORY_H

#include "module.h"

#include <stdbool.h>
#include <sys/mman.h>
#include <sys/types.h>

#include "pages.h"

#define UM_LONG_BYTES ((size_t)1 << 20) /* from here on the interpreter's lock is let go meanwhile */

struct um_memory {
    PyObject ob_base;
    PyObject *weak_references;
    struct um_memory *whole; /* of which this is a part; NULL for a mapping of its own */
    char *address;           /* NULL once closed */
    size_t length;
    Py_ssize_t exports; /* while there are some nobody unmaps it */
    pid_t owner;
    bool writable, shared, inherit;
};

static inline struct um_memory *um_memory_of(PyObject *self) {
    return (struct um_memory *)self;
}

/* Raises what keeps `call` from touching the memory: it is closed, or a forked parent's. -1, or 0. */
int um_memory_refuse(const struct um_memory *self, const char *call);

/* Raises ArgumentError or ArgumentTypeError with a message of PyErr_Format's kind. Always NULL. */
PyObject *um_memory_argument_error(PyObject *self, bool wrong_type, const char *format, ...);

/* Raises the class of usermm.errors for a negative errno. Always NULL. */
PyObject *um_memory_error(PyObject *self, int result, const char *call, const char *reason);

/* Raises for a negative errno of mapping. Always NULL. */
PyObject *um_memory_map_error(PyObject *self, int result);

static inline struct um_mode um_memory_mode(const struct um_memory *self) {
    return (struct um_mode){PROT_READ | (self->writable ? PROT_WRITE : 0), self->shared ? MAP_SHARED : MAP_PRIVATE,
                            self->inherit};
}

/* In a forked child that inherited nothing, other memory may be mapped at the address by now. */
bool um_memory_is_of_parent(const struct um_memory *self);

/* The runs of a sequence and the sum of their lengths; they are the caller's to free. NULL with an exception. */
struct um_run *um_memory_runs(const struct module_state *state, PyObject *object, size_t *ret_count, size_t *ret_total);

/* Methods; see _core.pyi. */
PyObject *um_memory_fill(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *um_memory_detach(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *um_memory_read(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *um_memory_write(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *um_memory_load(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *um_memory_store(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *um_memory_exchange(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *um_memory_add(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *um_memory_fence(PyObject *self, PyObject *unused);

#endif
