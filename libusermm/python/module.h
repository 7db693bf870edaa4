/* The extension module's own declarations; the only folder that includes Python.h. */
#ifndef UM_MODULE_H
#define UM_MODULE_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "usermm.h"

#define UM_POOL 64

struct module_state {
    PyObject *device_error;        /* usermm.errors.refused */
    PyObject *cookie_error;        /* usermm.errors.CookieError */
    PyObject *argument_error;      /* usermm.errors.ArgumentError */
    PyObject *argument_type_error; /* usermm.errors.ArgumentTypeError */
    PyObject *protocol_broken;     /* usermm.errors.protocol_broken */
    PyObject *page_type, *memory_type, *sender_type, *message_type;
    PyObject *base_name;   /* "base", interned */
    PyObject *probe_name;  /* "probe", interned */
    PyObject *limit_error; /* usermm.errors.LimitError */
    PyObject *grant_error; /* usermm.errors.grant_refused */
    PyObject *cache_type, *registration_type, *owner_type;
    PyObject *mmap_type;                       /* mmap.mmap */
    PyObject *pool[UM_POOL], *spares[UM_POOL]; /* registrations whose memory is used again; those that nobody has */
    int pool_count, spare_count;
};

/* Raises what `result` (a negative errno) means for `call`; `reason` NULL takes the usual one. Always NULL. */
PyObject *um_raise(const struct module_state *state, long result, const char *call, const char *reason);

/* Raises CookieError, the EINVAL that is about a cookie. Always NULL. */
PyObject *um_raise_cookie(const struct module_state *state, const char *call, const char *reason);

/* Raises ArgumentError(message) with the pending exception as its cause. Always -1. */
int um_raise_from_pending(PyObject *type, const char *message);

/* An int (or anything with __index__) of 0..2^64-1. -1 with an exception that names the argument. */
int um_to_u64(const struct module_state *state, PyObject *object, const char *name, uint64_t *ret_value);

/* Where the bytes of a buffer are. -1 with an exception. */
int um_buffer_range(const struct module_state *state, PyObject *object, uint64_t *ret_address, uint64_t *ret_length);

/* A read-only memoryview of a mapping of `length` bytes, which it unmaps in the end. */
PyObject *um_page_view(const struct module_state *state, void *address, size_t length);

/* Of the class that was made from a spec here, also when `type` is a Python subclass, which has no module of ours. */
struct module_state *um_state_of_type(PyTypeObject *type);

extern PyType_Spec um_device_spec, um_page_spec, um_memory_spec, um_try_lock_spec;

#endif
