/* Starting the monitor for the first device, stopping it after the last one, and forks in between. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>

#include "device.h"
#include "gate.h"
#include "kernel.h"
#include "monitor.h"
#include "page.h"
#include "sys.h"
#include "userfaultfd.h"

#define READER_STACK_BYTES (512 * 1024)

/* Starting and stopping. The reader never takes it, so it may be held over allocations. */
static pthread_mutex_t lifecycle = PTHREAD_MUTEX_INITIALIZER;

static void close_descriptors(void) {
    int fds[] = {atomic_exchange(&um_monitor.uffd, -1), um_monitor.gate_fd, um_monitor.maps_fd};
    um_monitor.gate_fd = um_monitor.maps_fd = -1;
    for (int i = 0; i < 3; i++)
        if (fds[i] >= 0 && !um_monitor.descriptors_lost)
            close(fds[i]);
}

/* A watched page whose unmapping wakes the reader for the last time. */
static void ring_doorbell(void) {
    void *page = um_monitor.doorbell;
    um_monitor.doorbell = NULL; /* first: the address may be somebody else's before munmap has returned */
    if (page)
        munmap(page, um_page_size());
}

/* Process ids will not do: a child that is the first of a new pid namespace can have its parent's. */
static void begin_life(void) {
    atomic_store(&um_monitor.page->life, ++um_monitor.lives);
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
    begin_life();
}

/*
 * A fork in the middle of start or stop would leave the child a userfaultfd that it does not know of. No signal's
 * handler may run until the lock is released: it could want it.
 */
static sigset_t before_fork_signals; /* guarded by the lock */

static void before_fork(void) {
    sigset_t all, saved;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &saved);
    pthread_mutex_lock(&lifecycle);
    before_fork_signals = saved;
}

static void in_parent(void) {
    sigset_t saved = before_fork_signals;
    pthread_mutex_unlock(&lifecycle);
    pthread_sigmask(SIG_SETMASK, &saved, NULL);
}

static void in_forked_child(void) {
    sigset_t saved = before_fork_signals;
    for (usermm_device *device = um_monitor.devices; device; device = device->next)
        um_page_inherit(device);
    if (um_monitor.page)
        in_child();
    else
        pthread_mutex_unlock(&lifecycle);
    pthread_sigmask(SIG_SETMASK, &saved, NULL);
}

int um_watch_forks(void) {
    static atomic_bool watched;
    if (atomic_load(&watched))
        return 0;
    if (pthread_atfork(before_fork, in_parent, in_forked_child))
        return -ENOMEM;
    atomic_store(&watched, true);
    return 0;
}

void um_lifecycle_lock(void) {
    pthread_mutex_lock(&lifecycle);
}

void um_lifecycle_unlock(void) {
    pthread_mutex_unlock(&lifecycle);
}

static int prepare_once(void) {
    if (um_monitor.page)
        return 0;
    void *page = um_fault("mmap")
                     ? MAP_FAILED
                     : mmap(NULL, um_page_size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return -ENOMEM;
    if (madvise(page, um_page_size(), MADV_WIPEONFORK) || um_watch_forks()) {
        munmap(page, um_page_size());
        return -ENOMEM;
    }
    atomic_store(&((struct um_page *)page)->life, ++um_monitor.lives);
    __atomic_store_n(&um_monitor.page, page, __ATOMIC_RELEASE);
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
                     : pthread_create(&um_monitor.reader, &attributes, um_reader, (void *)(uintptr_t)um_monitor.epoch);
    pthread_sigmask(SIG_SETMASK, &saved, NULL);
    pthread_attr_destroy(&attributes);
    return result ? -ENOMEM : 0;
}

/* /proc/self/maps for questions about mappings, and a placeholder for release_watches; where there is no /proc, only
 * that. */
static int open_maps(void) {
    int fd = um_fault("open") ? um_sys_fail(EMFILE) : open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (fd < 0 && errno != EMFILE && errno != ENFILE)
        fd = open("/", O_PATH | O_CLOEXEC);
    um_monitor.maps_fd = fd < 0 ? fd : um_sys_out_of_the_way(fd);
    return fd < 0 ? -errno : 0;
}

static int hang_doorbell(void) {
    size_t size = um_page_size();
    void *page = um_fault("mmap") ? MAP_FAILED : mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return -ENOMEM;
    um_monitor.doorbell = page;
    struct uffdio_register request = {.range = {(uintptr_t)page, size}, .mode = UFFDIO_REGISTER_MODE_WP};
    return um_sys_ioctl(um_monitor.uffd, UFFDIO_REGISTER, &request) ? -errno : 0;
}

static int start(void) {
    int uffd = -1, result = prepare_once();
    if (result == 0)
        result = um_userfaultfd_open(&uffd);
    if (result)
        return result;
    atomic_store(&um_monitor.uffd, uffd);
    um_monitor.failure = 0;
    um_monitor.descriptors_lost = false;
    um_monitor.epoch++;
    result = um_userfaultfd_open_gate(&um_monitor.gate_fd);
    if (result == 0)
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
    if (!um_monitor
             .failure) /* while the epoch lives: then the number does not hold the placeholder of release_watches */
        um_monitor.descriptors_lost = um_means_lost(-um_probe());
    atomic_store(&um_monitor.page->epoch, 0); /* from here on the reader begins nothing */
    um_unlock(&saved);
    ring_doorbell();
    pthread_join(um_monitor.reader, NULL);
    close_descriptors();
}

/* A child made by a bare clone came past fork's handlers: one thread, and locks in any state. */
uint64_t um_life(void) {
    uint64_t life = atomic_load_explicit(&um_monitor.page->life, memory_order_acquire);
    if (life == 0)
        in_child();
    return life ? life : atomic_load(&um_monitor.page->life);
}

int um_prepare(void) {
    pthread_mutex_lock(&lifecycle);
    int result = prepare_once();
    pthread_mutex_unlock(&lifecycle);
    return result;
}

int um_monitor_join(usermm_device *device) {
    sigset_t saved;
    if (__atomic_load_n(&um_monitor.page, __ATOMIC_ACQUIRE)) /* another thread's open may be the first */
        um_life();
    pthread_mutex_lock(&lifecycle);
    um_lock(&saved);
    int result = um_monitor.failure && um_monitor.open_devices ? -EIO : 0;
    um_unlock(&saved);
    if (result == 0 && um_monitor.open_devices == 0)
        result = start();
    if (result == 0) {
        um_monitor.open_devices++;
        device->life = atomic_load(&um_monitor.page->life);
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
    um_gate_open_device(device);
    *device->link = device->next;
    if (device->next)
        device->next->link = device->link;
    um_unlock(&saved);
    um_page_rest(device);
    if (--um_monitor.open_devices == 0)
        stop();
    pthread_mutex_unlock(&lifecycle);
}
