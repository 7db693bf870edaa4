#define _GNU_SOURCE
#include "userfaultfd.h"

#include <fcntl.h>
#include <sys/syscall.h>

#include "kernel.h"
#include "sys.h"

#define EVENTS                                                                                                         \
    (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE)

/* A refused set of features spoils the descriptor, so each set is tried on a new one, the best first. */
static const uint64_t feature_sets[] = {
    EVENTS | UM_FEATURE_WP_HUGETLBFS_SHMEM | UM_FEATURE_WP_ASYNC,
    EVENTS | UM_FEATURE_WP_HUGETLBFS_SHMEM,
    EVENTS,
};

static int by_system_call(int flags) {
    return um_fault("userfaultfd") ? um_sys_fail(EMFILE) : (int)syscall(SYS_userfaultfd, flags);
}

/* The node serves users whom its mode admits, also where a seccomp filter blocks the system call. */
static int by_device_node(int flags) {
    int node = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (node < 0)
        return -1;
    int fd = ioctl(node, USERFAULTFD_IOC_NEW, flags);
    int number = errno;
    close(node);
    errno = number;
    return fd;
}

/* Nothing is ever protected, so no fault happens and user mode is all that is needed: it is what everybody may have. */
static int open_any(void) {
    int flags = O_CLOEXEC | O_NONBLOCK;
    int fd = by_system_call(flags | UFFD_USER_MODE_ONLY);
    if (fd < 0 && errno == EINVAL) /* before 5.11 */
        fd = by_system_call(flags);
    if (fd >= 0 || errno == EMFILE || errno == ENFILE || errno == ENOMEM)
        return fd;
    int number = errno;
    fd = by_device_node(flags | UFFD_USER_MODE_ONLY);
    if (fd < 0)
        errno = number; /* the system call's own answer says more than a missing or closed node */
    return fd;
}

static int open_with(const uint64_t *sets, unsigned count, int *ret_fd) {
    int number = EINVAL;
    for (unsigned i = 0; i < count; i++) {
        int fd = open_any();
        if (fd < 0)
            return -errno;
        struct uffdio_api api = {.api = UFFD_API, .features = sets[i]};
        if (um_sys_ioctl(fd, UFFDIO_API, &api) == 0) {
            *ret_fd = um_sys_out_of_the_way(fd);
            return 0;
        }
        number = errno;
        close(fd);
        if (number != EINVAL)
            break;
    }
    return number == EINVAL ? -ENOSYS : -number; /* EINVAL: a kernel without write-protect mode and its events */
}

int um_userfaultfd_open(int *ret_fd) {
    return open_with(feature_sets, sizeof feature_sets / sizeof *feature_sets, ret_fd);
}

int um_userfaultfd_open_gate(int *ret_fd) {
    static const uint64_t features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_EVENT_REMAP;
    return open_with(&features, 1, ret_fd);
}
