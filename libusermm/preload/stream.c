/* fopen of a device. libc reads its own streams past us, so the stream reads by our read, as a cookie of fopencookie.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "client.h"
#include "guard.h"
#include "native.h"
#include "paths.h"
#include "trace.h"

#define IS_FILE_BUFFER 0x2000 /* glibc's _IO_IS_FILEBUF: fileno(3) answers for such streams only */

static ssize_t stream_read(void *cookie, char *buffer, size_t size) {
    return read((int)(intptr_t)cookie, buffer, size);
}

static int stream_close(void *cookie) {
    return close((int)(intptr_t)cookie);
}

/* r, with any of b, c, e, m: others would write. */
static int flags_of(const char *mode) {
    if (mode[0] != 'r' || strchr(mode, '+'))
        return O_RDWR;
    return O_RDONLY | (strchr(mode, 'e') ? O_CLOEXEC : 0);
}

static FILE *not_found(const char *path, const char *mode, int number, void *site) {
    int abi = um_path_abi(AT_FDCWD, path);
    if (!abi || um_guard_is_inside() || um_is_vfork_child()) {
        errno = ENOENT;
        return NULL;
    }
    int flags = flags_of(mode), fd = um_client_open(abi, flags);
    if (um_trace_is_on())
        um_trace_open(path, abi, flags, fd, site);
    if (fd < 0) {
        errno = -fd;
        return NULL;
    }
    cookie_io_functions_t functions = {.read = stream_read, .close = stream_close};
    FILE *stream = fopencookie((void *)(intptr_t)fd, "r", functions);
    if (!stream) {
        close(fd);
        errno = ENOMEM;
        return NULL;
    }
    stream->_fileno = fd;
    stream->_flags |= IS_FILE_BUFFER;
    errno = number;
    return stream;
}

/* Modes of w and a would make a file. */
#define OPEN(function)                                                                                                 \
    int number = errno;                                                                                                \
    FILE *stream = *mode != 'r' && um_path_is_missing(AT_FDCWD, path) ? NULL : UM_NATIVE(function)(path, mode);        \
    return !stream && errno == ENOENT ? not_found(path, mode, number, __builtin_return_address(0)) : stream

UM_EXPORT FILE *fopen(const char *path, const char *mode) {
    OPEN(fopen);
}

UM_EXPORT FILE *fopen64(const char *path, const char *mode) {
    OPEN(fopen64);
}
