/* Pages of files at one address; see pages.h. */
#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static int map_each(char *at, const struct um_run *runs, size_t count, int prot, int flags) {
    for (size_t i = 0; i < count; i++) {
        if (mmap(at, runs[i].length, prot, flags | MAP_FIXED, runs[i].fd, runs[i].offset) == MAP_FAILED)
            return -errno;
        at += runs[i].length;
    }
    return 0;
}

int um_pages_map(const struct um_run *runs, size_t count, size_t total, int prot, int flags, bool inherit,
                 void **ret_address) {
    /* One run needs no place to be kept for it first. */
    void *address = count == 1 ? mmap(NULL, total, prot, flags, runs->fd, runs->offset)
                               : mmap(NULL, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED)
        return -errno;
    int result = count == 1 ? 0 : map_each(address, runs, count, prot, flags);
    if (result == 0 && !inherit && madvise(address, total, MADV_DONTFORK))
        result = -errno;
    if (result)
        munmap(address, total);
    else
        *ret_address = address;
    return result;
}

static int transfer(bool write, uintptr_t here, void *buffer, size_t length) {
    struct iovec local = {buffer, length};
    struct iovec remote = {(void *)here, length}; /* NOLINT: of this process itself */
    ssize_t done = write ? process_vm_writev(getpid(), &local, 1, &remote, 1, 0)
                         : process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
    return done == (ssize_t)length ? 0 : -EFAULT;
}

int um_pages_read(const void *from, void *buffer, size_t length) {
    return length ? transfer(false, (uintptr_t)from, buffer, length) : 0;
}

int um_pages_write(void *to, const void *buffer, size_t length) {
    return length ? transfer(true, (uintptr_t)to, (void *)(uintptr_t)buffer, length) : 0;
}

int um_pages_detach(void *address, size_t length, int prot, bool inherit) {
    size_t page_size = (size_t)sysconf(_SC_PAGESIZE);
    char *copy = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (copy == MAP_FAILED)
        return -errno;
    if (um_pages_read(address, copy, length))
        for (size_t at = 0; at < length; at += page_size) /* those that are there */
            (void)um_pages_read((char *)address + at, copy + at, page_size);
    int result = 0;
    if ((!(prot & PROT_WRITE) && mprotect(copy, length, prot)) || (!inherit && madvise(copy, length, MADV_DONTFORK)) ||
        mremap(copy, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, address) == MAP_FAILED)
        result = -errno;
    if (result)
        munmap(copy, length);
    return result;
}
