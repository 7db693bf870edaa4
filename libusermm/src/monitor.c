#define _GNU_SOURCE
#include "monitor.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <time.h>

#include "device.h"
#include "kernel.h"
#include "sys.h"
#include "userfaultfd.h"

#define MESSAGES_PER_READ 16
#define READER_STACK_BYTES (512 * 1024)
#define LOOK_AGAIN_MS 1000

struct um_monitor um_monitor = {
    .uffd = -1,
    .maps_fd = -1,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

/* Starting and stopping. The reader never takes it, so it may be held over allocations. */
static pthread_mutex_t lifecycle = PTHREAD_MUTEX_INITIALIZER;

void um_lock(sigset_t *ret_saved) {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, ret_saved);
    pthread_mutex_lock(&um_monitor.lock);
}

void um_unlock(const sigset_t *saved) {
    pthread_mutex_unlock(&um_monitor.lock);
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

static bool means_lost(int number) {
    return number == EBADF || number == ENOTTY;
}

/* With the lock held. */
static void fail(int reason) {
    if (um_monitor.failure)
        return;
    um_monitor.failure = reason;
    /* One of ours closed by a stranger, be it a pipe: none of the numbers is sure any more. */
    um_monitor.descriptors_lost = means_lost(reason) || means_lost(-um_probe());
    atomic_store(&um_monitor.page->epoch, 0);
    for (usermm_device *device = um_monitor.devices; device; device = device->next) {
        um_queue_advance(device);
        if (!um_monitor.descriptors_lost && write(device->signal_fd, "", 1) < 0)
            continue; /* full: it polls readable already */
    }
}

void um_monitor_fail(uint64_t epoch, int reason) {
    sigset_t saved;
    um_lock(&saved);
    if (atomic_load(&um_monitor.page->epoch) == epoch)
        fail(reason);
    um_unlock(&saved);
}

static int apply(const struct uffd_msg *message) {
    atomic_fetch_add_explicit(&um_monitor.notifications, 1, memory_order_relaxed);
    switch (message->event) {
    case UFFD_EVENT_UNMAP:
    case UFFD_EVENT_REMOVE:
        return um_queue_notify(message->arg.remove.start, message->arg.remove.end);
    case UFFD_EVENT_REMAP:
        return um_queue_notify(message->arg.remap.from, message->arg.remap.from + message->arg.remap.len);
    default:
        return -EPROTO;
    }
}

/* One read and what it brought. The descriptor is tried first: reading a stranger's file would take its data. */
static int drain(int uffd) {
    struct uffd_msg messages[MESSAGES_PER_READ];
    int result = um_probe();
    if (result < 0)
        return result;
    ssize_t size = um_sys_read(uffd, messages, sizeof messages);
    if (size < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno; /* EAGAIN: the unmapping thread was killed */
    if (size % (ssize_t)sizeof *messages)
        return -EPROTO;
    result = 0;
    pthread_mutex_lock(&um_monitor.lock);
    for (ssize_t i = 0; i < size / (ssize_t)sizeof *messages && result == 0; i++)
        result = apply(&messages[i]);
    pthread_mutex_unlock(&um_monitor.lock);
    return result;
}

/* Odd before the read that lets the unmapping thread go on: whoever sees odd waits for what that thread did. */
static bool begin(uint64_t epoch) {
    pthread_mutex_lock(&um_monitor.lock);
    bool alive = atomic_load(&um_monitor.page->epoch) == epoch;
    if (alive)
        atomic_fetch_add(&um_monitor.page->in_flight, 1);
    pthread_mutex_unlock(&um_monitor.lock);
    return alive;
}

static void finish(int result) {
    if (result < 0) {
        pthread_mutex_lock(&um_monitor.lock);
        fail(-result);
        pthread_mutex_unlock(&um_monitor.lock);
    }
    atomic_fetch_add(&um_monitor.page->in_flight, 1);
}

/*
 * Lets all waiting threads go. Another file takes the number until the monitor stops, so that a call which has just
 * loaded it reaches no stranger's. A descriptor that is not ours any more is left alone: the file ends with our poll.
 */
static void release_watches(int uffd) {
    if (!means_lost(-um_probe()) && dup3(um_monitor.maps_fd, uffd, O_CLOEXEC) < 0)
        close(uffd);
}

/*
 * The reader. It never takes the interpreter's lock, allocates, frees or unmaps; all signals are blocked, so no handler
 * runs here. Even its exit must come after the release: a thread's end discards its stack, which may be watched.
 *
 * The limit on poll is for strangers: poll keeps the file alive but looks its number up anew, so with another file in
 * our number a message wakes it in vain, and whoever sent it would wait for ever.
 */
static void *reader(void *argument) {
    uint64_t epoch = (uint64_t)(uintptr_t)argument;
    struct pollfd fd = {.fd = um_monitor.uffd, .events = POLLIN};
    /* The last read may have taken the doorbell's message with its own, and then nothing more wakes the poll. */
    for (int result = 0; result == 0 && atomic_load(&um_monitor.page->epoch) == epoch;) {
        int ready = um_sys_poll(&fd, 1, LOOK_AGAIN_MS);
        int number = errno;
        if (!begin(epoch))
            break; /* stopped or failed */
        if (ready >= 0)
            result = drain(fd.fd);
        else if (number != EINTR)
            result = -number;
        finish(result);
    }
    release_watches(fd.fd);
    return NULL;
}

static void close_descriptors(void) {
    int fds[] = {atomic_exchange(&um_monitor.uffd, -1), um_monitor.maps_fd};
    um_monitor.maps_fd = -1;
    for (int i = 0; i < 2; i++)
        if (fds[i] >= 0 && !um_monitor.descriptors_lost)
            close(fds[i]);
}

/* A watched page whose unmapping wakes the reader for the last time. */
static void ring_doorbell(void) {
    void *page = um_monitor.doorbell;
    um_monitor.doorbell = NULL; /* first: the address may be somebody else's before munmap has returned */
    if (page)
        munmap(page, (size_t)sysconf(_SC_PAGESIZE));
}

/* A child has no reader, and its copies of the descriptors would keep the parent's threads waiting. */
static void in_child(void) {
    close_descriptors();
    ring_doorbell(); /* not watched here */
    um_monitor.open_devices = 0;
    um_monitor.failure = 0;
    um_monitor.regions = NULL; /* the parent's; not freed, another thread may have been changing them */
    um_monitor.region_count = 0;
    um_monitor.devices = NULL;
    atomic_store(&um_monitor.notifications, 0);
    um_monitor.lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    lifecycle = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
}

/* A fork in the middle of start or stop would leave the child a userfaultfd that it does not know of. */
static void before_fork(void) {
    pthread_mutex_lock(&lifecycle);
}

static void in_parent(void) {
    pthread_mutex_unlock(&lifecycle);
}

static int prepare_once(void) {
    if (um_monitor.page)
        return 0;
    void *page = um_fault("mmap") ? MAP_FAILED
                                  : mmap(NULL, (size_t)sysconf(_SC_PAGESIZE), PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return -ENOMEM;
    if (madvise(page, (size_t)sysconf(_SC_PAGESIZE), MADV_WIPEONFORK) ||
        pthread_atfork(before_fork, in_parent, in_child)) {
        munmap(page, (size_t)sysconf(_SC_PAGESIZE));
        return -ENOMEM;
    }
    um_monitor.page = page;
    return 0;
}

static int start_reader(void) {
    pthread_attr_t attributes;
    sigset_t all, saved;
    if (pthread_attr_init(&attributes))
        return -ENOMEM;
    pthread_attr_setstacksize(&attributes, READER_STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &saved);
    int result = um_fault("pthread_create")
                     ? EAGAIN
                     : pthread_create(&um_monitor.reader, &attributes, reader, (void *)(uintptr_t)um_monitor.epoch);
    pthread_sigmask(SIG_SETMASK, &saved, NULL);
    pthread_attr_destroy(&attributes);
    return result ? -ENOMEM : 0;
}

/* /proc/self/maps for questions about mappings, and a placeholder for release_watches; where there is no /proc, only
 * that. */
static int open_maps(void) {
    int fd = um_fault("open") ? um_sys_fail(EMFILE) : open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    um_monitor.maps_fd = fd >= 0 || errno == EMFILE || errno == ENFILE ? fd : open("/", O_PATH | O_CLOEXEC);
    return um_monitor.maps_fd < 0 ? -errno : 0;
}

static int hang_doorbell(void) {
    size_t size = (size_t)sysconf(_SC_PAGESIZE);
    void *page = um_fault("mmap") ? MAP_FAILED : mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return -ENOMEM;
    um_monitor.doorbell = page;
    struct uffdio_register request = {.range = {(uintptr_t)page, size}, .mode = UFFDIO_REGISTER_MODE_WP};
    return um_sys_ioctl(um_monitor.uffd, UFFDIO_REGISTER, &request) ? -errno : 0;
}

static int start(void) {
    int uffd, result = prepare_once();
    if (result == 0)
        result = um_userfaultfd_open(&uffd);
    if (result)
        return result;
    atomic_store(&um_monitor.uffd, uffd);
    um_monitor.failure = 0;
    um_monitor.descriptors_lost = false;
    um_monitor.process = getpid();
    um_monitor.epoch++;
    result = open_maps();
    if (result == 0)
        result = hang_doorbell();
    atomic_store(&um_monitor.page->epoch, um_monitor.epoch);
    if (result == 0)
        result = start_reader();
    if (result) {
        atomic_store(&um_monitor.page->epoch, 0);
        close_descriptors(); /* before the doorbell: nobody would read its message */
        ring_doorbell();
    }
    return result;
}

static void stop(void) {
    sigset_t saved;
    um_lock(&saved);
    atomic_store(&um_monitor.page->epoch, 0); /* from here on the reader begins nothing */
    if (!um_monitor.failure)                  /* after a failure the number may hold the placeholder */
        um_monitor.descriptors_lost = means_lost(-um_probe());
    um_unlock(&saved);
    ring_doorbell();
    pthread_join(um_monitor.reader, NULL);
    close_descriptors();
}

int um_monitor_join(usermm_device *device) {
    sigset_t saved;
    pthread_mutex_lock(&lifecycle);
    if (um_monitor.open_devices && um_monitor.process != getpid())
        in_child(); /* made by a bare clone, past fork's handlers */
    um_lock(&saved);
    int result = um_monitor.failure && um_monitor.open_devices ? -EIO : 0;
    um_unlock(&saved);
    if (result == 0 && um_monitor.open_devices == 0)
        result = start();
    if (result == 0) {
        um_monitor.open_devices++;
        um_lock(&saved);
        atomic_store(&device->epoch, um_monitor.epoch);
        device->next = um_monitor.devices;
        device->link = &um_monitor.devices;
        if (device->next)
            device->next->link = &device->next;
        um_monitor.devices = device;
        um_unlock(&saved);
    }
    pthread_mutex_unlock(&lifecycle);
    return result;
}

void um_monitor_leave(usermm_device *device) {
    sigset_t saved;
    pthread_mutex_lock(&lifecycle);
    um_lock(&saved);
    *device->link = device->next;
    if (device->next)
        device->next->link = device->link;
    um_unlock(&saved);
    if (--um_monitor.open_devices == 0)
        stop();
    pthread_mutex_unlock(&lifecycle);
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
