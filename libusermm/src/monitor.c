/* What all of the core shares: the lock, waiting for the reader, the probe, failing closed. */
#define _GNU_SOURCE
#include "monitor.h"

#include <errno.h>
#include <sched.h>
#include <time.h>

#include "device.h"
#include "kernel.h"
#include "sys.h"

struct um_monitor um_monitor = {
    .uffd = -1,
    .gate_fd = -1,
    .maps_fd = -1,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

void um_lock(sigset_t *ret_saved) {
    if (!um_signals_are_blocked()) {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, ret_saved);
    }
    pthread_mutex_lock(&um_monitor.lock);
}

void um_unlock(const sigset_t *saved) {
    pthread_mutex_unlock(&um_monitor.lock);
    if (!um_signals_are_blocked())
        pthread_sigmask(SIG_SETMASK, saved, NULL);
}

void um_backoff(unsigned attempt) {
    if (attempt < 64) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    } else if (attempt < 256) {
        sched_yield();
    } else {
        /* Sleeping lets the reader run even when this thread has a real-time priority. */
        struct timespec pause = {.tv_nsec = attempt < 1024 ? 20000 : 500000};
        nanosleep(&pause, NULL);
    }
}

void um_settle(void) {
#ifndef USERMM_WITHOUT_IN_FLIGHT
    uint32_t word = atomic_load(&um_monitor.page->in_flight);
    for (unsigned attempt = 0; word & 1 && atomic_load(&um_monitor.page->in_flight) == word; attempt++)
        um_backoff(attempt);
#endif
}

/*
 * The kernel raises mmap_changing on the userfaultfd before it drops the lock under which memory was unmapped, and
 * lowers it after the unmapping thread woke. Write-protect calls look at it before their argument: EAGAIN, else EINVAL
 * for length 0.
 */
int um_probe(void) {
    struct uffdio_writeprotect nothing = {.range = {0, 0}};
    long result = um_sys_quick_ioctl(um_monitor.uffd, UFFDIO_WRITEPROTECT, &nothing);
    return result == -EINVAL ? 0 : result == -EAGAIN ? 1 : result ? (int)result : -EPROTO;
}

bool um_means_lost(int number) {
    return number == EBADF || number == ENOTTY;
}

void um_monitor_fail_locked(int reason) {
    if (um_monitor.failure)
        return;
    um_monitor.failure = reason;
    /* One of ours closed by a stranger, be it a pipe: none of the numbers is sure any more. */
    um_monitor.descriptors_lost = um_means_lost(reason) || um_means_lost(-um_probe());
    atomic_store(&um_monitor.page->epoch, 0);
    for (usermm_device *device = um_monitor.devices; device; device = device->next) {
        um_queue_advance(device);
        um_device_wake(device);
        if (!um_monitor.descriptors_lost && um_device_has(device, device->signal_fd) &&
            write(device->signal_fd, UM_MARK, 1) < 0)
            continue; /* full: it polls readable already */
    }
}

void um_monitor_fail(uint64_t epoch, int reason) {
    sigset_t saved;
    um_lock(&saved);
    if (atomic_load(&um_monitor.page->epoch) == epoch)
        um_monitor_fail_locked(reason);
    um_unlock(&saved);
}

void usermm_count(struct usermm_counts *ret_counts) {
    sigset_t saved;
    um_lock(&saved);
    *ret_counts = (struct usermm_counts){
        .devices = um_monitor.open_devices,
        .regions = um_monitor.region_count,
        .notifications = atomic_load(&um_monitor.notifications),
        .monitors = um_monitor.page && atomic_load(&um_monitor.page->epoch) != 0,
    };
    um_unlock(&saved);
}
