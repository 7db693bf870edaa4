/*
 * The monitor: one userfaultfd, one reader thread, every region of the process. See ARCHITECTURE.md for the invariants.
 */
#ifndef UM_MONITOR_H
#define UM_MONITOR_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "tree.h"
#include "usermm.h"

/* In a page of its own that a child process finds wiped (MADV_WIPEONFORK), whatever system call made the child. */
struct um_page {
    _Atomic uint64_t life;  /* which process this is, counted along its ancestors; 0: a child that has not noticed */
    _Atomic uint64_t epoch; /* which start of the monitor is alive; 0: none (stopped, failed, or a forked child) */
    _Atomic uint32_t in_flight; /* odd from before a message is read until it has been applied */
};

struct um_monitor {
    struct um_page *page;
    _Atomic int uffd; /* -1 when absent, as the next; atomic: a check may race with the last close */
    int gate_fd;      /* a second userfaultfd, see gate.c */
    int maps_fd;
    void *doorbell; /* a watched page: unmapping it wakes the reader */
    pthread_t reader;
    uint64_t lives; /* processes that this line has been, see um_page */
    uint64_t epoch; /* of the latest start */
    unsigned open_devices;
    int failure;             /* the errno of the first unexpected thing, 0 while all is well */
    bool descriptors_lost;   /* somebody closed ours: their numbers may be other files by now, touch none */
    pthread_mutex_t lock;    /* guards what follows; the reader takes it: see um_lock */
    struct um_node *regions; /* by start, of all devices */
    uint64_t region_count, next_serial;
    usermm_device *devices; /* open ones */
    _Atomic uint64_t notifications;
    /* Told of each device that a notification hit, from the reader, with the lock held; NULL: nobody listens. */
    void (*trace)(const usermm_device *device, uint64_t start, uint64_t end, enum usermm_cause cause);
};
extern struct um_monitor um_monitor;

/*
 * The lock that the reader takes. While holding it: no allocation, no free, no call that can unmap, no waiting, and all
 * signals blocked, since a handler that frees watched memory would wait for the reader, which waits for this lock.
 */
void um_lock(sigset_t *ret_saved);
void um_unlock(const sigset_t *saved);

/* Adds a device to the monitor, starting it for the first one. -EIO while devices of a failed monitor are still open.
 */
int um_monitor_join(usermm_device *device);
/* Removes it, stopping the monitor after the last one. */
void um_monitor_leave(usermm_device *device);

/*
 * Fails closed: every generation moves, every device answers -EIO. Safe to call from anywhere, more than once; `epoch`
 * is the caller's device's, so that a late caller cannot fail the monitor's next life.
 */
void um_monitor_fail(uint64_t epoch, int reason);
/* The same for whoever holds the lock and knows that the epoch lives. */
void um_monitor_fail_locked(int reason);

/* Waits until every message that was read before this call has been applied. */
void um_settle(void);

/* 0: no change of watched memory is under way; 1: one is; negative errno: the descriptor is not our userfaultfd. */
int um_probe(void);
/* Returns when no change is under way or none of a region in [start, end) can be, after limit_ns at most; whatever is
 * wrong, somebody else finds out. */
void um_quiet_soon(uint64_t start, uint64_t end, int64_t limit_ns);
/* Whether an errno of the probe says that the number is closed or somebody else's file. */
bool um_means_lost(int number);

/* The reader thread; `argument` is its epoch. */
void *um_reader(void *argument);

/* Which process this is: another number in each forked child. um_prepare must have succeeded once in it or a parent. */
uint64_t um_life(void);
/* What that needs; the first device does it, too. -ENOMEM */
int um_prepare(void);

/*
 * Has fork's handlers run; the first device does it, too. They keep others' handlers from opening and closing devices
 * unless those registered later, so a library inside a program calls it as soon as it is loaded. -ENOMEM
 */
int um_watch_forks(void);

/* Held while the monitor starts or stops, and while mappings of the generation are noted: forks wait for it. The reader
 * never takes it. */
void um_lifecycle_lock(void);
void um_lifecycle_unlock(void);

uint64_t um_now_ns(void);

/* One step of waiting for another thread: spins, then yields, then sleeps longer and longer. */
void um_backoff(unsigned attempt);

#endif
