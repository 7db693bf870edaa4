/* The functions that the interposed names hide: the next ones in the loader's order, be they libc's or another
 * preload's. */
#ifndef UM_NATIVE_H
#define UM_NATIVE_H

#include <stdatomic.h>

#define UM_EXPORT __attribute__((visibility("default")))

/* Found at the first use, which can be before this library's constructor. Ends the program if there is none. */
void *um_native_find(_Atomic(void *) *slot, const char *name);

#define UM_NATIVE(name)                                                                                                \
    ({                                                                                                                 \
        static _Atomic(void *) slot;                                                                                   \
        void *found = atomic_load_explicit(&slot, memory_order_relaxed);                                               \
        (__typeof__(&name))(found ? found : um_native_find(&slot, #name));                                             \
    })

#endif
