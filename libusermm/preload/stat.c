/* The names that ask whether a file is there and what it is. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "copy.h"
#include "native.h"
#include "paths.h"
#include "usermm.h"

#define NODE_MODE (S_IFCHR | 0666)
#define MISC_MAJOR 10 /* where both drivers registered */
#define BASE_MINOR 250

int __xstat(int version, const char *path, struct stat *ret_status);
int __xstat64(int version, const char *path, struct stat64 *ret_status);

/* Both structures are the same one on 64-bit machines. */
static int not_found(int directory, const char *path, void *ret_status, int number) {
    int abi = um_path_abi(directory, path);
    if (!abi) {
        errno = ENOENT;
        return -1;
    }
    struct stat status = {
        .st_mode = NODE_MODE,
        .st_nlink = 1,
        .st_ino = (ino_t)abi,
        .st_rdev = makedev(MISC_MAJOR, BASE_MINOR + (unsigned)abi),
        .st_blksize = 4096,
    };
    bool is_good = um_copy_out(ret_status, &status, sizeof status) == 0;
    errno = is_good ? number : EFAULT;
    return is_good ? 0 : -1;
}

#define STAT(native_call, directory)                                                                                   \
    int number = errno, result = native_call;                                                                          \
    return result < 0 && errno == ENOENT ? not_found(directory, path, ret_status, number) : result

UM_EXPORT int stat(const char *path, struct stat *ret_status) {
    STAT(UM_NATIVE(stat)(path, ret_status), AT_FDCWD);
}

UM_EXPORT int stat64(const char *path, struct stat64 *ret_status) {
    STAT(UM_NATIVE(stat64)(path, ret_status), AT_FDCWD);
}

UM_EXPORT int lstat(const char *path, struct stat *ret_status) {
    STAT(UM_NATIVE(lstat)(path, ret_status), AT_FDCWD);
}

UM_EXPORT int lstat64(const char *path, struct stat64 *ret_status) {
    STAT(UM_NATIVE(lstat64)(path, ret_status), AT_FDCWD);
}

UM_EXPORT int fstatat(int directory, const char *path, struct stat *ret_status, int flags) {
    STAT(UM_NATIVE(fstatat)(directory, path, ret_status, flags), directory);
}

UM_EXPORT int fstatat64(int directory, const char *path, struct stat64 *ret_status, int flags) {
    STAT(UM_NATIVE(fstatat64)(directory, path, ret_status, flags), directory);
}

/* stat(3) of programs that were built before glibc 2.33. */
UM_EXPORT int __xstat(int version, const char *path, struct stat *ret_status) {
    STAT(UM_NATIVE(__xstat)(version, path, ret_status), AT_FDCWD);
}

UM_EXPORT int __xstat64(int version, const char *path, struct stat64 *ret_status) {
    STAT(UM_NATIVE(__xstat64)(version, path, ret_status), AT_FDCWD);
}

UM_EXPORT int statx(int directory, const char *restrict path, int flags, unsigned mask,
                    struct statx *restrict ret_status) {
    int number = errno, result = UM_NATIVE(statx)(directory, path, flags, mask, ret_status);
    if (result == 0 || errno != ENOENT)
        return result;
    struct stat status;
    if (not_found(directory, path, &status, number))
        return -1;
    struct statx extended = {
        .stx_mask = STATX_TYPE | STATX_MODE | STATX_NLINK | STATX_INO,
        .stx_mode = (uint16_t)status.st_mode,
        .stx_nlink = 1,
        .stx_ino = status.st_ino,
        .stx_blksize = 4096,
        .stx_rdev_major = major(status.st_rdev),
        .stx_rdev_minor = minor(status.st_rdev),
    };
    bool is_good = um_copy_out(ret_status, &extended, sizeof extended) == 0;
    errno = is_good ? number : EFAULT;
    return is_good ? 0 : -1;
}

static int may_access(int directory, const char *path, int mode, int number) {
    bool is_allowed = um_path_abi(directory, path) && !(mode & X_OK);
    if (is_allowed)
        errno = number;
    else if (um_path_abi(directory, path))
        errno = EACCES;
    return is_allowed ? 0 : -1;
}

UM_EXPORT int access(const char *path, int mode) {
    int number = errno, result = UM_NATIVE(access)(path, mode);
    return result && errno == ENOENT ? may_access(AT_FDCWD, path, mode, number) : result;
}

UM_EXPORT int faccessat(int directory, const char *path, int mode, int flags) {
    int number = errno, result = UM_NATIVE(faccessat)(directory, path, mode, flags);
    return result && errno == ENOENT ? may_access(directory, path, mode, number) : result;
}
