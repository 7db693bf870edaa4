/* The page that clients map to load the generation themselves. */
#define _GNU_SOURCE
#include "page.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>

#include "device.h"
#include "gate.h"
#include "monitor.h"
#include "sys.h"

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000 /* 4.17 */
#endif

/* Two pages: gate.c says why. */
static int make_page(int *ret_fd, void **ret_page) {
    size_t size = 2 * um_page_size();
    int fd =
        um_fault("memfd_create") ? um_sys_fail(EMFILE) : memfd_create(UM_PAGE_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -errno;
    void *page = MAP_FAILED;
    if (ftruncate(fd, (off_t)size) == 0)
        page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    int result = page == MAP_FAILED || fcntl(fd, F_ADD_SEALS, SEALS) ? -errno : 0;
    if (result == 0) {
        *(_Atomic uint64_t *)page = 0; /* makes the page: once guarded, a touch waits for one */
        result = um_gate_guard(page);
        if (result == 0 && madvise(page, um_page_size(), MADV_DONTFORK)) /* a child's would not be guarded */
            result = -errno;
    }
    if (result == 0) {
        *ret_fd = um_sys_out_of_the_way(fd);
        *ret_page = page;
        return 0;
    }
    if (page != MAP_FAILED)
        munmap(page, size);
    close(fd);
    return result;
}

/* Made for the first client that asks. */
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
    device->page_fd = fd;
    device->page = page;
    um_gate_show(device, atomic_load(&device->generation));
    um_unlock(&saved);
    um_settle(); /* what the reader has read already, it did not shut this page for */
    return 0;
}

/*
 * Private, so that nobody can write what others load, whatever mprotect is asked for. Nothing may touch the page before
 * it is guarded: where there is no page in the file, an unguarded touch makes an empty one. Hence PROT_NONE, which
 * neither MAP_POPULATE nor mlockall(MCL_FUTURE) reads. A forked child maps another page here, see um_page_inherit.
 */
static int map_guarded(const usermm_device *device, struct um_mapping *mapping, int flags) {
    size_t size = um_page_size();
    flags = (flags & ~(MAP_TYPE | MAP_POPULATE | MAP_LOCKED)) | MAP_PRIVATE;
    void *address = um_fault("mmap") ? (errno = ENOMEM, MAP_FAILED)
                                     : mmap(mapping->address, mapping->length, PROT_NONE, flags, device->page_fd, 0);
    if (address == MAP_FAILED)
        return -errno;
    int result = um_gate_guard(address);
    if (result == 0 && (madvise(address, size, MADV_DONTFORK) || mprotect(address, size, mapping->prot)))
        result = -errno;
    if (result)
        munmap(address, size);
    else
        mapping->address = address;
    return result;
}

/* Where the kernel put a new mapping the one that was noted before is gone, whichever device's it was. */
static void forget_note(void *address) {
    for (usermm_device *device = um_monitor.devices; device; device = device->next)
        for (struct um_mapping **link = &device->mappings; *link; link = &(*link)->next)
            if ((*link)->address == address) {
                struct um_mapping *old = *link;
                *link = old->next;
                um_sys_free(old, sizeof *old);
                return; /* there is one at most */
            }
}

static void note(usermm_device *device, struct um_mapping *mapping) {
    forget_note(mapping->address);
    mapping->next = device->mappings;
    device->mappings = mapping;
}

static int map_noted(usermm_device *device, struct um_mapping *mapping, int flags, void **ret_address) {
    um_lifecycle_lock();
    int result = um_device_state(device);
    if (result == 0)
        result = ensure_page(device);
    if (result == 0)
        result = map_guarded(device, mapping, flags);
    if (result == 0) {
        note(device, mapping);
        *ret_address = mapping->address;
    }
    um_lifecycle_unlock();
    return result;
}

int um_page_map(usermm_device *device, void *address, size_t length, int prot, int flags, int64_t offset,
                void **ret_address) {
    int result = um_device_state(device);
    if (result)
        return result;
    if (offset != 0 || length == 0 || length > 4096)
        return -EINVAL;
    if (prot & PROT_WRITE && (flags & MAP_TYPE) != MAP_PRIVATE)
        return -EACCES; /* as for any file that is open for reading only */
    if (flags & MAP_ANONYMOUS)
        return -EINVAL; /* would be another page, whose generation never moves */
    struct um_mapping *mapping = um_sys_alloc(sizeof *mapping);
    if (!mapping)
        return -ENOMEM;
    mapping->address = address;
    mapping->length = length;
    mapping->prot = prot;
    result = map_noted(device, mapping, flags, ret_address);
    if (result)
        um_sys_free(mapping, sizeof *mapping);
    return result;
}

int usermm_map(usermm_device *device, size_t length, int prot, int flags, int64_t offset, void **ret_address) {
    return um_page_map(device, NULL, length, prot, flags & ~MAP_FIXED, offset, ret_address);
}

void um_page_free(usermm_device *device) {
    size_t skipped = um_device_is_inherited(device) ? um_page_size() : 0; /* that part was not inherited */
    if (device->page)
        munmap((char *)device->page + skipped, 2 * um_page_size() - skipped);
}

/* Where the client unmapped it meanwhile there is a hole, and then a page too many, or other memory, and then nothing.
 */
void um_page_inherit(usermm_device *device) {
    for (struct um_mapping *mapping = device->mappings; mapping; mapping = mapping->next)
        mmap(mapping->address, mapping->length, mapping->prot, MAP_PRIVATE | MAP_FIXED_NOREPLACE, device->page_fd,
             (off_t)um_page_size());
}

void um_page_rest(usermm_device *device) {
    for (struct um_mapping *next, *mapping = device->mappings; mapping; mapping = next) {
        next = mapping->next;
        if (um_page_is_at((uintptr_t)mapping->address))
            madvise(mapping->address, um_page_size(), MADV_DOFORK);
        um_sys_free(mapping, sizeof *mapping);
    }
    device->mappings = NULL;
    if (device->page_fd >= 0 && !um_monitor.descriptors_lost)
        close(device->page_fd);
    device->page_fd = -1;
}
