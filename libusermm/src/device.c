#define _GNU_SOURCE
#include "device.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include "gate.h"
#include "monitor.h"
#include "page.h"
#include "sys.h"

#define SHUT_DOWN UINT64_MAX
#define REGIONS_PER_LOCK 64

bool um_device_is_inherited(const usermm_device *device) {
    return device->life != atomic_load(&um_monitor.page->life);
}

int um_device_state(const usermm_device *device) {
    if (atomic_load(&device->epoch) == atomic_load(&um_monitor.page->epoch))
        return 0;
    if (atomic_load(&device->epoch) == SHUT_DOWN) /* loaded anew: the last shutdown ends the monitor's epoch, too */
        return -EBADF;
    return um_device_is_inherited(device) ? -ECHILD : -EIO;
}

bool um_device_has(const usermm_device *device, int fd) {
#ifdef USERMM_PRELOAD /* elsewhere whoever closes others' descriptors is part of the same program */
    struct stat found;
    return fd >= 0 && fstat(fd, &found) == 0 && found.st_ino == device->pipe && found.st_dev == device->pipes;
#else
    (void)device;
    return fd >= 0;
#endif
}

static int make_pipe(usermm_device *device) {
    int fds[2];
    struct stat found;
    if (um_fault("pipe2") ? um_sys_fail(EMFILE) : pipe2(fds, O_CLOEXEC | O_NONBLOCK))
        return -errno;
    device->ready_fd = um_sys_out_of_the_way(fds[0]);
    device->signal_fd = um_sys_out_of_the_way(fds[1]);
    if (fstat(device->ready_fd, &found) == 0) {
        device->pipe = found.st_ino;
        device->pipes = found.st_dev;
    }
    return 0;
}

static void free_device(usermm_device *device) {
    int fds[] = {device->ready_fd, device->signal_fd};
    for (int i = 0; i < 2; i++)
        if (um_device_has(device, fds[i]))
            close(fds[i]);
    um_sys_free(device, sizeof *device);
}

int usermm_open(int abi, int flags, usermm_device **ret_device) {
    if ((abi != USERMM_ABI_UMMUNOT && abi != USERMM_ABI_UMMUNOTIFY) || (flags & O_ACCMODE) != O_RDONLY)
        return -EINVAL;
    usermm_device *device = um_sys_alloc(sizeof *device);
    if (!device)
        return -ENOMEM;
    device->abi = abi;
    device->flags = flags;
    device->ready_fd = device->signal_fd = device->page_fd = -1;
    int result = make_pipe(device);
    if (result == 0)
        result = um_monitor_join(device);
    if (result) {
        free_device(device);
        return result;
    }
    *ret_device = device;
    return 0;
}

/* Takes up to REGIONS_PER_LOCK regions off, so that the reader never waits long for a device with a million of them. */
static bool free_some_regions(usermm_device *device) {
    struct um_region *gone[REGIONS_PER_LOCK];
    unsigned count = 0;
    sigset_t saved;
    um_lock(&saved);
    while (count < REGIONS_PER_LOCK && device->cookies) {
        struct um_region *region = um_region_of_cookie(device->cookies);
        um_queue_remove(region);
        gone[count++] = region;
    }
    um_unlock(&saved);
    for (unsigned i = 0; i < count; i++)
        um_sys_free(gone[i], sizeof *gone[i]);
    return count != 0;
}

/* The write end goes at once, which wakes who polls, after a byte for those whose poll a forked child's copy would keep
 * asleep; the read end when the last of them has left. */
static void close_pipe(usermm_device *device) {
    sigset_t saved;
    um_lock(&saved);
    bool inherited = um_device_is_inherited(device);
    if (inherited)
        device->waiters = 0; /* they wait in the parent */
    int ready_fd = device->ready_fd;
    int fds[] = {device->signal_fd, device->waiters ? -1 : ready_fd};
    device->signal_fd = -1;
    if (!device->waiters)
        device->ready_fd = -1;
    bool lost = um_monitor.descriptors_lost && !inherited;
    /* Without a reader a write would raise SIGPIPE. */
    if (!lost && !inherited && um_device_has(device, fds[0]) && um_device_has(device, ready_fd) &&
        write(fds[0], UM_MARK, 1) < 0)
        errno = 0; /* full: it polls readable already */
    um_unlock(&saved);
    for (int i = 0; i < 2; i++)
        if (!lost && um_device_has(device, fds[i]))
            close(fds[i]);
}

void usermm_shutdown(usermm_device *device) {
    bool inherited = um_device_is_inherited(device);
    if (atomic_exchange(&device->epoch, SHUT_DOWN) == SHUT_DOWN)
        return;
    if (!inherited)
        um_settle(); /* what has happened is still counted, in the page, too */
    while (!inherited && free_some_regions(device))
        ;
    close_pipe(device);
    um_device_wake(device);
    if (!inherited)
        um_monitor_leave(device);
    else if (device->page_fd >= 0)
        close(device->page_fd);
}

void usermm_close(usermm_device *device) {
    usermm_shutdown(device);
    um_page_free(device);
    free_device(device);
}

int usermm_fileno(usermm_device *device) {
    int state = um_device_state(device), fd = device->ready_fd;
    if (state == -ECHILD || state == -EBADF)
        return state;
    return fd < 0 ? -EBADF : fd; /* negative: shut down between the two looks */
}

int usermm_flags(const usermm_device *device) {
    return device->flags;
}
