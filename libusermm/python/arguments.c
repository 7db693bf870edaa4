/* From Python's objects to addresses and numbers, and from errno to exceptions. */
#include <errno.h>

#include "module.h"

PyObject *um_raise(const struct module_state *state, long result, const char *call, const char *reason) {
    PyObject *error = PyObject_CallFunction(state->device_error, "lsz", -result, call, reason);
    if (error)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    return NULL;
}

PyObject *um_raise_cookie(const struct module_state *state, const char *call, const char *reason) {
    PyObject *message = PyUnicode_FromFormat("%s: %s", call, reason);
    PyObject *error = message ? PyObject_CallFunction(state->cookie_error, "iO", EINVAL, message) : NULL;
    if (error)
        PyErr_SetObject(state->cookie_error, error);
    Py_XDECREF(error);
    Py_XDECREF(message);
    return NULL;
}

int um_raise_from_pending(PyObject *type, const char *message) {
    PyObject *kind, *cause, *traceback;
    if (!PyErr_ExceptionMatches(PyExc_Exception))
        return -1; /* Ctrl-C, in somebody's own code */
    PyErr_Fetch(&kind, &cause, &traceback);
    PyErr_NormalizeException(&kind, &cause, &traceback);
    PyErr_Format(type, "%s: %S", message, cause ? cause : Py_None);
    Py_XDECREF(kind);
    Py_XDECREF(traceback);
    PyObject *new_kind, *error, *new_traceback;
    PyErr_Fetch(&new_kind, &error, &new_traceback);
    PyErr_NormalizeException(&new_kind, &error, &new_traceback);
    if (error && cause)
        PyException_SetCause(error, cause); /* steals cause */
    else
        Py_XDECREF(cause);
    PyErr_Restore(new_kind, error, new_traceback);
    return -1;
}

/* The common case costs one call; everything else, and every error, takes the long way below. */
static int exact_int_to_u64(PyObject *object, uint64_t *ret_value) {
    if (!PyLong_CheckExact(object))
        return -1;
    *ret_value = PyLong_AsUnsignedLongLong(object);
    if (*ret_value != UINT64_MAX || !PyErr_Occurred())
        return 0;
    PyErr_Clear();
    return -1;
}

int um_to_u64(const struct module_state *state, PyObject *object, const char *name, uint64_t *ret_value) {
    if (exact_int_to_u64(object, ret_value) == 0)
        return 0;
    PyObject *number = PyNumber_Index(object);
    if (!number && !PyErr_ExceptionMatches(PyExc_TypeError))
        return -1; /* the object's own __index__ failed: its exception says more */
    if (!number) {
        PyErr_Format(state->argument_type_error, "%s must be an int, not %R", name, (PyObject *)Py_TYPE(object));
        return -1;
    }
    unsigned long long value = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    if (value == (unsigned long long)-1 && PyErr_Occurred()) {
        PyErr_Format(state->argument_error, "%s must be in 0..2**64-1", name); /* the number may have any length */
        return -1;
    }
    *ret_value = value;
    return 0;
}

/* An attribute, called if it can be: data_ptr() of tensors, .address of others. NULL without exception: not there. */
static PyObject *attribute(PyObject *object, const char *name) {
    PyObject *value = PyObject_GetAttrString(object, name);
    if (!value) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError))
            PyErr_Clear();
        return NULL;
    }
    if (!PyCallable_Check(value))
        return value;
    PyObject *called = PyObject_CallNoArgs(value);
    Py_DECREF(value);
    return called;
}

static int u64_attribute(const struct module_state *state, PyObject *object, const char *name, uint64_t *ret_value) {
    PyObject *value = attribute(object, name);
    if (!value)
        return PyErr_Occurred() ? -1 : 0;
    int result = um_to_u64(state, value, name, ret_value);
    Py_DECREF(value);
    return result < 0 ? -1 : 1;
}

static int is_contiguous(PyObject *object) {
    PyObject *value = attribute(object, "is_contiguous");
    if (!value)
        return PyErr_Occurred() ? -1 : 1;
    int truth = PyObject_IsTrue(value);
    Py_DECREF(value);
    return truth;
}

/* A tensor elsewhere than in this process's memory has a data_ptr() too. */
static int is_on_host(PyObject *object) {
    PyObject *device = attribute(object, "device");
    if (!device)
        return PyErr_Occurred() ? -1 : 1;
    PyObject *kind = PyUnicode_Check(device) ? Py_NewRef(device) : attribute(device, "type");
    PyObject *cpu = PyUnicode_FromString("cpu");
    int same = kind && cpu && PyUnicode_Check(kind) ? PyUnicode_Tailmatch(kind, cpu, 0, 3, -1) == 1 : 1;
    Py_DECREF(device);
    Py_XDECREF(kind);
    Py_XDECREF(cpu);
    return PyErr_Occurred() ? -1 : same;
}

/* 1 found, 0 no such attributes, -1 exception. */
static int by_attributes(const struct module_state *state, PyObject *object, uint64_t *ret_address,
                         uint64_t *ret_length) {
    int found = u64_attribute(state, object, "data_ptr", ret_address);
    if (found == 0)
        found = u64_attribute(state, object, "address", ret_address);
    if (found <= 0)
        return found;
    int contiguous = is_contiguous(object), host = contiguous < 0 ? -1 : is_on_host(object);
    if (contiguous < 0 || host < 0)
        return -1;
    if (!contiguous || !host) {
        PyErr_SetString(state->argument_error, contiguous ? "buffer: it is not in host memory: register the host copy"
                                                          : "buffer: its items have gaps: pass a contiguous one");
        return -1;
    }
    found = u64_attribute(state, object, "nbytes", ret_length);
    return found == 0 ? u64_attribute(state, object, "size", ret_length) : found;
}

static int by_protocol(const struct module_state *state, PyObject *object, uint64_t *ret_address,
                       uint64_t *ret_length) {
    Py_buffer view;
    if (PyObject_GetBuffer(object, &view, PyBUF_ANY_CONTIGUOUS))
        return um_raise_from_pending(state->argument_error, "buffer: pass a live, contiguous one");
    *ret_address = (uint64_t)(uintptr_t)view.buf;
    *ret_length = (uint64_t)view.len;
    PyBuffer_Release(&view);
    return 0;
}

int um_buffer_range(const struct module_state *state, PyObject *object, uint64_t *ret_address, uint64_t *ret_length) {
    if (PyObject_CheckBuffer(object)) {
        if (by_protocol(state, object, ret_address, ret_length))
            return -1;
    } else {
        int found = by_attributes(state, object, ret_address, ret_length);
        if (found < 0)
            return -1;
        if (found == 0) {
            PyErr_Format(state->argument_type_error,
                         "buffer must have the buffer protocol, data_ptr() and nbytes, or address and size, not %R",
                         (PyObject *)Py_TYPE(object));
            return -1;
        }
    }
    if (*ret_length == 0) {
        PyErr_SetString(state->argument_error, "buffer: it is empty, so there is no memory to watch");
        return -1;
    }
    return 0;
}
