#define _GNU_SOURCE
#include "native.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DEFINE_SLOT(name) _Atomic(void *) um_native_##name;
UM_NAMES(DEFINE_SLOT)

void *um_native_find(_Atomic(void *) *slot, const char *name) {
    static const char message[] = "libusermm-preload: no next function of this name in any library: ";
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) {
        if (write(STDERR_FILENO, message, sizeof message - 1) < 0 || write(STDERR_FILENO, name, strlen(name)) < 0)
            abort();
        abort();
    }
    atomic_store_explicit(slot, found, memory_order_relaxed);
    return found;
}

/* Not at first use: dlsym takes the loader's lock, and a thread that a library's constructor waits for may read. */
__attribute__((constructor)) static void find_all(void) {
#define FIND(name)                                                                                                     \
    if (!atomic_load(&um_native_##name))                                                                               \
        atomic_store(&um_native_##name, dlsym(RTLD_NEXT, #name));
    UM_NAMES(FIND)
}
