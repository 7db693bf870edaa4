/*
 * usermm._core.TryLock: `with TryLock(lock) as got`, which does not wait. The interpreter looks for signals after a
 * call of lock.acquire(), and an exception there would leave the lock taken; it does not between this __enter__ and the
 * block.
 */
#include "module.h"

struct try_lock {
    PyObject ob_base;
    PyObject *lock; /* of threading: acquire(False), release() */
    int got;
};

static struct try_lock *of(PyObject *object) {
    return (struct try_lock *)object;
}

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"lock", NULL};
    PyObject *lock;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O:TryLock", names, &lock))
        return NULL;
    PyObject *self = ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self)
        of(self)->lock = Py_NewRef(lock);
    return self;
}

static PyObject *enter(PyObject *self, PyObject *unused) {
    (void)unused;
    PyObject *got = PyObject_CallMethod(of(self)->lock, "acquire", "i", 0);
    of(self)->got = got && PyObject_IsTrue(got) == 1;
    return got;
}

static PyObject *leave(PyObject *self, PyObject *args) {
    (void)args;
    if (!of(self)->got)
        Py_RETURN_NONE;
    of(self)->got = 0;
    return PyObject_CallMethod(of(self)->lock, "release", NULL);
}

static void dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(of(self)->lock);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"__enter__", enter, METH_NOARGS, "__enter__($self, /)\n--\n\nWhether the lock was free."},
    {"__exit__", leave, METH_VARARGS, "__exit__($self, /, *_)\n--\n\nReleases it, if it was."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, new},
    {Py_tp_dealloc, dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec um_try_lock_spec = {
    .name = "usermm._core.TryLock",
    .basicsize = sizeof(struct try_lock),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};
