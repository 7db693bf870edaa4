/* usermm._core.Memory: reading, writing, words that two processes share, and taking pages back. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memory.h"
#include "pages.h"

/* A size or an offset; false with an exception. */
static bool to_size(PyObject *self, PyObject *object, const char *call, size_t limit, size_t *ret_size) {
    PyObject *number = PyNumber_Index(object);
    if (!number) {
        PyErr_Clear();
        um_memory_argument_error(self, true, "%s(%R): offsets and lengths are int", call, object);
        return false;
    }
    Py_ssize_t value = PyLong_AsSsize_t(number);
    Py_DECREF(number);
    if (value >= 0 && (size_t)value <= limit) {
        *ret_size = (size_t)value;
        return true;
    }
    PyErr_Clear();
    um_memory_argument_error(self, false, "%s(%R): the memory has %zu bytes: stay inside", call, object,
                             um_memory_of(self)->length);
    return false;
}

/* [offset, offset + length) inside the memory: all that follows, when `length` is left out. */
static bool to_range(PyObject *self, PyObject *const *args, Py_ssize_t count, const char *call, size_t *ret_offset,
                     size_t *ret_length) {
    size_t length = um_memory_of(self)->length;
    *ret_offset = 0;
    if (um_memory_refuse(um_memory_of(self), call))
        return false;
    if (count > 2) {
        um_memory_argument_error(self, true, "%s takes an offset and a length, not %zd arguments", call, count);
        return false;
    }
    if (count > 0 && !to_size(self, args[0], call, length, ret_offset))
        return false;
    *ret_length = length - *ret_offset;
    if (count == 2 && !to_size(self, args[1], call, *ret_length, ret_length))
        return false;
    return um_memory_refuse(um_memory_of(self), call) == 0; /* a number's __index__ is somebody's code */
}

PyObject *um_memory_fill(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct um_memory *memory = um_memory_of(self);
    size_t offset, rest, runs_count, total, mask = (size_t)sysconf(_SC_PAGESIZE) - 1;
    if (count != 2)
        return um_memory_argument_error(self, true, "fill takes an offset and runs, not %zd arguments", count);
    struct um_run *runs = um_memory_runs(um_state_of_type(Py_TYPE(self)), args[1], &runs_count, &total);
    if (!runs)
        return NULL;
    PyObject *answer = NULL;
    if (to_range(self, args, 1, "fill", &offset, &rest)) {
        int result = 0;
        if (total > rest || (offset & mask) || memory->whole)
            um_memory_argument_error(self, false, "fill(%zu): %zu bytes: whole pages inside a mapping of its own",
                                     offset, total);
        else if ((result = um_pages_fill(memory->address + offset, runs, runs_count, um_memory_mode(memory))))
            um_memory_map_error(self, result);
        else
            answer = Py_NewRef(Py_None);
    }
    PyMem_Free(runs);
    return answer;
}

PyObject *um_memory_detach(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct um_memory *memory = um_memory_of(self);
    size_t offset, length, mask = (size_t)sysconf(_SC_PAGESIZE) - 1;
    int result = 0;
    if (count != 3 || !PyLong_Check(args[2]))
        return um_memory_argument_error(self, true, "detach takes an offset, a length and a descriptor");
    long fd = PyLong_AsLong(args[2]);
    if ((fd == -1 && PyErr_Occurred()) || !to_range(self, args, 2, "detach", &offset, &length))
        return NULL;
    if ((offset | length) & mask)
        return um_memory_argument_error(self, false, "detach(%zu, %zu): pass whole pages", offset, length);
    memory->exports++;
    Py_BEGIN_ALLOW_THREADS
    if (length)
        result = um_pages_detach(memory->address + offset, length, PROT_READ | (memory->writable ? PROT_WRITE : 0),
                                 memory->inherit, (int)fd);
    Py_END_ALLOW_THREADS
    memory->exports--;
    if (result)
        return um_memory_error(self, result, "detach", "nothing was changed: free memory or mappings");
    Py_RETURN_NONE;
}

/* Lets the interpreter's lock go for what takes long. */
static int transfer(struct um_memory *memory, bool write, size_t offset, void *buffer, size_t length) {
    int result;
    char *at = memory->address + offset;
    if (length < UM_LONG_BYTES)
        return write ? um_pages_write(at, buffer, length) : um_pages_read(at, buffer, length);
    memory->exports++;
    Py_BEGIN_ALLOW_THREADS
    result = write ? um_pages_write(at, buffer, length) : um_pages_read(at, buffer, length);
    Py_END_ALLOW_THREADS
    memory->exports--;
    return result;
}

