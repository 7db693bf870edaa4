#define _GNU_SOURCE
#include "client.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "device.h"
#include "guard.h"
#include "memory.h"
#include "native.h"
#include "slots.h"
#include "trace.h"

#define LIVE UM_CLIENT_LIVE
#define LOOKS_PER_OPEN 2u /* so that ten thousand opens do not look at ten thousand clients each */

_Atomic uint32_t um_table[UM_TABLE_SIZE];
_Atomic uint32_t um_clients;
static _Atomic dev_t pipes; /* the file system of pipes: a FIFO elsewhere may have a device's inode number */
static pthread_mutex_t slots_lock = PTHREAD_MUTEX_INITIALIZER; /* making clients; inside a guard */

/* Holds it if it lives and is the pipe's; looked at again after, since a slot is used again. */
static bool hold(struct um_client *client, uint64_t inode) {
    uint64_t holders = atomic_load(&client->holders);
    do {
        if (!(holders & LIVE) || atomic_load(&client->inode) != inode)
            return false;
    } while (!atomic_compare_exchange_weak(&client->holders, &holders, holders + 1));
    if (atomic_load(&client->inode) == inode)
        return true;
    um_client_drop(client);
    return false;
}

static bool is_pipe(int fd, uint64_t *ret_inode) {
    struct stat found;
    int number = errno;
    /* Past ThreadSanitizer, which takes the number for closed when the program's close reaches us. */
    bool result = syscall(SYS_fstat, fd, &found) == 0 && S_ISFIFO(found.st_mode) && found.st_dev == atomic_load(&pipes);
    errno = number;
    *ret_inode = result ? found.st_ino : 0;
    return result;
}

static void know(int fd, uint32_t entry) {
    if ((unsigned)fd < UM_TABLE_SIZE)
        atomic_store(&um_table[fd], entry);
}

struct um_client *um_client_hold(int fd) {
    uint64_t inode;
    uint32_t entry = (unsigned)fd < UM_TABLE_SIZE ? atomic_load(&um_table[fd]) : 0;
    if (!is_pipe(fd, &inode)) {
        if (entry)
            know(fd, 0); /* closed behind us, and perhaps something else by now */
        return NULL;
    }
    if (entry && hold(um_slot_at(entry - 1), inode))
        return um_slot_at(entry - 1);
    uint32_t count = um_slot_count();
    for (uint32_t slot = 0; slot < count; slot++) {
        if (hold(um_slot_at(slot), inode)) {
            know(fd, slot + 1);
            return um_slot_at(slot);
        }
    }
    if (entry)
        know(fd, 0);
    return NULL;
}

static bool is_known_anywhere(const struct um_client *client, uint32_t entry) {
    for (uint32_t fd = 0; fd < UM_TABLE_SIZE; fd++)
        if (atomic_load_explicit(&um_table[fd], memory_order_relaxed) == entry && um_client_has(client, (int)fd))
            return true;
    return false;
}

/*
 * Whether no descriptor of the program's is left, in this process or another. When our own end was closed behind us the
 * monitor fails, and then what we know of this process has to do.
 */
static bool is_unused(const struct um_client *client, uint32_t slot) {
    usermm_device *device = client->device;
    if (um_device_is_inherited(device))
        return false;
    if (um_device_has(device, device->ready_fd))
        return flock(device->ready_fd, LOCK_EX | LOCK_NB) == 0;
    return um_device_state(device) != 0 && !is_known_anywhere(client, slot + 1);
}

/* With slots_lock held: until holders was looked at, the client may have ended, and its slot be another's. */
static void end_if_unused(uint32_t slot) {
    struct um_client *client = um_slot_at(slot);
    uint64_t nobody = LIVE;
    if (atomic_load(&client->holders) != LIVE)
        return;
    atomic_store(&client->doubtful, false);
    if (!is_unused(client, slot))
        return;
    if (atomic_compare_exchange_strong(&client->holders, &nobody, 0)) {
        atomic_fetch_sub(&um_clients, 1);
        um_trace_close(client->device);
        usermm_close(client->device);
    } else {
        atomic_store(&client->doubtful, true); /* a call is in progress: its end ends the device */
    }
}

