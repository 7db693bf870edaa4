/* The functions that the interposed names hide: the next ones in the loader's order, be they libc's or another
 * preload's. */
#ifndef UM_NATIVE_H
#define UM_NATIVE_H

#include <stdatomic.h>

#define UM_EXPORT __attribute__((visibility("default")))

/* docs/interposed-names.md has the reason for each. */
/* clang-format off */
#define UM_NAMES(X) \
    X(open) X(open64) X(openat) X(openat64) X(__open_2) X(__open64_2) \
    X(__openat_2) X(__openat64_2) X(fopen) X(fopen64) X(access) X(faccessat) \
    X(stat) X(stat64) X(lstat) X(lstat64) X(fstatat) X(fstatat64) \
    X(statx) X(__xstat) X(__xstat64) X(read) X(__read_chk) X(readv) \
    X(pread) X(pread64) X(ioctl) X(mmap) X(mmap64) X(close)
/* clang-format on */

#define UM_DECLARE_SLOT(name) extern _Atomic(void *) um_native_##name;
UM_NAMES(UM_DECLARE_SLOT)

/* For calls that come before this library's constructor has found them all. Ends the program if there is none. */
void *um_native_find(_Atomic(void *) *slot, const char *name);

#define UM_NATIVE(name)                                                                                                \
    ({                                                                                                                 \
        void *found = atomic_load_explicit(&um_native_##name, memory_order_relaxed);                                   \
        (__typeof__(&name))(found ? found : um_native_find(&um_native_##name, #name));                                 \
    })

#endif
