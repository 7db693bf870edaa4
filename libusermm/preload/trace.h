/* USERMM_TRACE=FILE: every call of the ABI and every notification as a line of JSON. */
#ifndef UM_TRACE_H
#define UM_TRACE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "usermm.h"

extern atomic_bool um_tracing;

static inline bool um_trace_is_on(void) {
    return __builtin_expect(atomic_load_explicit(&um_tracing, memory_order_relaxed), 0);
}

/* Looks at the environment, at the first device. */
void um_trace_start(void);

/* `site` is the return address of the program's call. */
void um_trace_open(const char *path, int abi, int flags, int result, void *site);
void um_trace_ioctl(usermm_device *device, unsigned long request, void *argument, int result, void *site);
void um_trace_read(usermm_device *device, size_t size, ssize_t result, const struct usermm_event *events, void *site);
void um_trace_mmap(usermm_device *device, size_t length, int result, void *address, void *site);
void um_trace_close(usermm_device *device);

#endif