void um_client_drop(struct um_client *client) {
    int number = errno;
    uint32_t slot = client->slot;
    if (atomic_fetch_sub(&client->holders, 1) == (LIVE | 1) && atomic_load(&client->doubtful)) {
        struct um_guard guard;
        um_guard_enter(&guard);
        pthread_mutex_lock(&slots_lock);
        end_if_unused(slot);
        pthread_mutex_unlock(&slots_lock);
        um_guard_leave(&guard);
    }
    errno = number;
}

bool um_client_has(const struct um_client *client, int fd) {
    uint64_t inode;
    return is_pipe(fd, &inode) && inode == atomic_load(&client->inode);
}

/* A cancellation acts before anything is done, as it would in the native close, and not with the client held. */
int um_client_close(int fd) {
    pthread_testcancel();
    struct um_client *client = um_client_hold(fd);
    if (!client)
        return UM_NATIVE(close)(fd);
    struct um_guard guard;
    um_guard_enter(&guard);
    know(fd, 0);
    int result = UM_NATIVE(close)(fd), number = errno;
    atomic_store(&client->doubtful, true);
    um_client_drop(client);
    um_guard_leave(&guard);
    errno = number;
    return result;
}

/* Descriptors can be closed past us: a device that nobody has any more is found here at the latest. */
static void look_for_unused(uint32_t looks) {
    static uint32_t next;
    uint32_t count = um_slot_count();
    for (uint32_t i = 0; i < looks && count; i++)
        end_if_unused(next++ % count);
}

/* The program's own description of the pipe, in the number that was the lowest free one when it asked. */
static int describe(usermm_device *device, int reserved, int flags) {
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", device->ready_fd);
    int fd = open(path, O_RDONLY | O_CLOEXEC | (flags & O_NONBLOCK));
    if (fd < 0)
        return errno == ENOENT ? -ENXIO : -errno; /* no /proc here; ENOENT would say that there is no device */
    int result = flock(fd, LOCK_SH | LOCK_NB) || dup3(fd, reserved, flags & O_CLOEXEC) < 0 ? -errno : 0;
    close(fd);
    return result;
}

static int publish(usermm_device *device, int fd) {
    static unsigned numbers;
    uint32_t slot;
    struct um_client *client = um_slot_find(&slot);
    if (!client)
        return -ENOMEM;
    atomic_store(&pipes, device->pipes);
    device->number = ++numbers;
    client->device = device;
    atomic_store(&client->doubtful, false);
    atomic_store(&client->inode, device->pipe);
    atomic_store(&client->holders, LIVE);
    atomic_fetch_add(&um_clients, 1);
    know(fd, slot + 1);
    return 0;
}

static int open_reserved(int abi, int flags, int reserved) {
    usermm_device *device;
    int result = usermm_open(abi, flags & (O_ACCMODE | O_NONBLOCK), &device);
    pthread_mutex_lock(&slots_lock);
    look_for_unused(result ? um_slot_count() : LOOKS_PER_OPEN);
    pthread_mutex_unlock(&slots_lock);
    if (result) /* a monitor that failed ends with its last device, and then there can be another */
        result = usermm_open(abi, flags & (O_ACCMODE | O_NONBLOCK), &device);
    if (result)
        return result;
    pthread_mutex_lock(&slots_lock);
    result = describe(device, reserved, flags);
    if (result == 0)
        result = publish(device, reserved);
    pthread_mutex_unlock(&slots_lock);
    if (result)
        usermm_close(device);
    return result;
}

void um_client_in_child(void) {
    slots_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    um_memory_in_child();
}

int um_client_open(int abi, int flags) {
    struct um_guard guard;
    um_trace_start(); /* what is refused is traced, too */
    if ((flags & O_ACCMODE) != O_RDONLY)
        return -EINVAL;
    int reserved = open("/", O_PATH | O_CLOEXEC);
    if (reserved < 0)
        return -errno;
    um_guard_enter(&guard);
    um_process_is_known();
    int result = open_reserved(abi, flags, reserved);
    um_guard_leave(&guard);
    if (result)
        close(reserved);
    return result ? result : reserved;
}
