/* Registering and unregistering regions. */
#define _GNU_SOURCE
#include <errno.h>

#include "device.h"
#include "monitor.h"
#include "sys.h"

#define REGISTER_WAIT_NS 10000000 /* going on costs at most an event from before */

static int insert(usermm_device *device, struct um_region *region, bool named) {
    sigset_t saved;
    um_lock(&saved);
    int result = um_device_state(device);
    if (result == 0 && named && um_tree_find(device->cookies, region->by_cookie.key))
        result = -EINVAL;
    if (result == 0) {
        region->by_start.serial = ++um_monitor.next_serial;
        region->by_cookie.serial = named ? region->by_start.serial : 0;
        um_tree_insert(&um_monitor.regions, &region->by_start);
        if (named)
            um_tree_insert(&device->cookies, &region->by_cookie);
        um_monitor.region_count++;
    }
    um_unlock(&saved);
    return result;
}

/* `serial` 0 takes whatever region has the cookie. */
static int withdraw(usermm_device *device, uint64_t cookie, uint64_t serial) {
    struct um_region *region = NULL;
    sigset_t saved;
    um_lock(&saved);
    struct um_node *node = um_tree_find(device->cookies, cookie);
    if (node && (serial == 0 || node->serial == serial)) {
        region = um_region_of_cookie(node);
        um_queue_remove(region);
    }
    um_unlock(&saved);
    um_sys_free(region, sizeof *region);
    return region ? 0 : -EINVAL;
}

/*
 * Quiet first, or a change from before would be reported; then insert, then watch, so that no change after is missed.
 * Once inserted the region belongs to the device: another thread may unregister it, so only its serial is kept.
 */
int usermm_register(usermm_device *device, uint64_t start, uint64_t end, uint64_t cookie, unsigned flags) {
    int result = um_quiesce(device, NULL, REGISTER_WAIT_NS);
    if (result < 0)
        return result;
    atomic_store(&device->used, true);
    um_settle();
    struct um_region *region = um_sys_alloc(sizeof *region);
    if (!region)
        return -ENOMEM;
    region->device = device;
    region->by_start.key = start;
    region->by_start.end = end;
    region->by_cookie.key = cookie;
    result = insert(device, region, true);
    if (result) {
        um_sys_free(region, sizeof *region);
        return result;
    }
    uint64_t serial = region->by_cookie.serial;
    result = um_watch(start, end, flags);
    if (result)
        withdraw(device, cookie, serial);
    return um_means_lost(-result) ? um_lost(device, result) : result;
}

/* No wait for quiet: an event from before costs its owner, a cache, a second registration and nothing else. */
int um_region_add(usermm_device *device, struct um_region *region, unsigned flags) {
    int result = insert(device, region, false);
    if (result)
        return result;
    result = um_watch(region->by_start.key, region->by_start.end, flags);
    if (result)
        um_region_take(region);
    return um_means_lost(-result) ? um_lost(device, result) : result;
}

/*
 * Under the lock, so that a region which is put there meanwhile is seen here, or its watch comes after. Whoever holds
 * the kernel's lock on the mappings never waits for the reader, so neither does this.
 */
static void retire_locked(struct um_region *region) {
    uint64_t page = um_page_size(), start = region->by_start.key & ~(page - 1);
    uint64_t end = (region->by_start.end + page - 1) & ~(page - 1);
    if (region->by_start.serial)
        um_queue_remove(region);
    if (!um_tree_overlaps(um_monitor.regions, start, end) && um_device_state(region->device) == 0)
        um_unwatch(start, end);
}

void um_region_retire(struct um_region *region) {
    sigset_t saved;
    um_lock(&saved);
    retire_locked(region);
    um_unlock(&saved);
}

void um_region_take(struct um_region *region) {
    sigset_t saved;
    um_lock(&saved);
    if (region->by_start.serial)
        um_queue_remove(region);
    um_unlock(&saved);
}

int usermm_retire(usermm_device *device, uint64_t cookie) {
    um_settle();
    int state = um_device_state(device);
    if (state)
        return state;
    sigset_t saved;
    um_lock(&saved);
    struct um_node *node = um_tree_find(device->cookies, cookie);
    struct um_region *region = node ? um_region_of_cookie(node) : NULL;
    if (region)
        retire_locked(region);
    um_unlock(&saved);
    um_sys_free(region, sizeof *region);
    return region ? 0 : -EINVAL;
}

int usermm_unregister(usermm_device *device, uint64_t cookie) {
    um_settle();
    int state = um_device_state(device);
    return state ? state : withdraw(device, cookie, 0);
}
