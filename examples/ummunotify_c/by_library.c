/* The same as by_device.c, by <usermm.h>: no device node, no `usermm run`. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include <usermm.h>

#include "watch.h"

static usermm_device *device;
static uint64_t seen; /* the generation up to which all events have been read */

int watch_open(void) {
    int result = usermm_open(USERMM_ABI_UMMUNOTIFY, O_RDONLY, &device);
    if (result)
        fprintf(stderr, "usermm_open: %s; `usermm doctor` says what is missing\n", strerror(-result));
    return result;
}

void watch_close(void) {
    usermm_close(device);
}

int watch_add(uint64_t start, uint64_t end, uint64_t cookie) {
    return usermm_register(device, start, end, cookie, USERMM_REFUSE_HOLES | USERMM_REFUSE_FILES);
}

void watch_remove(uint64_t cookie) {
    usermm_unregister(device, cookie);
}

/* The probe waits for an unmapping that another thread is in the middle of, which a load cannot see. */
bool watch_changed(void) {
    return usermm_check(device, seen, USERMM_PROBE_WAIT) != 1;
}

int watch_drain(void (*lost)(uint64_t cookie)) {
    struct usermm_event events[128];
    ssize_t size;
    while ((size = usermm_read(device, events, sizeof events)) > 0)
        for (size_t i = 0; i < (size_t)size / sizeof *events; i++)
            if (events[i].type == USERMM_EVENT_LAST)
                seen = events[i].user_cookie_counter;
            else
                lost(events[i].user_cookie_counter);
    return size == -EAGAIN ? 0 : (int)size;
}
