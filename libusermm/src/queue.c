/* What one notification does to the regions it hits, and how events leave the queue. */
#define _GNU_SOURCE
#include <sys/uio.h>

#include "copy.h"
#include "device.h"
#include "gate.h"
#include "monitor.h"
#include "sys.h"

struct notification {
    uint64_t start, end;
    enum usermm_cause cause;
    usermm_device *hit; /* each device once, linked by next_hit */
};

static void append(struct um_region *region) {
    usermm_device *device = region->device;
    region->queued = true;
    region->next_queued = NULL;
    region->previous_queued = device->last_queued;
    *(device->last_queued ? &device->last_queued->next_queued : &device->first_queued) = region;
    device->last_queued = region;
}

static void unlink_queued(struct um_region *region) {
    usermm_device *device = region->device;
    *(region->previous_queued ? &region->previous_queued->next_queued : &device->first_queued) = region->next_queued;
    *(region->next_queued ? &region->next_queued->previous_queued : &device->last_queued) = region->previous_queued;
    region->queued = false;
}

/* A second hit before the event was read leaves no single range to name; version 1 toggles the flag instead. */
static void hit(struct um_node *node, void *context) {
    struct notification *notification = context;
    struct um_region *region = (struct um_region *)node; /* by_start comes first */
    usermm_device *device = region->device;
    if (region->queued) {
        region->hint = device->abi == USERMM_ABI_UMMUNOT && !region->hint;
    } else {
        append(region);
        region->hint = true;
        region->hint_start = notification->start;
        region->hint_end = notification->end;
        region->cause = (uint8_t)notification->cause;
    }
    if (!device->is_hit) {
        device->is_hit = true;
        device->next_hit = notification->hit;
        notification->hit = device;
    }
}

void um_queue_advance(usermm_device *device) {
    uint64_t generation = atomic_load(&device->generation) + 1;
    atomic_store(&device->generation, generation);
    um_gate_show(device, generation);
}

/* One byte for each notification, as each one owes a SIGIO. A full pipe polls readable and needs no more. */
static int signal_readable(usermm_device *device) {
    um_device_wake(device);
    if (device->coalesces && device->signalled)
        return 0;
    device->signalled = true;
    if (!um_device_has(device, device->signal_fd))
        return -EBADF;
    return um_sys_write(device->signal_fd, UM_MARK, 1) < 0 && errno != EAGAIN ? -errno : 0;
}

int um_queue_notify(uint64_t start, uint64_t end, enum usermm_cause cause) {
    struct notification notification = {.start = start, .end = end, .cause = cause};
    int result = 0;
    um_tree_visit(um_monitor.regions, start, end, hit, &notification);
    for (usermm_device *device = notification.hit; device; device = device->next_hit) {
        device->is_hit = false;
        um_queue_advance(device);
        if (um_monitor.trace)
            um_monitor.trace(device, start, end, cause);
        int failed = signal_readable(device);
        if (result == 0)
            result = failed;
    }
    return result;
}

/* Before pipes knew RWF_NOWAIT a read of no more than is there has to do. */
static ssize_t read_now(int fd, void *buffer, size_t size) {
    struct iovec into = {buffer, size};
    ssize_t done = preadv2(fd, &into, 1, -1, RWF_NOWAIT);
    return done < 0 && errno == EOPNOTSUPP ? read(fd, buffer, size) : done;
}

static void empty_pipe(const usermm_device *device) {
    char bytes[256]; /* who reads may be a signal's handler on a small stack */
    /* Counted, not read until EAGAIN: whoever has the descriptor can make it a blocking one (F_SETFL, O_ASYNC does). */
    int waiting = 0;
    if (!um_device_has(device, device->ready_fd))
        return;
    while (ioctl(device->ready_fd, FIONREAD, &waiting) == 0 && waiting > 0)
        if (read_now(device->ready_fd, bytes, (size_t)waiting < sizeof bytes ? (size_t)waiting : sizeof bytes) <= 0)
            return;
}

/* With nothing left to read the device must stop polling readable. */
static void clear_readable(const usermm_device *device) {
    if (!device->first_queued && !device->last_owed && !device->coalesces)
        empty_pipe(device);
}

void um_device_coalesce(usermm_device *device) {
    sigset_t saved;
    um_lock(&saved);
    device->coalesces = true;
    um_unlock(&saved);
}

void um_device_rest(usermm_device *device) {
    sigset_t saved;
    um_lock(&saved);
    if (device->signalled && um_device_state(device) == 0)
        empty_pipe(device);
    device->signalled = false;
    um_unlock(&saved);
}

