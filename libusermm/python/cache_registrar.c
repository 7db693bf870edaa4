/* The registrar, as the core sees it: two Python calls. */
#include "cache.h"

#include <errno.h>

static int is_no_resources(const struct module_state *state) {
    return PyErr_ExceptionMatches(state->limit_error) || PyErr_ExceptionMatches(PyExc_MemoryError);
}

static int register_memory(void *context, uint64_t address, uint64_t length, uint64_t *ret_handle) {
    const struct um_python_cache *cache = context;
    PyErr_Clear(); /* of the attempt before, when there was no room */
    PyObject *first = PyLong_FromUnsignedLongLong(address), *second = PyLong_FromUnsignedLongLong(length);
    PyObject *handle = first && second ? PyObject_CallFunctionObjArgs(cache->register_call, first, second, NULL) : NULL;
    Py_XDECREF(first);
    Py_XDECREF(second);
    *ret_handle = (uint64_t)(uintptr_t)handle;
    if (handle)
        return 0;
    if (is_no_resources(cache->state))
        return -ENOSPC;
    return PyErr_ExceptionMatches(PyExc_Exception) ? -ECANCELED : -EINTR; /* Ctrl-C: no second try of any kind */
}

/* Runs in deallocators too, maybe with an exception on its way. What a registrar raises here is logged by Python. */
static void deregister_memory(void *context, uint64_t number) {
    const struct um_python_cache *cache = context;
    PyObject *handle = (PyObject *)(uintptr_t)number, *kind, *value, *traceback;
    PyErr_Fetch(&kind, &value, &traceback);
    PyObject *done = PyObject_CallFunctionObjArgs(cache->deregister_call, handle, NULL);
    if (!done)
        PyErr_WriteUnraisable(cache->deregister_call);
    Py_XDECREF(done);
    Py_DECREF(handle);
    PyErr_Restore(kind, value, traceback);
}

static void forget_memory(void *context, uint64_t number) {
    (void)context;
    Py_DECREF((PyObject *)(uintptr_t)number);
}

const struct usermm_registrar um_python_registrar = {register_memory, deregister_memory, forget_memory,
                                                     .granularity = 1};
