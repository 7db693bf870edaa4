/* The extension module usermm._core. */
#define _GNU_SOURCE
#include <poll.h>
#include <sched.h>

#include "cache.h"
#include "channel.h"
#include "owner.h"
#include "pages.h"

static PyObject *buffer_range(PyObject *module, PyObject *object) {
    uint64_t address, length;
    if (um_buffer_range(PyModule_GetState(module), object, &address, &length))
        return NULL;
    return Py_BuildValue("KK", (unsigned long long)address, (unsigned long long)length);
}

static PyObject *counts(PyObject *module, PyObject *unused) {
    struct usermm_counts now;
    (void)module, (void)unused;
    usermm_count(&now);
    return Py_BuildValue("{sKsKsKsK}", "devices", (unsigned long long)now.devices, "regions",
                         (unsigned long long)now.regions, "notifications", (unsigned long long)now.notifications,
                         "monitors", (unsigned long long)now.monitors);
}

/* One system call, and no list of what it found. */
static PyObject *has_hung_up(PyObject *module, PyObject *number) {
    (void)module;
    struct pollfd peer = {.fd = PyObject_AsFileDescriptor(number), .events = POLLRDHUP};
    if (peer.fd < 0)
        return NULL;
    return PyBool_FromLong(poll(&peer, 1, 0) > 0);
}

static PyObject *process(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyLong_FromLong(um_pages_process());
}

