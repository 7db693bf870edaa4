/*
 * The names that open files. The native call comes first, so a real device node is used where there is one, and other
 * files cost nothing: only what was not found is compared with the devices' paths.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "client.h"
#include "guard.h"
#include "native.h"
#include "paths.h"
#include "trace.h"

int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);
int __openat_2(int directory, const char *path, int flags);
int __openat64_2(int directory, const char *path, int flags);

/* What to return for a native open that did not find the path. */
static int not_found(int directory, const char *path, int flags, int number, void *site) {
    int abi = um_path_abi(directory, path);
    if (!abi || um_guard_is_inside() || um_is_vfork_child()) {
        errno = ENOENT;
        return -1;
    }
    int result = (flags & (O_CREAT | O_EXCL)) == (O_CREAT | O_EXCL) ? -EEXIST
                 : flags & O_DIRECTORY                              ? -ENOTDIR
                                                                    : um_client_open(abi, flags);
    if (um_trace_is_on())
        um_trace_open(path, abi, flags, result, site);
    errno = result < 0 ? -result : number;
    return result < 0 ? -1 : result;
}

#define MODE_OF(flags)                                                                                                 \
    ({                                                                                                                 \
        mode_t mode = 0;                                                                                               \
        if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {                                                     \
            va_list arguments;                                                                                         \
            va_start(arguments, flags);                                                                                \
            mode = va_arg(arguments, mode_t);                                                                          \
            va_end(arguments);                                                                                         \
        }                                                                                                              \
        mode;                                                                                                          \
    })

#define OPEN(native_call, directory)                                                                                   \
    int number = errno;                                                                                                \
    int fd = flags & O_CREAT && um_path_is_missing(directory, path) ? -1 : native_call;                                \
    return fd < 0 && errno == ENOENT ? not_found(directory, path, flags, number, __builtin_return_address(0)) : fd

UM_EXPORT int open(const char *path, int flags, ...) {
    OPEN(UM_NATIVE(open)(path, flags, MODE_OF(flags)), AT_FDCWD);
}

UM_EXPORT int open64(const char *path, int flags, ...) {
    OPEN(UM_NATIVE(open64)(path, flags, MODE_OF(flags)), AT_FDCWD);
}

UM_EXPORT int openat(int directory, const char *path, int flags, ...) {
    OPEN(UM_NATIVE(openat)(directory, path, flags, MODE_OF(flags)), directory);
}

UM_EXPORT int openat64(int directory, const char *path, int flags, ...) {
    OPEN(UM_NATIVE(openat64)(directory, path, flags, MODE_OF(flags)), directory);
}

UM_EXPORT int __open_2(const char *path, int flags) {
    OPEN(UM_NATIVE(__open_2)(path, flags), AT_FDCWD);
}

UM_EXPORT int __open64_2(const char *path, int flags) {
    OPEN(UM_NATIVE(__open64_2)(path, flags), AT_FDCWD);
}

UM_EXPORT int __openat_2(int directory, const char *path, int flags) {
    OPEN(UM_NATIVE(__openat_2)(directory, path, flags), directory);
}

UM_EXPORT int __openat64_2(int directory, const char *path, int flags) {
    OPEN(UM_NATIVE(__openat64_2)(directory, path, flags), directory);
}
