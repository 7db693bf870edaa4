/* Pages of files at one address; see pages.h. */
#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

int um_pages_fill(void *address, const struct um_run *runs, size_t count, struct um_mode mode) {
    char *at = address;
    for (size_t i = 0; i < count; i++) {
        if (mmap(at, runs[i].length, mode.prot, mode.flags | MAP_FIXED, runs[i].fd, runs[i].offset) == MAP_FAILED ||
            (!mode.inherit && madvise(at, runs[i].length, MADV_DONTFORK)))
            return -errno;
        at += runs[i].length;
    }
    return 0;
}

int um_pages_map(const struct um_run *runs, size_t count, size_t total, struct um_mode mode, void **ret_address) {
    /* One run needs no place to be kept for it first. */
    bool is_whole = count == 1 && runs->length == total;
    void *address = is_whole ? mmap(NULL, total, mode.prot, mode.flags, runs->fd, runs->offset)
                             : mmap(NULL, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED)
        return -errno;
    int result = 0;
    if (!is_whole)
        result = um_pages_fill(address, runs, count, mode);
    else if (!mode.inherit && madvise(address, total, MADV_DONTFORK))
        result = -errno;
    if (result)
        munmap(address, total);
    else
        *ret_address = address;
    return result;
}

/* On a page that the kernel wipes in children, however they are made. Without one, the system call. */
pid_t um_pages_process(void) {
    static _Atomic(pid_t *) place;
    pid_t *known = atomic_load_explicit(&place, memory_order_acquire), *none = NULL;
    if (!known) {
        size_t size = (size_t)sysconf(_SC_PAGESIZE);
        known = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (known == MAP_FAILED)
            return getpid();
        if (madvise(known, size, MADV_WIPEONFORK) || !atomic_compare_exchange_strong(&place, &none, known)) {
            munmap(known, size);
            return getpid();
        }
    }
    pid_t process = __atomic_load_n(known, __ATOMIC_RELAXED);
    if (!process)
        __atomic_store_n(known, process = getpid(), __ATOMIC_RELAXED);
    return process;
}

/* As much as one call takes: the kernel stops at MAX_RW_COUNT, a page below 2 GiB. */
#define MOST_BYTES ((size_t)1 << 30)

static int transfer(bool write, uintptr_t here, char *buffer, size_t length) {
    for (size_t done = 0; done < length;) {
        size_t wanted = length - done < MOST_BYTES ? length - done : MOST_BYTES;
        struct iovec local = {buffer + done, wanted}, remote = {(void *)(here + done), wanted};
        ssize_t moved = write ? process_vm_writev(getpid(), &local, 1, &remote, 1, 0)
                              : process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
        if (moved <= 0)
            return moved ? -errno : -EFAULT;
        done += (size_t)moved;
    }
    return 0;
}

int um_pages_read(const void *from, void *buffer, size_t length) {
    return transfer(false, (uintptr_t)from, buffer, length);
}

int um_pages_write(void *to, const void *buffer, size_t length) {
    return transfer(true, (uintptr_t)to, (char *)(uintptr_t)buffer, length);
}

/* Pages that are gone are zeros in the copy. */
static int copy_pages(const char *from, char *to, size_t length) {
    size_t page_size = (size_t)sysconf(_SC_PAGESIZE);
    int result = um_pages_read(from, to, length);
    for (size_t at = 0; result == -EFAULT && at < length; at += page_size) {
        int of_page = um_pages_read(from + at, to + at, page_size);
        if (of_page && of_page != -EFAULT)
            return of_page;
    }
    return result == -EFAULT ? 0 : result;
}

int um_pages_detach(void *address, size_t length, int prot, bool inherit, int fd) {
    char *copy = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    if (copy == MAP_FAILED)
        return -errno;
    int result = copy_pages(address, copy, length);
    if (result == 0 &&
        ((!(prot & PROT_WRITE) && mprotect(copy, length, prot)) || (!inherit && madvise(copy, length, MADV_DONTFORK)) ||
         mremap(copy, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, address) == MAP_FAILED))
        result = -errno;
    if (result)
        munmap(copy, length);
    return result;
}