/* Somebody took bytes out of the pipe who is none of us: who polls must go on seeing what there is. */
void um_device_rearm(usermm_device *device) {
    int waiting = 0;
    sigset_t saved;
    if (um_device_state(device))
        return;
    um_lock(&saved);
    if ((device->first_queued || device->last_owed) && um_device_state(device) == 0 &&
        um_device_has(device, device->ready_fd) && um_device_has(device, device->signal_fd) &&
        ioctl(device->ready_fd, FIONREAD, &waiting) == 0 && waiting == 0)
        um_sys_write(device->signal_fd, UM_MARK, 1);
    um_unlock(&saved);
}

unsigned um_queue_take(usermm_device *device, struct um_region **ret_regions, unsigned capacity) {
    unsigned count = 0;
    sigset_t saved;
    um_lock(&saved);
    while (count < capacity && device->first_queued) {
        ret_regions[count++] = device->first_queued;
        um_queue_remove(device->first_queued);
    }
    um_unlock(&saved);
    return count;
}

void um_queue_remove(struct um_region *region) {
    usermm_device *device = region->device;
    um_tree_remove(&um_monitor.regions, &region->by_start);
    region->by_start.serial = 0;
    if (region->by_cookie.serial)
        um_tree_remove(&device->cookies, &region->by_cookie);
    um_monitor.region_count--;
    if (region->queued) {
        unlink_queued(region);
        clear_readable(device);
    }
}

static struct usermm_event describe(const struct um_region *region) {
    uint64_t start = region->by_start.key, end = region->by_start.end;
    struct usermm_event event = {
        .type = USERMM_EVENT_INVAL,
        .hint_start = start,
        .hint_end = end,
        .user_cookie_counter = region->by_cookie.key,
    };
    if (region->hint) {
        event.flags = USERMM_EVENT_FLAG_HINT;
        event.hint_start = region->hint_start > start ? region->hint_start : start;
        event.hint_end = region->hint_end < end ? region->hint_end : end;
    }
    return event;
}

/*
 * Fills up to `capacity` events. When the queue runs dry a LAST follows, in this read if there is room, else version 2
 * owes it to the next. `ret_is_last`: it was given.
 */
static unsigned take(usermm_device *device, struct usermm_event *events, unsigned capacity, bool *ret_is_last) {
    unsigned count = 0;
    for (; count < capacity && device->first_queued; count++) {
        events[count] = describe(device->first_queued);
        unlink_queued(device->first_queued);
    }
    *ret_is_last = count < capacity;
    device->last_owed = device->abi == USERMM_ABI_UMMUNOTIFY && !*ret_is_last;
    if (*ret_is_last)
        events[count++] = (struct usermm_event){
            .type = USERMM_EVENT_LAST,
            .user_cookie_counter = atomic_load(&device->generation),
        };
    clear_readable(device);
    return count;
}

/* A part of one read: the first one finds out whether there is anything. The number of events, or -errno. */
static int take_piece(usermm_device *device, struct usermm_event *events, unsigned room, bool is_first,
                      bool *ret_is_last) {
    unsigned count = 0;
    sigset_t saved;
    um_lock(&saved);
    int result = um_device_state(device);
    if (result == 0 && is_first) {
        atomic_store(&device->used, true);
        result = device->first_queued || device->last_owed ? 0 : -EAGAIN;
    }
    if (result == 0 && room)
        count = take(device, events, room, ret_is_last);
    um_unlock(&saved);
    return result ? result : (int)count;
}

/* In pieces, for the stack's sake. A bad buffer loses all that would have gone there, as in the driver. */
static ssize_t read_events(usermm_device *device, char *buffer, unsigned capacity) {
    struct usermm_event events[UM_EVENTS_PER_PIECE];
    bool is_last = false, faults = false;
    unsigned done = 0;
    do {
        unsigned room = capacity - done < UM_EVENTS_PER_PIECE ? capacity - done : UM_EVENTS_PER_PIECE;
        int count = take_piece(device, events, room, done == 0, &is_last);
        if (count < 0)
            return done ? (ssize_t)(done * sizeof *events) : count;
        faults = faults || um_copy_out(buffer + done * sizeof *events, events, (size_t)count * sizeof *events);
        done += (unsigned)count;
    } while (done < capacity && !is_last);
    return faults ? -EFAULT : (ssize_t)(done * sizeof *events);
}

ssize_t usermm_read(usermm_device *device, void *buffer, size_t size) {
    size_t most = size / sizeof(struct usermm_event);
    int state = um_device_state(device);
    if (state)
        return state; /* a child made past fork's handlers may find the lock taken for ever */
    um_settle();
    return read_events(device, buffer, most < UM_EVENTS_PER_READ ? (unsigned)most : UM_EVENTS_PER_READ);
}
