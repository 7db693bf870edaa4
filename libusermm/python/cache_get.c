/* get: from an object to its registration. */
#include "owner.h"

#include <errno.h>

#define WAIT_SLICE_MS 50 /* how long a signal handler may have to wait */

enum probe { PROBE_NEW_OBJECTS, PROBE_ALWAYS, PROBE_NEVER };

/* Asking a type whether it has the protocol is a tenth of a hit, and most callers pass the same type each time. */
static int has_buffer(struct um_python_cache *cache, PyObject *object) {
    if (Py_TYPE(object) == cache->buffer_type)
        return 1;
    if (!PyObject_CheckBuffer(object))
        return 0;
    PyTypeObject *before = cache->buffer_type;
    cache->buffer_type = (PyTypeObject *)Py_NewRef((PyObject *)Py_TYPE(object));
    Py_XDECREF((PyObject *)before);
    return 1;
}

/* Where the bytes are. `view` keeps them there until it is released; without the protocol the object alone does. */
static int take_buffer(struct um_python_cache *cache, PyObject *object, Py_buffer *view, uint64_t *ret_address,
                       uint64_t *ret_length) {
    view->obj = NULL;
    if (!has_buffer(cache, object))
        return um_buffer_range(cache->state, object, ret_address, ret_length);
    if (PyObject_GetBuffer(object, view, cache->buffer_flags))
        return um_raise_from_pending(cache->state->argument_error,
                                     cache->buffer_flags & PyBUF_WRITABLE
                                         ? "buffer: pass a live, contiguous, writable one, since the device may write"
                                         : "buffer: pass a live, contiguous one");
    *ret_address = (uint64_t)(uintptr_t)view->buf;
    *ret_length = (uint64_t)view->len;
    if (view->len)
        return 0;
    PyBuffer_Release(view);
    PyErr_SetString(cache->state->argument_error, "buffer: it is empty, so there is no memory to register");
    return -1;
}

static void release_buffer(Py_buffer *view) {
    if (view->obj)
        PyBuffer_Release(view);
}

__attribute__((noinline, cold)) static int raise_usage(const struct um_python_cache *cache) {
    PyErr_SetString(cache->state->argument_type_error, "get takes one buffer, and probe=None, True or False");
    return -1;
}

static int parse_get(const struct um_python_cache *cache, PyObject *const *args, Py_ssize_t count, PyObject *names,
                     enum probe *ret_probe) {
    *ret_probe = PROBE_NEW_OBJECTS;
    if (count == 1 && !names)
        return 0;
    if (count != 1 || PyTuple_Size(names) != 1 ||
        PyUnicode_Compare(PyTuple_GetItem(names, 0), cache->state->probe_name) != 0)
        return raise_usage(cache);
    if (args[1] == Py_None)
        return 0;
    int truth = PyObject_IsTrue(args[1]);
    *ret_probe = truth ? PROBE_ALWAYS : PROBE_NEVER;
    return truth < 0 ? -1 : 0;
}

/* After it, what is found at this address is what is mapped there now: see docs/decisions/0008-same-object-no-probe.md.
 */
static int wait_for_quiet(struct um_python_cache *cache, uint64_t address, uint64_t length) {
#ifdef USERMM_WITHOUT_PROBE
    (void)cache, (void)address, (void)length;
    return 0;
#else
    int busy = usermm_cache_probe(cache->core, USERMM_PROBE_TRY);
    if (busy == -EAGAIN) {
        Py_BEGIN_ALLOW_THREADS
        busy = usermm_cache_probe(cache->core, USERMM_PROBE_WAIT);
        Py_END_ALLOW_THREADS
    }
    return busy == 1 ? usermm_cache_evict(cache->core, address, length) : busy;
#endif
}

/* The registrar's own exception, or what Python makes of `result`: an exception, or flags to try again with. */
static int explain_failure(PyObject *self, int result, uint64_t address, uint64_t length, unsigned *ret_flags) {
    bool by_registrar = result == -ECANCELED || result == -EINTR || result == -ENOSPC;
    if (by_registrar && PyErr_Occurred())
        return -1;
    PyErr_Clear(); /* of an attempt before */
    PyObject *flags =
        PyObject_CallMethod(self, "_failed", "iKK", -result, (unsigned long long)address, (unsigned long long)length);
    if (!flags)
        return -1;
    *ret_flags = (unsigned)PyLong_AsUnsignedLong(flags);
    Py_DECREF(flags);
    return PyErr_Occurred() ? -1 : 0;
}

static int wait_for_other_thread(struct um_python_cache *cache, uint32_t made) {
    int done = 0, interrupted = 0;
    while (!done && !interrupted) {
        Py_BEGIN_ALLOW_THREADS
        done = usermm_cache_wait(cache->core, made, WAIT_SLICE_MS);
        Py_END_ALLOW_THREADS
        interrupted = PyErr_CheckSignals();
    }
    return interrupted;
}

