/* The reader thread: from a message of the kernel to what it does to regions. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>

#include "device.h"
#include "gate.h"
#include "kernel.h"
#include "monitor.h"
#include "sys.h"

#define MESSAGES_PER_READ 16
#define LOOK_AGAIN_MS 1000

static int apply(const struct uffd_msg *message) {
    atomic_fetch_add_explicit(&um_monitor.notifications, 1, memory_order_relaxed);
    switch (message->event) {
    case UFFD_EVENT_UNMAP:
        return um_queue_notify(message->arg.remove.start, message->arg.remove.end, USERMM_CAUSE_UNMAP);
    case UFFD_EVENT_REMOVE:
        return um_queue_notify(message->arg.remove.start, message->arg.remove.end, USERMM_CAUSE_DISCARD);
    case UFFD_EVENT_REMAP:
        return um_queue_notify(message->arg.remap.from, message->arg.remap.from + message->arg.remap.len,
                               USERMM_CAUSE_REMAP);
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

/*
 * Odd and shut before the read that lets the unmapping thread go on: whoever sees odd, or loads the generation from the
 * mapped page, waits for what that thread did. 1, 0: the monitor has ended, -errno: it has to.
 */
static int begin(uint64_t epoch) {
    pthread_mutex_lock(&um_monitor.lock);
    int result = atomic_load(&um_monitor.page->epoch) == epoch;
    if (result) {
        atomic_fetch_add(&um_monitor.page->in_flight, 1);
        int shut = um_gate_shut();
        result = shut ? shut : 1;
    }
    pthread_mutex_unlock(&um_monitor.lock);
    return result;
}

static int finish(int result) {
    pthread_mutex_lock(&um_monitor.lock);
    if (result < 0)
        um_monitor_fail_locked(-result);
    int opened = um_gate_open();
    if (opened < 0)
        um_monitor_fail_locked(-opened);
    pthread_mutex_unlock(&um_monitor.lock);
    atomic_fetch_add(&um_monitor.page->in_flight, 1);
    return result < 0 ? result : opened;
}

/* One turn: whatever woke the poll, or why it failed. 1 to go on, 0: the monitor has ended, -errno: it has failed. */
static int serve(uint64_t epoch, int ready, const struct pollfd *fds) {
    int number = errno, result = 0;
    if (ready > 0 && fds[1].revents) {
        result = um_gate_attend();
        if (result == 0 && !fds[0].revents)
            return 1;
    }
    int begun = begin(epoch);
    if (begun == 0)
        return 0;
    if (begun < 0)
        result = begun;
    else if (ready < 0 && number != EINTR)
        result = -number;
    if (result == 0 && ready >= 0)
        result = drain(fds[0].fd);
    result = finish(result);
    return result ? result : 1;
}

/*
 * Lets all waiting threads go. Another file takes the number until the monitor stops, so that a call which has just
 * loaded it reaches no stranger's. A descriptor that is not ours any more is left alone: the file ends with our poll.
 */
static void release_watches(int uffd) {
    if (!um_means_lost(-um_probe()) && dup3(um_monitor.maps_fd, uffd, O_CLOEXEC) < 0)
        close(uffd);
}

/* And who still waits at the gate: nobody attends it any more. The pages are there. */
static void release_gate(int gate) {
    if (um_gate_attend() == 0 && dup3(um_monitor.maps_fd, gate, O_CLOEXEC) < 0)
        close(gate);
}

/*
 * The reader. It never takes the interpreter's lock, allocates, frees or unmaps; all signals are blocked, so no handler
 * runs here. Even its exit must come after the release: a thread's end discards its stack, which may be watched.
 *
 * The limit on poll is for strangers: poll keeps the file alive but looks its number up anew, so with another file in
 * our number a message wakes it in vain, and whoever sent it would wait for ever.
 */
void *um_reader(void *argument) {
    uint64_t epoch = (uint64_t)(uintptr_t)argument;
    struct pollfd fds[] = {{.fd = um_monitor.uffd, .events = POLLIN}, {.fd = um_monitor.gate_fd, .events = POLLIN}};
    /* The last read may have taken the doorbell's message with its own, and then nothing more wakes the poll. */
    bool is_alone = false;
    for (int going = 1; going > 0 && atomic_load(&um_monitor.page->epoch) == epoch;) {
        int ready = um_sys_poll(fds, 2, LOOK_AGAIN_MS);
        is_alone = ready == 0 && um_sys_is_alone();
        if (is_alone)
            um_monitor_fail(epoch, ECANCELED); /* what runs at exit frees memory, and nobody will read that */
        else
            going = serve(epoch, ready, fds);
    }
    release_watches(fds[0].fd);
    release_gate(fds[1].fd);
    if (is_alone)
        exit(0); /* as libc does in a program's last thread */
    return NULL;
}
