/* usermm._core.Cache, as its registrations see it. */
#ifndef UM_PYTHON_CACHE_H
#define UM_PYTHON_CACHE_H

#include "askers.h"
#include "module.h"
#include "usermm_cache.h"

struct um_python_cache {
    PyObject ob_base;
    usermm_cache *core; /* never NULL; serialized by the interpreter's lock */
    struct um_askers askers;
    PyObject *register_call, *deregister_call; /* of the registrar */
    PyTypeObject *buffer_type;                 /* the latest one seen with the buffer protocol */
    int buffer_flags;                          /* for PyObject_GetBuffer */
    unsigned watch_flags;                      /* USERMM_REFUSE_* */
    char upkeep_due;                           /* call _begin_upkeep after the next registration */
    struct module_state *state;                /* alive as long as the type, which keeps its module */
};

static inline struct um_python_cache *um_cache_of(PyObject *self) {
    return (struct um_python_cache *)self;
}

/* Methods of cache_get.c. */
PyObject *um_cache_get(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names);
PyObject *um_cache_memory_of(PyObject *self, PyObject *object);

/* Calls the registrar's methods; without its context and traits. */
extern const struct usermm_registrar um_python_registrar;

/* A new holder, whose hold the caller has taken. NULL with an exception, and the hold is given up. */
PyObject *um_registration_new(struct um_python_cache *cache, struct usermm_registration *registered);

/* Shows those that are held now to the garbage collector: what lives on may become part of a cycle. */
void um_registrations_track(struct module_state *state);

extern PyType_Spec um_cache_spec, um_registration_spec;

#endif
