/* Owner of a mapped generation page: exports it as a read-only buffer and unmaps it in the end. */
#include <sys/mman.h>

#include "module.h"

struct page {
    PyObject ob_base;
    void *address;
    size_t length;
};

static int get_buffer(PyObject *self, Py_buffer *view, int flags) {
    struct page *page = (struct page *)self;
    return PyBuffer_FillInfo(view, self, page->address, (Py_ssize_t)page->length, 1, flags);
}

static void dealloc(PyObject *self) {
    struct page *page = (struct page *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (page->address)
        munmap(page->address, page->length);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

PyObject *um_page_view(const struct module_state *state, void *address, size_t length) {
    PyTypeObject *type = (PyTypeObject *)state->page_type;
    struct page *page = (struct page *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!page) {
        munmap(address, length);
        return NULL;
    }
    page->address = address;
    page->length = length;
    PyObject *view = PyMemoryView_FromObject((PyObject *)page);
    Py_DECREF(page);
    return view;
}

static PyType_Slot slots[] = {
    {Py_bf_getbuffer, get_buffer},
    {Py_tp_dealloc, dealloc},
    {0, NULL},
};

PyType_Spec um_page_spec = {
    .name = "usermm._core.Page",
    .basicsize = sizeof(struct page),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
