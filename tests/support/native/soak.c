/*
 * The fast half of cache_soak.py, called by soak_library.py with the interpreter's lock held (ctypes.PyDLL): a look-up
 * and the proof that its answer is true take less than a microsecond together. Blocks of memory lie at addresses of
 * their own, in which nobody else is given memory. A block is changed by one thread at a time, and then nobody else
 * asks for it.
 */
#define _GNU_SOURCE
#include "blocks.h"

#define HOT 24 /* blocks that are asked for most */
#define HELD 64
#define HELD_BYTES (16 * PAGE) /* larger ones are let go at once: they would fill the cache */

static struct {
    PyObject *registration;
    uint64_t handle;
} held[HELD];
static PyObject *name_handle;

/* The exception of a call that has to succeed. */
static void complain(void) {
    PyObject *kind, *value, *traceback;
    PyErr_Fetch(&kind, &value, &traceback);
    PyObject *text = PyObject_Str(value ? value : kind);
    require(false, text ? PyUnicode_AsUTF8(text) : "an exception without a text", 0);
    Py_XDECREF(text);
    Py_XDECREF(kind);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

/* What was kept in this place is let go; deregistering runs Python, so the place is empty by then. */
static void keep(unsigned place, PyObject *registration, uint64_t handle) {
    PyObject *before = held[place].registration;
    if (before)
        require(find(held[place].handle) != NULL, "deregistered while it was held", held[place].handle);
    held[place].registration = registration;
    held[place].handle = handle;
    Py_XDECREF(before);
}

/* One look-up, judged before anything else can happen. Whether it was stale. */
static bool look(struct account *account, PyObject *get, PyObject *object, const void *start, size_t length) {
    uint64_t handle = 0;
    PyObject *registration = PyObject_Vectorcall(get, &object, 1, NULL);
    PyObject *number = registration ? PyObject_GetAttr(registration, name_handle) : NULL;
    if (!number) {
        complain();
        Py_XDECREF(registration);
        return false;
    }
    handle = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    bool stale = judge(account, handle, (uint64_t)(uintptr_t)start, length);
    if (length <= HELD_BYTES && below(64) == 0)
        keep(below(HELD), registration, handle);
    else
        Py_DECREF(registration);
    return stale;
}

static PyObject *view_of(const struct block *block, size_t offset, size_t length) {
    return PyMemoryView_FromMemory(block->start + offset, (Py_ssize_t)length, PyBUF_WRITE);
}

/* Another object than those that asked before, for a part. */
static void look_at_a_part(PyObject *get, const struct block *block) {
    size_t offset = below((uint32_t)block->length), length = 1 + below((uint32_t)(block->length - offset));
    PyObject *view = view_of(block, offset, length);
    look(&blocks_account, get, view, block->start + offset, length);
    Py_DECREF(view);
}

void soak_blocks(PyObject *get, unsigned count) {
    while (count--) {
        struct block *block = &blocks[below(below(8) ? HOT : BLOCKS)];
        if (block->busy)
            continue;
        PyObject *object = Py_NewRef(block->object);
        block->readers++;
        if (below(16) == 0)
            look_at_a_part(get, block);
        else
            look(&blocks_account, get, object, block->start, block->length);
        block->readers--;
        Py_DECREF(object);
    }
}

static void evict(PyObject *evict_call, const struct block *block) {
    PyObject *count = PyObject_CallOneArg(evict_call, block->object);
    if (!count)
        complain();
    Py_XDECREF(count);
}

/* A new object where the address was handed out again; the one before dies first, or after. */
static void replace_object(struct block *block, PyObject **ret_before) {
    *ret_before = block->object;
    if (below(2))
        Py_CLEAR(*ret_before);
    block->object = view_of(block, 0, block->length);
}

/* One change, and look-ups of what changed. */
void soak_change(PyObject *get, PyObject *evict_call) {
    struct block *block = claim();
    PyObject *before = NULL;
    bool stale;
    unsigned how = below(8);
    if (how == 0) {
        evict(evict_call, block);
        block->disturbed = true;
    } else if (how < 5 && change_there(block)) {
        replace_object(block, &before);
    } else {
        change_here(block);
    }
    stale = look(&blocks_account, get, block->object, block->start, block->length);
    if (stale) /* without its protection it would stay so */
        evict(evict_call, block);
    look(&blocks_account, get, block->object, block->start, block->length); /* now every page has a stamp */
    block->disturbed = block->busy = false;
    Py_XDECREF(before);
}

/* Those of a list of arrays, each by itself or, seldom, a view of it. */
void soak_arrays(PyObject *get, PyObject *list, unsigned count) {
    while (count-- && PyList_GET_SIZE(list)) {
        Py_buffer view;
        PyObject *array = Py_NewRef(PyList_GET_ITEM(list, below((uint32_t)PyList_GET_SIZE(list))));
        if (PyObject_GetBuffer(array, &view, PyBUF_SIMPLE) == 0) {
            look(&arrays_account, get, array, view.buf, (size_t)view.len);
            PyBuffer_Release(&view);
        } else {
            complain();
        }
        Py_DECREF(array);
    }
}

static PyObject *register_block(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    uint64_t address = PyLong_AsUnsignedLongLong(args[0]), length = PyLong_AsUnsignedLongLong(args[1]);
    struct block *block = block_at(address);
    (void)self, (void)count;
    uint64_t handle = note(&blocks_account, address, length);
    if (block->disturbed)
        disturb(block);
    return PyLong_FromUnsignedLongLong(handle);
}

static PyObject *deregister_block(PyObject *self, PyObject *handle) {
    (void)self;
    forget(PyLong_AsUnsignedLongLong(handle));
    Py_RETURN_NONE;
}

PyObject *soak_registrar(void) {
    static PyMethodDef register_def = {"register", (PyCFunction)(void (*)(void))register_block, METH_FASTCALL, NULL};
    static PyMethodDef deregister_def = {"deregister", deregister_block, METH_O, NULL};
    return Py_BuildValue("(NN)", PyCFunction_New(&register_def, NULL), PyCFunction_New(&deregister_def, NULL));
}

uint64_t soak_note_array(uint64_t address, uint64_t length) {
    return note(&arrays_account, address, length);
}

void soak_forget_array(uint64_t handle) {
    forget(handle);
}

struct account *soak_account(int of_arrays) {
    return of_arrays ? &arrays_account : &blocks_account;
}

const struct work *soak_work(void) {
    return &work;
}

const char *soak_violations(uint64_t *ret_count) {
    *ret_count = violations;
    return first_violation;
}

/* In a forked child nothing is registered or held, and whatever comes of the parent's part of the ledger is a mistake.
 */
void soak_in_child(void) {
    process = getpid();
    blocks_account.live = blocks_account.live_bytes = 0;
    for (unsigned i = 0; i < HELD; i++) {
        PyObject *registration = held[i].registration;
        held[i].registration = NULL;
        Py_XDECREF(registration);
    }
}

uint64_t soak_live_of(pid_t of) {
    uint64_t live = 0;
    for (unsigned i = 0; i < RECORDS; i++)
        live += records[i].handle && records[i].process == of;
    return live;
}

int soak_start(void) {
    process = getpid();
    pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    name_handle = PyUnicode_InternFromString("handle");
    if (!map_blocks())
        return -1;
    for (unsigned i = 0; i < BLOCKS; i++)
        blocks[i].object = view_of(&blocks[i], 0, blocks[i].length);
    return start_givers(aside(), STRIDE) ? 0 : -1;
}

void soak_let_go(void) {
    for (unsigned i = 0; i < HELD; i++)
        keep(i, NULL, 0);
}

void soak_stop(void) {
    stop_givers();
    for (unsigned i = 0; i < BLOCKS; i++)
        Py_CLEAR(blocks[i].object);
    unmap_blocks();
    close(pagemap);
}
