/* Waiting until there is something to read: as poll does, or as a driver's read does. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>

#include "device.h"
#include "monitor.h"
#include "sys.h"

#define WAIT_SLICE_MS 1000

/* Enters or leaves the poll; the last one out after a shutdown closes the read end. */
static int count_waiter(usermm_device *device, int change) {
    sigset_t saved;
    um_lock(&saved);
    device->waiters += (unsigned)change;
    int fd = device->ready_fd;
    bool close_it = change < 0 && device->waiters == 0 && device->signal_fd < 0;
    if (close_it)
        device->ready_fd = -1;
    um_unlock(&saved);
    if (close_it && fd >= 0)
        close(fd);
    return fd;
}

/*
 * In slices: when the descriptors were lost, nothing that this thread sleeps on will ever be written to. 1 readable, 0
 * not in time, -EBADF the descriptor is gone: shut down, or closed behind the device.
 */
static int poll_in_slices(const usermm_device *device, int fd, int timeout_ms) {
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    for (int left_ms = timeout_ms;;) {
        int slice_ms = left_ms < 0 || left_ms > WAIT_SLICE_MS ? WAIT_SLICE_MS : left_ms;
        int count = fd < 0 ? um_sys_fail(EBADF) : um_sys_poll(&ready, 1, slice_ms);
        if (count < 0)
            return -errno;
        if (ready.revents & ~POLLIN)
            return -EBADF;
        left_ms -= timeout_ms < 0 ? 0 : slice_ms;
        if (count > 0 || left_ms == 0 || um_device_state(device))
            return count > 0;
    }
}

int usermm_wait(usermm_device *device, int timeout_ms) {
    int state = um_device_state(device);
    if (state)
        return state;
    int result = poll_in_slices(device, count_waiter(device, 1), timeout_ms);
    count_waiter(device, -1);
    state = um_device_state(device);
    if (state)
        return state;
    return result == -EBADF ? um_lost(device, result) : result;
}

uint32_t um_device_wakeups(usermm_device *device) {
    return atomic_load(&device->wakeups);
}

void um_device_wake(usermm_device *device) {
    atomic_fetch_add(&device->wakeups, 1);
    if (atomic_load(&device->has_sleepers))
        syscall(SYS_futex, &device->wakeups, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* The kernel restarts it after a handler with SA_RESTART, as it does a device's read, and unlike poll. */
int um_device_sleep(usermm_device *device, uint32_t wakeups) {
    atomic_store(&device->has_sleepers, true);
    long result = syscall(SYS_futex, &device->wakeups, FUTEX_WAIT_PRIVATE, wakeups, NULL, NULL, 0);
    return result && errno == EINTR ? -EINTR : 0;
}