static struct usermm_registration *find_or_make(PyObject *self, uint64_t address, uint64_t length, bool *ret_made) {
    struct um_python_cache *cache = um_cache_of(self);
    struct usermm_registration *registered = NULL;
    unsigned flags = cache->watch_flags;
    for (;;) {
        uint32_t made = usermm_cache_made(cache->core);
        int result = usermm_cache_find_or_make(cache->core, address, length, flags, &registered, ret_made);
        if (result == 0 || result == -EINPROGRESS)
            PyErr_Clear(); /* a device that had no room, before somebody else registered the same */
        if (result == 0)
            return registered;
        if (result == -EINPROGRESS ? wait_for_other_thread(cache, made)
                                   : explain_failure(self, result, address, length, &flags))
            return NULL;
    }
}

/* What is made for this call is of what is mapped now. What is found, also what another thread made meanwhile, is so
 * only after a quiet moment. */
static struct usermm_registration *find_exactly(PyObject *self, uint64_t address, uint64_t length, bool *ret_made) {
    struct um_python_cache *cache = um_cache_of(self);
    unsigned unused;
    uint64_t serial;
    struct usermm_registration *registered = usermm_cache_peek(cache->core, address, length, &serial);
    if (!registered) {
        registered = find_or_make(self, address, length, ret_made);
        if (!registered || *ret_made)
            return registered;
        usermm_cache_release(cache->core, registered);
    }
    int result = wait_for_quiet(cache, address, length);
    if (result >= 0 && serial && usermm_cache_again(cache->core, registered, serial))
        return registered;
    if (result >= 0)
        return find_or_make(self, address, length, ret_made);
    explain_failure(self, result, address, length, &unused);
    return NULL;
}

static int begin_upkeep(PyObject *self) {
    um_cache_of(self)->upkeep_due = 0;
    if (PyInterpreterState_GetID(PyInterpreterState_Get()) != 0)
        return 0; /* a thread would keep a subinterpreter from ending */
    PyObject *done = PyObject_CallMethod(self, "_begin_upkeep", NULL);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

__attribute__((noinline, flatten)) static PyObject *get_slowly(PyObject *self, PyObject *object, uint64_t address,
                                                               uint64_t length, enum probe probe) {
    struct um_python_cache *cache = um_cache_of(self);
    bool made = false;
    struct usermm_registration *registered =
        probe == PROBE_NEVER ? find_or_make(self, address, length, &made) : find_exactly(self, address, length, &made);
    if (!registered)
        return NULL;
    if (cache->upkeep_due && begin_upkeep(self)) {
        usermm_cache_release(cache->core, registered);
        return NULL;
    }
    if (probe != PROBE_NEVER) {
        PyObject *owner = made ? um_owner_new(cache, object, registered) : NULL; /* who finds one is seldom its owner */
        um_askers_remember(&cache->askers, object, address, length, registered, made, owner);
        Py_XDECREF(owner);
        if (PyErr_Occurred()) { /* Ctrl-C, in a property of the object's */
            usermm_cache_release(cache->core, registered);
            return NULL;
        }
    }
    return um_registration_new(cache, registered);
}

static struct usermm_registration *again(struct um_python_cache *cache, const struct um_asker *asker) {
    struct usermm_registration *registered = asker->registration;
    return usermm_cache_again(cache->core, registered, asker->serial) ? registered : NULL;
}

/* Something else went, most often. The same object needs no probe here either; what is deregistered meanwhile may
 * change the table. */
__attribute__((noinline)) static struct usermm_registration *
again_after_refresh(struct um_python_cache *cache, PyObject *object, uint64_t address, uint64_t length) {
    if (usermm_cache_refresh(cache->core))
        return NULL;
    const struct um_asker *asker = um_askers_find(&cache->askers, object, address, length);
    return asker ? again(cache, asker) : NULL;
}

__attribute__((flatten)) PyObject *um_cache_get(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                                PyObject *names) {
    struct um_python_cache *cache = um_cache_of(self);
    uint64_t address, length;
    enum probe probe;
    Py_buffer view;
    if (parse_get(cache, args, count, names, &probe))
        return NULL;
    um_askers_prefetch(&cache->askers, args[0]);
    if (take_buffer(cache, args[0], &view, &address, &length))
        return NULL;
    struct um_asker *asker =
        probe == PROBE_NEW_OBJECTS ? um_askers_find(&cache->askers, args[0], address, length) : NULL;
    struct usermm_registration *registered = asker ? again(cache, asker) : NULL;
    if (!registered && asker)
        registered = again_after_refresh(cache, args[0], address, length);
    PyObject *registration =
        registered ? um_registration_new(cache, registered) : get_slowly(self, args[0], address, length, probe);
    release_buffer(&view);
    return registration;
}

/* memory_of(buffer) -> (address, length), with the demands that get has */
PyObject *um_cache_memory_of(PyObject *self, PyObject *object) {
    uint64_t address, length;
    Py_buffer view;
    if (take_buffer(um_cache_of(self), object, &view, &address, &length))
        return NULL;
    release_buffer(&view);
    return Py_BuildValue("KK", (unsigned long long)address, (unsigned long long)length);
}