static PyObject *give_way(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    Py_BEGIN_ALLOW_THREADS
    sched_yield();
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* The least that a call into C can cost: what benchmarks compare with. */
static PyObject *empty(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module, (void)args, (void)count;
    Py_RETURN_NONE;
}

/* For gc.callbacks: before a collection. */
static PyObject *track_registrations(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)args, (void)count;
    um_registrations_track(PyModule_GetState(module));
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"track_registrations", (PyCFunction)(void (*)(void))track_registrations, METH_FASTCALL, NULL},
    {"buffer_range", buffer_range, METH_O, NULL},
    {"process", process, METH_NOARGS, NULL},
    {"give_way", give_way, METH_NOARGS, NULL},
    {"has_hung_up", has_hung_up, METH_O, NULL},
    {"counts", counts, METH_NOARGS, NULL},
    {"empty", (PyCFunction)(void (*)(void))empty, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

struct module_state *um_state_of_type(PyTypeObject *type) {
    struct module_state *state = NULL;
    for (; type && !state; type = PyType_GetSlot(type, Py_tp_base)) {
        state = PyType_GetModuleState(type);
        PyErr_Clear();
    }
    return state;
}

static PyObject *add_type(PyObject *module, PyType_Spec *spec, const char *name) {
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (type && name && PyModule_AddObjectRef(module, name, type))
        Py_CLEAR(type);
    return type;
}

static PyObject *attribute_of(const char *module, const char *name) {
    PyObject *imported = PyImport_ImportModule(module);
    PyObject *value = imported ? PyObject_GetAttrString(imported, name) : NULL;
    Py_XDECREF(imported);
    return value;
}

static int fill(PyObject *module) {
    struct module_state *state = PyModule_GetState(module);
    PyObject *errors = PyImport_ImportModule("usermm.errors");
    if (!errors)
        return -1;
    state->device_error = PyObject_GetAttrString(errors, "refused");
    state->cookie_error = PyObject_GetAttrString(errors, "CookieError");
    state->argument_error = PyObject_GetAttrString(errors, "ArgumentError");
    state->argument_type_error = PyObject_GetAttrString(errors, "ArgumentTypeError");
    state->probe_name = PyUnicode_InternFromString("probe");
    state->base_name = PyUnicode_InternFromString("base");
    state->limit_error = PyObject_GetAttrString(errors, "LimitError");
    state->grant_error = PyObject_GetAttrString(errors, "grant_refused");
    state->protocol_broken = PyObject_GetAttrString(errors, "protocol_broken");
    state->page_type = add_type(module, &um_page_spec, NULL);
    state->registration_type = add_type(module, &um_registration_spec, "Registration");
    state->owner_type = add_type(module, &um_owner_spec, NULL);
    state->mmap_type = attribute_of("mmap", "mmap");
    Py_DECREF(errors);
    state->message_type = add_type(module, &um_message_spec, "Message");
    PyObject *device = add_type(module, &um_device_spec, "Device");
    state->sender_type = add_type(module, &um_message_sender_spec, "MessageSender");
    PyObject *slot = add_type(module, &um_message_slot_spec, "MessageSlot");
    PyObject *receiver = add_type(module, &um_message_receiver_spec, "MessageReceiver");
    Py_XDECREF(device);
    Py_XDECREF(slot);
    Py_XDECREF(receiver);
    PyObject *try_lock = add_type(module, &um_try_lock_spec, "TryLock");
    Py_XDECREF(try_lock);
    state->memory_type = add_type(module, &um_memory_spec, "Memory");
    state->cache_type = add_type(module, &um_cache_spec, "Cache");
    if (PyModule_AddIntConstant(module, "REFUSE_HOLES", USERMM_REFUSE_HOLES) ||
        PyModule_AddIntConstant(module, "REFUSE_FILES", USERMM_REFUSE_FILES))
        return -1;
    return device && slot && receiver && try_lock && state->sender_type && state->message_type &&
                   state->protocol_broken && state->memory_type && state->grant_error && state->cache_type &&
                   state->limit_error && state->registration_type && state->owner_type && state->mmap_type &&
                   state->base_name && state->device_error && state->cookie_error && state->argument_error &&
                   state->argument_type_error && state->page_type && state->probe_name
               ? 0
               : -1;
}

static int traverse(PyObject *module, visitproc visit, void *arg) {
    struct module_state *state = PyModule_GetState(module);
    Py_VISIT(state->device_error);
    Py_VISIT(state->cookie_error);
    Py_VISIT(state->argument_error);
    Py_VISIT(state->argument_type_error);
    Py_VISIT(state->page_type);
    Py_VISIT(state->memory_type);
    Py_VISIT(state->sender_type);
    Py_VISIT(state->message_type);
    Py_VISIT(state->protocol_broken);
    Py_VISIT(state->grant_error);
    Py_VISIT(state->probe_name);
    Py_VISIT(state->base_name);
    Py_VISIT(state->limit_error);
    Py_VISIT(state->registration_type);
    Py_VISIT(state->owner_type);
    Py_VISIT(state->cache_type);
    Py_VISIT(state->mmap_type);
    return 0;
}

static int clear(PyObject *module) {
    struct module_state *state = PyModule_GetState(module);
    state->pool_count = 0;
    while (state->spare_count) {
        PyObject *spare = state->spares[--state->spare_count];
        PyObject *type = (PyObject *)Py_TYPE(spare);
        PyObject_GC_Del(spare);
        Py_DECREF(type);
    }
    Py_CLEAR(state->device_error);
    Py_CLEAR(state->cookie_error);
    Py_CLEAR(state->argument_error);
    Py_CLEAR(state->argument_type_error);
    Py_CLEAR(state->page_type);
    Py_CLEAR(state->memory_type);
    Py_CLEAR(state->sender_type);
    Py_CLEAR(state->message_type);
    Py_CLEAR(state->protocol_broken);
    Py_CLEAR(state->grant_error);
    Py_CLEAR(state->probe_name);
    Py_CLEAR(state->base_name);
    Py_CLEAR(state->limit_error);
    Py_CLEAR(state->registration_type);
    Py_CLEAR(state->owner_type);
    Py_CLEAR(state->cache_type);
    Py_CLEAR(state->mmap_type);
    return 0;
}

static void release(void *module) {
    clear(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, fill},
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "usermm._core",
    .m_size = sizeof(struct module_state),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = release,
};

PyMODINIT_FUNC PyInit__core(void) {
    return PyModuleDef_Init(&definition);
}
