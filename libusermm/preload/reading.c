#define _GNU_SOURCE
#include "reading.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <unistd.h>

#include "client.h"
#include "guard.h"
#include "copy.h"
#include "device.h"
#include "trace.h"

/* A capacity, or -EFAULT: the array itself is bad, or a sum that the kernel refuses: -EINVAL. */
static ssize_t total_size(const struct iovec *parts, int count) {
    size_t total = 0;
    if (count < 0 || count > IOV_MAX)
        return -EINVAL;
    for (int i = 0; i < count; i++) {
        struct iovec part;
        if (um_copy_in(&part, (void *)&parts[i], sizeof part))
            return -EFAULT;
        if (part.iov_len > SSIZE_MAX - total)
            return count == 1 ? SSIZE_MAX : -EINVAL;
        total += part.iov_len;
    }
    return (ssize_t)total;
}

static int scatter(const struct iovec *parts, int count, const char *data, size_t size) {
    for (int i = 0; i < count && size; i++) {
        size_t share = parts[i].iov_len < size ? parts[i].iov_len : size;
        if (um_copy_out(parts[i].iov_base, data, share))
            return -EFAULT;
        data += share;
        size -= share;
    }
    return 0;
}

/* A page of stack more, which a signal's handler on a small one cannot spare. */
static __attribute__((noinline)) ssize_t read_and_scatter(usermm_device *device, const struct iovec *parts, int count,
                                                          size_t size, void *site) {
    struct usermm_event events[UM_EVENTS_PER_READ];
    ssize_t done = usermm_read(device, events, size);
    if (done > 0 && scatter(parts, count, (const char *)events, (size_t)done))
        done = -EFAULT;
    if (um_trace_is_on())
        um_trace_read(device, size, done, events, site);
    return done;
}

static ssize_t read_once(usermm_device *device, const struct iovec *parts, int count, void *site) {
    ssize_t size = total_size(parts, count);
    if (size < 0)
        return size;
    if (count == 1 && !um_trace_is_on())
        return usermm_read(device, parts->iov_base, (size_t)size);
    return read_and_scatter(device, parts, count, (size_t)size, site);
}

static void drop(void *client) {
    um_client_drop(client);
}

/* Asynchronous for the one system call, as libc does it in its own cancellation points; the holder is given back. */
static int sleep_cancelably(struct um_client *client, uint32_t wakeups) {
    int result, type;
    pthread_cleanup_push(drop, client);
    pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &type);
    result = um_device_sleep(client->device, wakeups);
    pthread_setcanceltype(type, NULL);
    pthread_cleanup_pop(0);
    return result;
}

/* Asked again when it matters: the number may have been closed and be another file's by now, which has other flags. */
static bool is_blocking(const struct um_client *client, int fd) {
    int flags = fcntl(fd, F_GETFL);
    return flags >= 0 && !(flags & O_NONBLOCK) && um_client_has(client, fd);
}

static ssize_t read_device(struct um_client *client, int fd, const struct iovec *parts, int count, void *site) {
    for (bool blocking = false;; blocking = true) {
        struct um_guard guard;
        uint32_t wakeups = um_device_wakeups(client->device);
        um_guard_enter(&guard);
        ssize_t done = read_once(client->device, parts, count, site);
        um_guard_leave(&guard);
        if (done != -EAGAIN || !(blocking || is_blocking(client, fd)))
            return done;
        int result = sleep_cancelably(client, wakeups);
        if (result)
            return result;
    }
}

bool um_read_device(int fd, const struct iovec *parts, int count, ssize_t taken, ssize_t *ret_done, void *site) {
    int number = errno;
    if (taken == 0)
        pthread_testcancel();
    struct um_client *client = um_client_hold(fd);
    if (!client)
        return false;
    if (taken > 0)
        um_device_rearm(client->device);
    ssize_t done = read_device(client, fd, parts, count, site);
    um_client_drop(client);
    errno = done < 0 ? (int)-done : number;
    *ret_done = done < 0 ? -1 : done;
    return true;
}
