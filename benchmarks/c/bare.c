#include "bare.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bench.h"

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#define EVENTS (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | \
                UFFD_FEATURE_EVENT_REMOVE)
#define WP_HUGETLBFS_SHMEM (1ull << 12)
#define WP_ASYNC (1ull << 15)

static int open_with(unsigned long long features) {
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    need(uffd >= 0, "userfaultfd");
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    if (ioctl(uffd, UFFDIO_API, &api) == 0)
        return uffd;
    close(uffd);
    return -1;
}

int bare_open(void) {
    int uffd = open_with(EVENTS | WP_HUGETLBFS_SHMEM | WP_ASYNC);
    if (uffd < 0)
        uffd = open_with(EVENTS);
    need(uffd >= 0, "UFFDIO_API");
    return uffd;
}

static void *reader(void *argument) {
    struct pollfd fd = {.fd = (int)(intptr_t)argument, .events = POLLIN};
    struct uffd_msg messages[16];
    for (;;)
        if (poll(&fd, 1, -1) > 0 && read(fd.fd, messages, sizeof messages) < 0)
            continue;
    return NULL;
}

int bare_start(void) {
    pthread_t thread;
    int uffd = bare_open();
    need(pthread_create(&thread, NULL, reader, (void *)(intptr_t)uffd) == 0, "pthread_create");
    return uffd;
}

void bare_watch(int uffd, void *start, size_t length_bytes) {
    struct uffdio_register request = {
        .range = {(uint64_t)(uintptr_t)start, length_bytes}, .mode = UFFDIO_REGISTER_MODE_WP};
    need(ioctl(uffd, UFFDIO_REGISTER, &request) == 0, "UFFDIO_REGISTER");
}
