/*
 * libusermm: know exactly when memory that you handed to a device was unmapped, moved or discarded.
 *
 * A device watches ranges of this process's addresses ("regions", each named by a cookie) and queues one event for each
 * region that lost memory. One monitor in the process (a userfaultfd and one thread) serves every device.
 *
 * Calls return 0 or a count, or a negative errno and then change nothing. The common ones:
 *   -EBADF   the device is shut down
 *   -ECHILD  the process is a forked child of the one that opened the device: open a new one
 *   -EIO     the monitor met something unexpected and failed closed: forget every registration, close, open again
 * Any thread may call anything at any time, except usermm_close, which must be the last call on its device.
 */
#ifndef USERMM_H
#define USERMM_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

#define USERMM_ABI_UMMUNOT 1    /* /dev/ummunot, 2009 */
#define USERMM_ABI_UMMUNOTIFY 2 /* /dev/ummunotify, 2010 */

#define USERMM_EVENT_INVAL 0u
#define USERMM_EVENT_LAST 1u
#define USERMM_EVENT_FLAG_HINT 1u

/* As both devices hand it out: 32 bytes. For LAST only `user_cookie_counter` (the generation) has a meaning. */
struct usermm_event {
    uint32_t type;
    uint32_t flags;
    uint64_t hint_start;
    uint64_t hint_end;
    uint64_t user_cookie_counter;
};

/* usermm_register: what memory to refuse. None of them is the ABI's own behaviour. */
#define USERMM_REFUSE_HOLES 1u /* -EFAULT unless every page of the range is mapped and the range is not empty */
#define USERMM_REFUSE_FILES 2u /* -EOPNOTSUPP for file memory, which others can truncate without a notification */

typedef struct usermm_device usermm_device;

/*
 * Opens a device. `flags` as for open(2): O_RDONLY, optionally O_NONBLOCK and O_CLOEXEC (always on).
 * -EINVAL unknown abi, or opening for writing; -EMFILE, -ENFILE, -ENOMEM; -EPERM, -ENOSYS no userfaultfd here.
 */
int usermm_open(int abi, int flags, usermm_device **ret_device);

/* Ends every call that waits and makes all later ones return -EBADF. May be called more than once. */
void usermm_shutdown(usermm_device *device);

/* usermm_shutdown, then frees the device. No other thread may be inside a call on it. */
void usermm_close(usermm_device *device);

/*
 * Watches [start, end). -EINVAL the cookie is registered already; -ENOMEM memory or vm.max_map_count; -EBUSY another
 * userfaultfd owns part of the range; -EOPNOTSUPP part of it is mapped and cannot be watched; -EFAULT see the flags.
 * Memory that is mapped at these addresses later is not watched until it is registered.
 */
int usermm_register(usermm_device *device, uint64_t start, uint64_t end, uint64_t cookie, unsigned flags);

/* -EINVAL the cookie is not registered. After the return no event for it is delivered. */
int usermm_unregister(usermm_device *device, uint64_t cookie);

/*
 * usermm_unregister, and the pages are no longer watched, unless another region has one of them: unmapping them then
 * costs nothing more than it would without this library. For whoever is about to do that. It walks the pages.
 */
int usermm_retire(usermm_device *device, uint64_t cookie);

/* The number of notifications that hit a region of the device; every call that has returned is counted. */
int usermm_generation(usermm_device *device, uint64_t *ret_generation);

enum usermm_probe {
    USERMM_PROBE_NONE, /* exact for every call that has returned: a load or three */
    USERMM_PROBE_WAIT, /* exact also for an unmapping that another thread is inside; one system call, waits for it */
    USERMM_PROBE_TRY   /* the same, but -EAGAIN where it would wait */
};

/*
 * 1: no region of the device lost memory since the generation was `seen`; 0: one did, or other threads went on
 * discarding watched memory for 100 ms without a pause, so that nothing can be promised.
 */
int usermm_check(usermm_device *device, uint64_t seen, enum usermm_probe probe);

/*
 * The ABI's read, without waiting: up to min(size, 4096) / 32 events. 0 when size < 32 and an event is there.
 * -EAGAIN nothing to read; -EFAULT a bad buffer (the events are lost).
 */
ssize_t usermm_read(usermm_device *device, void *buffer, size_t size);

/* Waits until usermm_read has something: 1, or 0 after timeout_ms (-1: for ever). -EINTR a signal came. */
int usermm_wait(usermm_device *device, int timeout_ms);

/* The ABI's ioctl of the device's version. -ENOTTY unknown request; -EFAULT a bad argument. */
int usermm_ioctl(usermm_device *device, unsigned long request, void *argument);

/*
 * Maps the page whose first eight bytes are the generation; release it with munmap(2). It outlives the device.
 * A load from it is as exact as usermm_generation: while a notification is under way it waits. A system call that reads
 * the page in that moment says EFAULT. The mapping is private, whatever the flags say.
 * -EINVAL offset other than 0, length outside 1..4096; -EACCES a writable shared mapping.
 */
int usermm_map(usermm_device *device, size_t length, int prot, int flags, int64_t offset, void **ret_address);

/* A descriptor that polls readable exactly while usermm_read has something; the device owns it. -EBADF */
int usermm_fileno(usermm_device *device);

/* The flags given to usermm_open. */
int usermm_flags(const usermm_device *device);

/* What took memory away: munmap or mapping over it; mremap; madvise. */
enum usermm_cause { USERMM_CAUSE_UNMAP, USERMM_CAUSE_REMAP, USERMM_CAUSE_DISCARD, USERMM_CAUSES };

struct usermm_counts {
    uint64_t devices;       /* open now */
    uint64_t regions;       /* registered now, over all devices */
    uint64_t notifications; /* messages that the monitor applied since it started */
    uint64_t monitors;      /* 1 while the reader thread runs */
};
void usermm_count(struct usermm_counts *ret_counts);

#ifdef __cplusplus
}
#endif
#endif
