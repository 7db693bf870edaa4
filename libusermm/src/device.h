/* A device and its regions. */
#ifndef UM_DEVICE_H
#define UM_DEVICE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "tree.h"
#include "usermm.h"

#define UM_EVENTS_PER_READ 128 /* one page of 4096 bytes */
#define UM_EVENTS_PER_PIECE 16 /* on the stack, which may be a signal handler's small one */

/*
 * What is written to a device's pipe. A program that reads it past usermm (by a descriptor that nobody told us of)
 * finds it as the first byte; text never begins with it, since it is no UTF-8.
 */
#define UM_MARK "\xf7"

struct um_region {
    struct um_node by_start;  /* in the monitor's tree; key and end are the region; serial 0: it is not in the tree */
    struct um_node by_cookie; /* in the device's tree; key is the cookie; serial 0: it has none */
    usermm_device *device;
    struct um_region *previous_queued, *next_queued;
    uint64_t hint_start, hint_end; /* the first hit since it was queued, not clipped yet */
    bool queued, hint;
    uint8_t cause; /* enum usermm_cause, of the first hit since it was queued */
};

static inline struct um_region *um_region_of_cookie(struct um_node *by_cookie) {
    return (struct um_region *)((char *)by_cookie - offsetof(struct um_region, by_cookie));
}

struct usermm_device {
    _Atomic uint64_t generation; /* written with the lock held */
    _Atomic uint64_t epoch;      /* of the monitor that serves it; UINT64_MAX once shut down */
    int abi, flags;
    uint64_t life;    /* of the process that opened it */
    atomic_bool used; /* EXCHANGE_FEATURES must come first */
    /* With the monitor's lock held: */
    struct um_node *cookies;
    struct um_region *first_queued, *last_queued;
    bool last_owed;          /* version 2: the buffer was full when the queue ran dry */
    int ready_fd, signal_fd; /* a pipe: bytes in it are what makes the device poll readable */
    uint64_t pipe, pipes;    /* its inode, and the file system of all pipes */
    int page_fd;             /* memfd behind usermm_map, -1 until the first one */
    _Atomic uint64_t *page;  /* what clients map; a page further, what forked children map: see gate.c */
    bool gate_shut;
    bool coalesces, signalled; /* at most one byte is in the pipe, which only um_device_rest takes out */
    unsigned waiters;
    usermm_device *next, **link; /* open devices */
    usermm_device *next_hit;     /* during one notification */
    bool is_hit;
    struct um_mapping *mappings; /* of the page, by clients; guarded by um_lifecycle_lock */
    _Atomic uint32_t wakeups;    /* what um_device_sleep sleeps on */
    atomic_bool has_sleepers;    /* once one slept, each wakeup costs a system call */
    unsigned number;             /* whoever opened it may number it */
};

/* Whether this is a child of the process that opened it. */
bool um_device_is_inherited(const usermm_device *device);

/* Whether `fd`, an end of the device's pipe, still is one: the program may have closed it, and have another file there.
 */
bool um_device_has(const usermm_device *device, int fd);

/* 0, or why the device cannot be used: -EBADF, -ECHILD, -EIO. */
int um_device_state(const usermm_device *device);

/*
 * Waits until no change of watched memory is under way. 0: quiet; 1: not within limit_ns; -EAGAIN: not, with limit_ns
 * 0; or as um_lost. With `seen`, a generation that has moved on ends it early: that answers a check.
 */
int um_quiesce(const usermm_device *device, const uint64_t *seen, int64_t limit_ns);

/* `result` of a call says that the number is not our userfaultfd: the device was shut down, or the monitor has to fail.
 */
int um_lost(const usermm_device *device, int result);

/* A notification for [start, end), from the reader, with the lock held. */
int um_queue_notify(uint64_t start, uint64_t end, enum usermm_cause cause);

/* For a device whose events nobody reads one by one: it polls readable from the first until um_device_rest. */
void um_device_coalesce(usermm_device *device);
void um_device_rest(usermm_device *device);

/* Makes the device poll readable again after its pipe was read by others, if there is something to read. */
void um_device_rearm(usermm_device *device);

/* As usermm_register, for a region without a cookie that stays the caller's. */
int um_region_add(usermm_device *device, struct um_region *region, unsigned flags);
/* Takes it out of the monitor, if it is still in. */
void um_region_take(struct um_region *region);

/* As um_region_take, and takes the watch off if no other region needs it: for small ones, since it walks the pages. */
void um_region_retire(struct um_region *region);

/* Takes up to `capacity` regions that were hit out of the queue and of the monitor, and says how many. */
unsigned um_queue_take(usermm_device *device, struct um_region **ret_regions, unsigned capacity);

/*
 * To wait as read(2) does: take um_device_wakeups, find nothing to read, sleep on what it was. 0: look again; -EINTR: a
 * signal's handler ran, and did not ask for restarts (SA_RESTART).
 */
uint32_t um_device_wakeups(usermm_device *device);
int um_device_sleep(usermm_device *device, uint32_t wakeups);
void um_device_wake(usermm_device *device);

/* Counts one more change; `page` shows it too. With the lock held. */
void um_queue_advance(usermm_device *device);

/* Takes a region out of both trees and the queue. With the lock held. */
void um_queue_remove(struct um_region *region);

/* Makes [start, end) report to the monitor. As usermm_register, and -EBADF or -ENOTTY: the descriptor is not ours. */
int um_watch(uint64_t start, uint64_t end, unsigned flags);
/* The part of it that changes nothing: whether this memory would be refused as it is now. */
int um_refuse(uint64_t start, uint64_t end, unsigned flags);
void um_unwatch(uint64_t start, uint64_t end); /* whole pages */

#endif
