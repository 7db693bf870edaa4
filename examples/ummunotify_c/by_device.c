/* Lost memory by the device, as programs of 2010 do it: open, map the generation, register, load, read. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/ummunotify.h>

#include "watch.h"

static int fd = -1;
static const volatile uint64_t *generation;
static uint64_t seen; /* the generation up to which all events have been read */

int watch_open(void) {
    fd = open("/dev/ummunotify", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) {
        fprintf(stderr, "/dev/ummunotify: %s%s\n", strerror(errno),
                errno == ENOENT ? "; start the program by `usermm run`" : "");
        return -errno;
    }
    void *page = mmap(NULL, sizeof *generation, PROT_READ, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED) {
        int number = errno;
        close(fd);
        return -number;
    }
    generation = page;
    return 0;
}

void watch_close(void) {
    munmap((void *)generation, sizeof *generation);
    close(fd);
}

int watch_add(uint64_t start, uint64_t end, uint64_t cookie) {
    struct ummunotify_register_ioctl region = {.start = start, .end = end, .user_cookie = cookie};
    return ioctl(fd, UMMUNOTIFY_REGISTER_REGION, &region) ? -errno : 0;
}

void watch_remove(uint64_t cookie) {
    ioctl(fd, UMMUNOTIFY_UNREGISTER_REGION, &cookie);
}

/* One load: this is what the device is for. */
bool watch_changed(void) {
    return *generation != seen;
}

int watch_drain(void (*lost)(uint64_t cookie)) {
    struct ummunotify_event events[128];
    ssize_t size;
    while ((size = read(fd, events, sizeof events)) > 0)
        for (size_t i = 0; i < (size_t)size / sizeof *events; i++)
            if (events[i].type == UMMUNOTIFY_EVENT_TYPE_LAST)
                seen = events[i].user_cookie_counter;
            else
                lost(events[i].user_cookie_counter);
    return size < 0 && errno != EAGAIN ? -errno : 0;
}
