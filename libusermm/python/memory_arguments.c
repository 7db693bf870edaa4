/* usermm._core.Memory: what it is made of, and what it refuses. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>

#include "memory.h"

static const struct module_state *state_of(PyObject *self) {
    return um_state_of_type(Py_TYPE(self));
}

PyObject *um_memory_argument_error(PyObject *self, bool wrong_type, const char *format, ...) {
    const struct module_state *state = state_of(self);
    va_list values;
    va_start(values, format);
    PyObject *message = PyUnicode_FromFormatV(format, values);
    va_end(values);
    if (message)
        PyErr_SetObject(wrong_type ? state->argument_type_error : state->argument_error, message);
    Py_XDECREF(message);
    return NULL;
}

PyObject *um_memory_error(PyObject *self, int result, const char *call, const char *reason) {
    const struct module_state *state = state_of(self);
    PyObject *message = PyUnicode_FromFormat("Memory.%s: %s", call, reason);
    PyObject *error = message ? PyObject_CallFunction(state->grant_error, "iO", -result, message) : NULL;
    if (error)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    Py_XDECREF(message);
    return NULL;
}

PyObject *um_memory_map_error(PyObject *self, int result) {
    return um_memory_error(self, result, "mmap",
                           result == -ENOMEM ? "memory or mappings ran out: unmap some, or raise vm.max_map_count"
                                             : "a run cannot be mapped: is it a file, and open for that?");
}

bool um_memory_is_of_parent(const struct um_memory *self) {
    return !self->inherit && um_pages_process() != self->owner;
}

int um_memory_refuse(const struct um_memory *self, const char *call) {
    PyObject *object = (PyObject *)(uintptr_t)self;
    if (!self->address)
        um_memory_argument_error(object, false, "%s: the memory is unmapped", call);
    else if (um_memory_is_of_parent(self))
        um_memory_error(object, -ECHILD, call, "the memory is mapped in the parent only: map it in this child");
    else
        return 0;
    return -1;
}

static int parse_run(const struct module_state *state, PyObject *item, struct um_run *ret_run) {
    int fd;
    long long offset;
    Py_ssize_t length;
    if (!PyTuple_Check(item) || !PyArg_ParseTuple(item, "iLn", &fd, &offset, &length)) {
        PyErr_Clear();
        PyErr_Format(state->argument_type_error, "Memory(%R): a run is (descriptor, offset, length), in bytes", item);
        return -1;
    }
    if (fd < 0 || offset < 0 || length <= 0) {
        PyErr_Format(state->argument_error, "Memory(%R): a run has a length above 0, and nothing negative", item);
        return -1;
    }
    *ret_run = (struct um_run){fd, offset, (size_t)length};
    return 0;
}

struct um_run *um_memory_runs(const struct module_state *state, PyObject *object, size_t *ret_count,
                              size_t *ret_total) {
    PyObject *sequence = PySequence_Tuple(object);
    if (!sequence)
        return NULL;
    Py_ssize_t count = PyTuple_Size(sequence);
    struct um_run *runs = count ? PyMem_Malloc((size_t)count * sizeof *runs) : NULL;
    *ret_total = 0;
    if (!count)
        PyErr_SetString(state->argument_error, "Memory: no run was given");
    else if (!runs)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; runs && i < count; i++) {
        if (parse_run(state, PyTuple_GetItem(sequence, i), &runs[i]) == 0 &&
            !__builtin_add_overflow(*ret_total, runs[i].length, ret_total) && *ret_total <= PY_SSIZE_T_MAX)
            continue;
        if (!PyErr_Occurred())
            PyErr_SetString(state->argument_error, "Memory: the runs are longer than an address space");
        PyMem_Free(runs);
        runs = NULL;
    }
    Py_DECREF(sequence);
    *ret_count = (size_t)count;
    return runs;
}
