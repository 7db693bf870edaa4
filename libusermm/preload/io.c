/* The names that use a descriptor: what is a device's goes to the device, the rest is native, with errno untouched. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "client.h"
#include "guard.h"
#include "device.h"
#include "monitor.h"
#include "native.h"
#include "page.h"
#include "reading.h"
#include "sys.h"
#include "trace.h"

#define ABI_TYPE 'U' /* of all ioctls of both versions; USB's are of it, too, and are told apart by the descriptor */
#define REUSE_WAIT_NS 1000000000 /* whoever waits holds nothing that the monitor needs */

ssize_t __read_chk(int fd, void *buffer, size_t size, size_t buffer_size);

static long returned(long result) {
    if (result >= 0)
        return result;
    errno = (int)-result;
    return -1;
}

/*
 * A native read of a device's pipe, by a descriptor that nobody told us of, finds marks or nothing. Finding nothing is
 * the device's own answer, unless the monitor was about to write a mark when the read began. Then the descriptor is
 * asked for. For everything else this is two comparisons.
 */
static inline bool monitor_is_busy(void) {
    return atomic_load(&um_monitor.page->in_flight) & 1;
}

/* No number can be a device's: then a call goes straight on. */
static inline bool there_is_none(void) {
    return __builtin_expect(atomic_load_explicit(&um_clients, memory_order_relaxed) == 0, 1);
}

static inline bool is_suspicious(ssize_t done, const void *buffer, size_t size, bool was_busy) {
    if (done > 0)
        return *(const unsigned char *)buffer == (unsigned char)UM_MARK[0];
    return done < 0 ? errno == EFAULT || (was_busy && errno == EAGAIN) : size == 0;
}

#define SITE __builtin_return_address(0)

static __attribute__((noinline)) ssize_t read_part(int fd, void *buffer, size_t size, void *site) {
    const struct iovec part = {buffer, size};
    ssize_t done;
    if (um_client_is_known(fd) && um_read_device(fd, &part, 1, 0, &done, site))
        return done;
    bool was_busy = monitor_is_busy();
    done = UM_NATIVE(read)(fd, buffer, size);
    if (is_suspicious(done, buffer, size, was_busy))
        um_read_device(fd, &part, 1, done, &done, site);
    return done;
}

UM_EXPORT ssize_t read(int fd, void *buffer, size_t size) {
    return there_is_none() ? UM_NATIVE(read)(fd, buffer, size) : read_part(fd, buffer, size, SITE);
}

UM_EXPORT ssize_t __read_chk(int fd, void *buffer, size_t size, size_t buffer_size) {
    if (size > buffer_size || there_is_none())
        return UM_NATIVE(__read_chk)(fd, buffer, size, buffer_size); /* the former ends the program */
    return read_part(fd, buffer, size, SITE);
}

static const void *first_byte(const struct iovec *parts, int count) {
    for (int i = 0; i < count; i++)
        if (parts[i].iov_len)
            return parts[i].iov_base;
    return NULL;
}

UM_EXPORT ssize_t readv(int fd, const struct iovec *parts, int count) {
    ssize_t done;
    if (there_is_none())
        return UM_NATIVE(readv)(fd, parts, count);
    if (um_client_is_known(fd) && um_read_device(fd, parts, count, 0, &done, SITE))
        return done;
    bool was_busy = monitor_is_busy();
    done = UM_NATIVE(readv)(fd, parts, count);
    if (is_suspicious(done, done > 0 ? first_byte(parts, count) : NULL, 0, was_busy))
        um_read_device(fd, parts, count, done, &done, SITE);
    return done;
}

/* A pipe has no offsets, a device ignores them. */
static inline bool is_pipe_error(ssize_t done) {
    return done < 0 && errno == ESPIPE && !there_is_none();
}

UM_EXPORT ssize_t pread(int fd, void *buffer, size_t size, off_t offset) {
    ssize_t done = UM_NATIVE(pread)(fd, buffer, size, offset);
    if (is_pipe_error(done))
        um_read_device(fd, &(struct iovec){buffer, size}, 1, 0, &done, SITE);
    return done;
}

