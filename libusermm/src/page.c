/* The page that clients map to load the generation themselves. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>

#include "device.h"
#include "monitor.h"
#include "sys.h"

#define SEALS (F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x10 /* 5.1 */
#endif

/* Our own mapping comes before the seal, which makes every later one read-only for good. */
static int make_page(int *ret_fd, void **ret_page) {
    size_t size = (size_t)sysconf(_SC_PAGESIZE);
    int fd = um_fault("memfd_create") ? um_sys_fail(EMFILE)
                                      : memfd_create("usermm generation", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -errno;
    void *page = MAP_FAILED;
    if (ftruncate(fd, (off_t)size) == 0)
        page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page != MAP_FAILED && fcntl(fd, F_ADD_SEALS, SEALS) == 0) {
        *ret_fd = fd;
        *ret_page = page;
        return 0;
    }
    int number = errno;
    if (page != MAP_FAILED)
        munmap(page, size);
    close(fd);
    return -number;
}

/* Made for the first client that asks. Two at once both make one, and the later one throws its own away. */
static int ensure_page(usermm_device *device) {
    void *page = NULL;
    int fd = -1;
    sigset_t saved;
    if (device->page)
        return 0;
    int result = make_page(&fd, &page);
    if (result)
        return result;
    um_lock(&saved);
    bool mine = !device->page;
    if (mine) {
        device->page = page;
        device->page_fd = fd;
        atomic_store(device->page, atomic_load(&device->generation));
    }
    um_unlock(&saved);
    if (!mine) {
        munmap(page, (size_t)sysconf(_SC_PAGESIZE));
        close(fd);
    }
    return 0;
}

/* A copy, since another thread may shut the device down before the descriptor is used. */
static int duplicate_page_fd(usermm_device *device) {
    sigset_t saved;
    um_lock(&saved);
    int fd = fcntl(device->page_fd, F_DUPFD_CLOEXEC, 0);
    int result = fd < 0 ? -errno : fd;
    um_unlock(&saved);
    return result;
}

int usermm_map(usermm_device *device, size_t length, int prot, int flags, int64_t offset, void **ret_address) {
    int state = um_device_state(device);
    if (state)
        return state;
    if (offset != 0 || length == 0 || length > 4096)
        return -EINVAL;
    if (prot & PROT_WRITE && (flags & MAP_TYPE) != MAP_PRIVATE)
        return -EACCES; /* as for any file that is open for reading only */
    if (flags & MAP_ANONYMOUS)
        return -EINVAL; /* would be another page, whose generation never moves */
    state = ensure_page(device);
    int fd = state ? state : duplicate_page_fd(device);
    if (fd < 0)
        return fd;
    void *address = mmap(NULL, length, prot, flags, fd, 0);
    int number = errno;
    close(fd);
    if (address == MAP_FAILED)
        return -number;
    *ret_address = address;
    return 0;
}
