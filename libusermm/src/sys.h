/* Every allocation and system call of the core that can fail, so that a test build can make the n-th one fail. */
#ifndef UM_SYS_H
#define UM_SYS_H

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef USERMM_FAULT_INJECTION
/* Defined by the test: true when this call has to fail. Runs in the reader thread too, so it must not allocate. */
bool um_fault(const char *call);
#else
static inline bool um_fault(const char *call) {
    (void)call;
    return false;
}
#endif

#ifdef USERMM_PRELOAD /* inside programs whose malloc, or signal handlers, call it: see preload/ */
extern _Thread_local unsigned um_guard_depth;
/* The program counts on low numbers, and takes those that it knows to be free: see preload/guard.c. `fd` itself if
 * there is no other. */
int um_sys_out_of_the_way(int fd);
/* Whether all threads but the caller have ended: then the program would have ended, but for us. */
bool um_sys_is_alone(void);
/* Whether the caller has seen to it, so that one call of the program blocks them once. */
static inline bool um_signals_are_blocked(void) {
    return um_guard_depth != 0;
}
void *um_memory_alloc(size_t size);
void um_memory_free(void *memory, size_t size);
#else
static inline int um_sys_out_of_the_way(int fd) {
    return fd;
}
static inline bool um_sys_is_alone(void) {
    return false;
}
static inline bool um_signals_are_blocked(void) {
    return false;
}
static inline void *um_memory_alloc(size_t size) {
    return calloc(1, size);
}
static inline void um_memory_free(void *memory, size_t size) {
    (void)size;
    free(memory);
}
#endif

static inline size_t um_page_size(void) {
    return (size_t)sysconf(_SC_PAGESIZE);
}

/* Zeroed, or NULL. */
static inline void *um_sys_alloc(size_t size) {
    return um_fault("malloc") ? NULL : um_memory_alloc(size);
}

/* `size` is what it was allocated with. NULL is freed as free does it. */
static inline void um_sys_free(void *memory, size_t size) {
    um_memory_free(memory, size);
}

static inline int um_sys_ioctl(int fd, unsigned long request, void *argument) {
    if (um_fault("ioctl")) {
        errno = ENOMEM;
        return -1;
    }
    return ioctl(fd, request, argument);
}

/* For the probe, which every check waits for: libc's variadic ioctl and errno are a twentieth of it. 0 or -errno. */
static inline long um_sys_quick_ioctl(int fd, unsigned long request, void *argument) {
    if (um_fault("ioctl"))
        return -ENOMEM;
#if defined(__x86_64__)
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "0"((long)SYS_ioctl), "D"((long)fd), "S"(request), "d"(argument)
                     : "rcx", "r11", "memory");
    return result;
#else
    return ioctl(fd, request, argument) ? -errno : 0;
#endif
}

static inline ssize_t um_sys_read(int fd, void *buffer, size_t size) {
    if (um_fault("read")) {
        errno = EIO;
        return -1;
    }
    return read(fd, buffer, size);
}

static inline ssize_t um_sys_write(int fd, const void *buffer, size_t size) {
    if (um_fault("write")) {
        errno = EIO;
        return -1;
    }
    return write(fd, buffer, size);
}

static inline int um_sys_poll(struct pollfd *fds, nfds_t count, int timeout_ms) {
    if (um_fault("poll")) {
        errno = ENOMEM;
        return -1;
    }
    return poll(fds, count, timeout_ms);
}

/* For calls that make a descriptor or a mapping: use as `um_fault("pipe2") ? um_sys_fail(EMFILE) : pipe2(...)`. */
static inline int um_sys_fail(int number) {
    errno = number;
    return -1;
}

#endif