UM_EXPORT ssize_t pread64(int fd, void *buffer, size_t size, off64_t offset) {
    ssize_t done = UM_NATIVE(pread64)(fd, buffer, size, offset);
    if (is_pipe_error(done))
        um_read_device(fd, &(struct iovec){buffer, size}, 1, 0, &done, SITE);
    return done;
}

static bool ioctl_device(int fd, unsigned long request, void *argument, int *ret_result, void *site) {
    struct um_client *client = um_client_hold(fd);
    if (!client)
        return false;
    struct um_guard guard;
    um_guard_enter(&guard);
    int result = usermm_ioctl(client->device, request, argument);
    if (um_trace_is_on())
        um_trace_ioctl(client->device, request, argument, result, site);
    um_client_drop(client);
    um_guard_leave(&guard);
    *ret_result = (int)returned(result);
    return true;
}

UM_EXPORT int ioctl(int fd, unsigned long request, ...) {
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    int result;
    if (_IOC_TYPE(request) == ABI_TYPE && !there_is_none() &&
        ioctl_device(fd, (unsigned)request, argument, &result, SITE))
        return result;
    return UM_NATIVE(ioctl)(fd, request, argument);
}

static void *map_device(void *address, size_t length, int prot, int flags, int fd, off_t offset, int number,
                        void *site) {
    struct um_client *client = um_client_hold(fd);
    if (!client) {
        errno = ENODEV;
        return MAP_FAILED;
    }
    struct um_guard guard;
    void *found = MAP_FAILED;
    um_guard_enter(&guard);
    int result = um_page_map(client->device, address, length, prot, flags, offset, &found);
    if (um_trace_is_on())
        um_trace_mmap(client->device, length, result, found, site);
    um_client_drop(client);
    um_guard_leave(&guard);
    errno = result ? -result : number;
    return found;
}

/* What the kernel refuses of a pipe as it would of the device: writing, an odd offset. */
static void trace_refused(int fd, size_t length, void *site) {
    int number = errno;
    struct um_client *client = um_client_hold(fd);
    if (client) {
        um_trace_mmap(client->device, length, -number, NULL, site);
        um_client_drop(client);
    }
    errno = number;
}

/*
 * An address that another thread is still unmapping can be handed out again before the monitor knows. Programs that
 * only load the generation cannot ask, so they get the address when it is known.
 */
static void *mapped(void *found, int number, void *address, size_t length, int prot, int flags, int fd, off_t offset,
                    void *site) {
    if (there_is_none() || um_guard_is_inside())
        return found;
    if (found == MAP_FAILED && errno == ENODEV)
        return map_device(address, length, prot, flags, fd, offset, number, site);
    if (found == MAP_FAILED) {
        if (um_trace_is_on())
            trace_refused(fd, length, site);
        return found;
    }
    um_quiet_soon((uintptr_t)found, (uintptr_t)found + length + um_page_size() - 1, REUSE_WAIT_NS);
    errno = number;
    return found;
}

UM_EXPORT void *mmap(void *address, size_t length, int prot, int flags, int fd, off_t offset) {
    int number = errno;
    void *found = UM_NATIVE(mmap)(address, length, prot, flags, fd, offset);
    return mapped(found, number, address, length, prot, flags, fd, offset, SITE);
}

UM_EXPORT void *mmap64(void *address, size_t length, int prot, int flags, int fd, off64_t offset) {
    int number = errno;
    void *found = UM_NATIVE(mmap64)(address, length, prot, flags, fd, offset);
    return mapped(found, number, address, length, prot, flags, fd, offset, SITE);
}

/* Copies of a device's descriptor have numbers that nobody told us of, so while there is a device every close asks. */
UM_EXPORT int close(int fd) {
    if (there_is_none() || um_guard_is_inside() || um_is_vfork_child())
        return UM_NATIVE(close)(fd);
    return um_client_close(fd);
}