PyObject *um_memory_read(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    size_t offset, length;
    if (!to_range(self, args, count, "read", &offset, &length))
        return NULL;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    if (!bytes)
        return NULL;
    int result = transfer(um_memory_of(self), false, offset, PyBytes_AsString(bytes), length);
    if (result == 0)
        return bytes;
    Py_DECREF(bytes);
    return um_memory_error(self, result, "read", "a page of it is gone: somebody unmapped it, or its file is shorter");
}

PyObject *um_memory_write(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct um_memory *memory = um_memory_of(self);
    size_t offset;
    Py_buffer data;
    if (um_memory_refuse(memory, "write"))
        return NULL;
    if (count != 2)
        return um_memory_argument_error(self, true, "write takes an offset and a buffer, not %zd arguments", count);
    if (!memory->writable)
        return um_memory_argument_error(self, false, "write: the memory is read-only");
    if (!to_size(self, args[0], "write", memory->length, &offset) || PyObject_GetBuffer(args[1], &data, PyBUF_SIMPLE))
        return NULL;
    PyObject *answer = NULL;
    if (um_memory_refuse(memory, "write") == 0) { /* the buffer's owner is somebody's code */
        size_t length = (size_t)data.len;
        int result = length > memory->length - offset ? -ERANGE : transfer(memory, true, offset, data.buf, length);
        if (result == -ERANGE)
            um_memory_argument_error(self, false, "write(%zu): %zu bytes do not fit in %zu", offset, length,
                                     memory->length);
        else if (result)
            um_memory_error(self, result, "write",
                            "a page of it is gone: somebody unmapped it, or its file is shorter");
        else
            answer = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&data);
    return answer;
}

/* The u32 at an offset. NULL with an exception. */
static uint32_t *word_at(PyObject *self, PyObject *const *args, Py_ssize_t count, Py_ssize_t wanted, const char *call) {
    struct um_memory *memory = um_memory_of(self);
    size_t offset;
    if (um_memory_refuse(memory, call))
        return NULL;
    if (count != wanted) {
        um_memory_argument_error(self, true, "%s takes %zd arguments, not %zd", call, wanted, count);
        return NULL;
    }
    if (!to_size(self, args[0], call, memory->length < 4 ? 0 : memory->length - 4, &offset))
        return NULL;
    if (offset % 4 || memory->length < 4) {
        um_memory_argument_error(self, false, "%s(%zu): pass a multiple of 4", call, offset);
        return NULL;
    }
    if (wanted == 2 && !memory->writable) {
        um_memory_argument_error(self, false, "%s(%zu): the memory is read-only", call, offset);
        return NULL;
    }
    if (um_memory_refuse(memory, call)) /* the offset's __index__ is somebody's code */
        return NULL;
    return (uint32_t *)(void *)(memory->address + offset);
}

/* A value of -2^31 to 2^32-1 for a word; `is_signed` says whether it may be negative. False with an exception. */
static bool to_word(PyObject *self, PyObject *object, const char *call, bool is_signed, uint32_t *ret_value) {
    int overflow = 0;
    long long value = PyLong_Check(object) ? PyLong_AsLongLongAndOverflow(object, &overflow) : -1;
    if (!PyLong_Check(object)) {
        um_memory_argument_error(self, true, "%s(%R): the value is an int", call, object);
        return false;
    }
    if (overflow || value > UINT32_MAX || value < (is_signed ? INT32_MIN : 0)) {
        um_memory_argument_error(self, false, "%s(%R): the value has 32 bits", call, object);
        return false;
    }
    *ret_value = (uint32_t)value;
    return true;
}

PyObject *um_memory_load(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    uint32_t *word = word_at(self, args, count, 1, "load");
    return word ? PyLong_FromUnsignedLong(__atomic_load_n(word, __ATOMIC_ACQUIRE)) : NULL;
}

PyObject *um_memory_store(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    uint32_t value, *word = word_at(self, args, count, 2, "store");
    if (!word || !to_word(self, args[1], "store", false, &value))
        return NULL;
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    Py_RETURN_NONE;
}

PyObject *um_memory_exchange(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    uint32_t value, *word = word_at(self, args, count, 2, "exchange");
    if (!word || !to_word(self, args[1], "exchange", false, &value))
        return NULL;
    return PyLong_FromUnsignedLong(__atomic_exchange_n(word, value, __ATOMIC_SEQ_CST));
}

PyObject *um_memory_add(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    uint32_t value, *word = word_at(self, args, count, 2, "add");
    if (!word || !to_word(self, args[1], "add", true, &value))
        return NULL;
    return PyLong_FromUnsignedLong(__atomic_add_fetch(word, value, __ATOMIC_SEQ_CST));
}

PyObject *um_memory_fence(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}
