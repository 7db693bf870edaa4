#define _GNU_SOURCE
#include "device.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <time.h>

#include "monitor.h"
#include "sys.h"

#define SHUT_DOWN UINT64_MAX
#define REGIONS_PER_LOCK 64
#define WAIT_SLICE_MS 1000
#define CHECK_WAIT_NS 100000000   /* an answer of "changed" costs the caller a registration */
#define REGISTER_WAIT_NS 10000000 /* going on costs at most an event from before */

int um_device_state(const usermm_device *device) {
    uint64_t epoch = atomic_load(&device->epoch);
    if (epoch == atomic_load(&um_monitor.page->epoch))
        return 0;
    if (epoch == SHUT_DOWN)
        return -EBADF;
    return device->process != getpid() ? -ECHILD : -EIO;
}

static void free_device(usermm_device *device) {
    int fds[] = {device->ready_fd, device->signal_fd, device->page_fd};
    for (int i = 0; i < 3; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    free(device);
}

int usermm_open(int abi, int flags, usermm_device **ret_device) {
    if ((abi != USERMM_ABI_UMMUNOT && abi != USERMM_ABI_UMMUNOTIFY) || (flags & O_ACCMODE) != O_RDONLY)
        return -EINVAL;
    usermm_device *device = um_sys_alloc(sizeof *device);
    if (!device)
        return -ENOMEM;
    device->abi = abi;
    device->flags = flags;
    device->process = getpid();
    int fds[2] = {-1, -1};
    int result = (um_fault("pipe2") ? um_sys_fail(EMFILE) : pipe2(fds, O_CLOEXEC | O_NONBLOCK)) ? -errno : 0;
    device->ready_fd = fds[0];
    device->signal_fd = fds[1];
    device->page_fd = -1;
    if (result == 0)
        result = um_monitor_join(device);
    if (result) {
        free_device(device);
        return result;
    }
    *ret_device = device;
    return 0;
}

/* Takes up to REGIONS_PER_LOCK regions off, so that the reader never waits long for a device with a million of them. */
static bool free_some_regions(usermm_device *device) {
    struct um_region *gone[REGIONS_PER_LOCK];
    unsigned count = 0;
    sigset_t saved;
    um_lock(&saved);
    while (count < REGIONS_PER_LOCK && device->cookies) {
        struct um_node *root = device->cookies;
        struct um_region *region = (struct um_region *)((char *)root - offsetof(struct um_region, by_cookie));
        um_queue_remove(region);
        gone[count++] = region;
    }
    um_unlock(&saved);
    for (unsigned i = 0; i < count; i++)
        free(gone[i]);
    return count != 0;
}

/* The write end goes at once, which wakes who polls; the read end when the last of them has left. */
static void close_pipe(usermm_device *device) {
    sigset_t saved;
    um_lock(&saved);
    if (device->process != getpid())
        device->waiters = 0; /* they wait in the parent */
    int fds[] = {device->signal_fd, device->page_fd, device->waiters ? -1 : device->ready_fd};
    device->signal_fd = device->page_fd = -1;
    if (!device->waiters)
        device->ready_fd = -1;
    bool lost = um_monitor.descriptors_lost && device->process == getpid();
    um_unlock(&saved);
    for (int i = 0; i < 3; i++)
        if (fds[i] >= 0 && !lost)
            close(fds[i]);
}

void usermm_shutdown(usermm_device *device) {
    bool inherited = device->process != getpid();
    if (atomic_exchange(&device->epoch, SHUT_DOWN) == SHUT_DOWN)
        return;
    while (!inherited && free_some_regions(device))
        ;
    close_pipe(device);
    if (!inherited)
        um_monitor_leave(device);
}

void usermm_close(usermm_device *device) {
    usermm_shutdown(device);
    if (device->page)
        munmap((void *)device->page, (size_t)sysconf(_SC_PAGESIZE));
    free_device(device);
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/*
 * Bounded: while several threads do nothing but discard watched memory there is no quiet moment at all, and the kernel
 * does not tell whose change is under way. With `seen`, a generation that has moved on ends it early: that answers a
 * check.
 */
static int wait_until_quiet(const usermm_device *device, const uint64_t *seen, int64_t limit_ns) {
    int64_t deadline_ns = 0;
    for (unsigned attempt = 0;; attempt++) {
        int busy = um_probe();
        if (busy <= 0 || (seen && atomic_load(&device->generation) != *seen))
            return busy;
        if (limit_ns == 0)
            return -EAGAIN;
        um_backoff(attempt);
        if (deadline_ns == 0)
            deadline_ns = now_ns() + limit_ns;
        else if (now_ns() > deadline_ns)
            return busy;
    }
}

/* The descriptor is not our userfaultfd: the device was shut down meanwhile, or the monitor has to fail. */
static int lost(const usermm_device *device, int result) {
    um_monitor_fail(atomic_load(&device->epoch), -result);
    return um_device_state(device);
}

/* 0 quiet, 1 not, -EAGAIN not and no time to wait, or another errno. A descriptor that is not ours any more fails the
 * monitor. */
static int quiesce(const usermm_device *device, const uint64_t *seen, int64_t limit_ns) {
    int state = um_device_state(device);
    if (state)
        return state;
#ifdef USERMM_WITHOUT_PROBE
    (void)seen, (void)limit_ns, (void)wait_until_quiet;
    return 0;
#else
    int busy = wait_until_quiet(device, seen, limit_ns);
    return busy >= 0 || busy == -EAGAIN ? busy : lost(device, busy);
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
    int busy = probe == USERMM_PROBE_NONE ? 0 : quiesce(device, &seen, limit_ns);
    int result = busy < 0 ? busy : usermm_generation(device, &generation);
    return result ? result : !busy && generation == seen;
}

static int insert(usermm_device *device, struct um_region *region) {
    sigset_t saved;
    um_lock(&saved);
    int result = um_device_state(device);
    if (result == 0 && um_tree_find(device->cookies, region->by_cookie.key))
        result = -EINVAL;
    if (result == 0) {
        region->by_start.serial = region->by_cookie.serial = ++um_monitor.next_serial;
        um_tree_insert(&um_monitor.regions, &region->by_start);
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
        region = (struct um_region *)((char *)node - offsetof(struct um_region, by_cookie));
        um_queue_remove(region);
    }
    um_unlock(&saved);
    free(region);
    return region ? 0 : -EINVAL;
}

/*
 * Quiet first, or a change from before would be reported; then insert, then watch, so that no change after is missed.
 * Once inserted the region belongs to the device: another thread may unregister it, so only its serial is kept.
 */
int usermm_register(usermm_device *device, uint64_t start, uint64_t end, uint64_t cookie, unsigned flags) {
    int result = quiesce(device, NULL, REGISTER_WAIT_NS);
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
    result = insert(device, region);
    if (result) {
        free(region);
        return result;
    }
    uint64_t serial = region->by_cookie.serial;
    result = um_watch(start, end, flags);
    if (result)
        withdraw(device, cookie, serial);
    return result == -EBADF || result == -ENOTTY ? lost(device, result) : result;
}

int usermm_unregister(usermm_device *device, uint64_t cookie) {
    um_settle();
    int state = um_device_state(device);
    return state ? state : withdraw(device, cookie, 0);
}

int usermm_fileno(usermm_device *device) {
    int state = um_device_state(device);
    return state == -ECHILD || state == -EBADF ? state : device->ready_fd;
}

int usermm_flags(const usermm_device *device) {
    return device->flags;
}

/* Enters or leaves the poll; the last one out after a shutdown closes the read end. */
static int count_waiter(usermm_device *device, int change) {
    sigset_t saved;
    um_lock(&saved);
    device->waiters += (unsigned)change;
    int fd = device->ready_fd;
    bool close_it = change < 0 && device->waiters == 0 && device->signal_fd < 0;
    if (close_it)
        device->ready_fd = -1;
    um_unlock(&saved);
    if (close_it && fd >= 0)
        close(fd);
    return fd;
}

/* In slices: when the descriptors were lost, nothing that this thread sleeps on will ever be written to. */
static int poll_in_slices(const usermm_device *device, int fd, int timeout_ms) {
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    for (int left_ms = timeout_ms;;) {
        int slice_ms = left_ms < 0 || left_ms > WAIT_SLICE_MS ? WAIT_SLICE_MS : left_ms;
        int count = um_sys_poll(&ready, 1, slice_ms);
        if (count < 0)
            return -errno;
        left_ms -= timeout_ms < 0 ? 0 : slice_ms;
        if (count > 0 || left_ms == 0 || um_device_state(device))
            return count > 0;
    }
}

int usermm_wait(usermm_device *device, int timeout_ms) {
    int state = um_device_state(device);
    if (state)
        return state;
    int result = poll_in_slices(device, count_waiter(device, 1), timeout_ms);
    count_waiter(device, -1);
    state = um_device_state(device);
    return state ? state : result;
}
