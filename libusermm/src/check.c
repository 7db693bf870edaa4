/* "Nothing changed": the generation, and waiting until no change is under way. */
#define _GNU_SOURCE
#include <errno.h>
#include <time.h>

#include "device.h"
#include "monitor.h"

#define CHECK_WAIT_NS 100000000 /* an answer of "changed" costs the caller a registration */

uint64_t um_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* One step of a wait that began with `deadline_ns` 0. Whether it has lasted limit_ns. */
static bool is_over(unsigned attempt, uint64_t *deadline_ns, int64_t limit_ns) {
    um_backoff(attempt);
    if (*deadline_ns)
        return um_now_ns() > *deadline_ns;
    *deadline_ns = um_now_ns() + (uint64_t)limit_ns;
    return false;
}

/*
 * Bounded: while several threads do nothing but discard watched memory there is no quiet moment at all, and the kernel
 * does not tell whose change is under way. With `seen`, a generation that has moved on ends it early: that answers a
 * check.
 */
static int wait_until_quiet(const usermm_device *device, const uint64_t *seen, int64_t limit_ns) {
    uint64_t deadline_ns = 0;
    for (unsigned attempt = 0;; attempt++) {
        int busy = um_probe();
        if (busy <= 0 || (seen && atomic_load(&device->generation) != *seen))
            return busy;
        if (limit_ns == 0)
            return -EAGAIN;
        if (is_over(attempt, &deadline_ns, limit_ns))
            return busy;
    }
}

static bool is_watched(uint64_t start, uint64_t end) {
    sigset_t saved;
    um_lock(&saved);
    bool result = um_tree_overlaps(um_monitor.regions, start, end);
    um_unlock(&saved);
    return result;
}

void um_quiet_soon(uint64_t start, uint64_t end, int64_t limit_ns) {
    uint64_t deadline_ns = 0;
    if (!um_monitor.page || atomic_load(&um_monitor.page->epoch) == 0)
        return;
    for (unsigned attempt = 0; um_probe() == 1 && is_watched(start, end); attempt++)
        if (is_over(attempt, &deadline_ns, limit_ns))
            return;
}

int um_lost(const usermm_device *device, int result) {
    um_monitor_fail(atomic_load(&device->epoch), -result);
    return um_device_state(device);
}

int um_quiesce(const usermm_device *device, const uint64_t *seen, int64_t limit_ns) {
    int state = um_device_state(device);
    if (state)
        return state;
#ifdef USERMM_WITHOUT_PROBE
    (void)seen, (void)limit_ns, (void)wait_until_quiet;
    return 0;
#else
    int busy = wait_until_quiet(device, seen, limit_ns);
    return busy >= 0 || busy == -EAGAIN ? busy : um_lost(device, busy);
#endif
}

int usermm_generation(usermm_device *device, uint64_t *ret_generation) {
    um_settle();
    uint64_t generation = atomic_load(&device->generation);
    int state = um_device_state(device); /* after the load: a failure ends the epoch before it moves the generation */
    if (state == 0)
        *ret_generation = generation;
    return state;
}

int usermm_check(usermm_device *device, uint64_t seen, enum usermm_probe probe) {
    uint64_t generation;
    int64_t limit_ns = probe == USERMM_PROBE_WAIT ? CHECK_WAIT_NS : 0;
    int busy = probe == USERMM_PROBE_NONE ? 0 : um_quiesce(device, &seen, limit_ns);
    int result = busy < 0 ? busy : usermm_generation(device, &generation);
    return result ? result : !busy && generation == seen;
}
