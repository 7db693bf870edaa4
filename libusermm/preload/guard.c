#define _GNU_SOURCE
#include "guard.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "monitor.h"
#include "sys.h"

_Thread_local unsigned um_guard_depth;
static _Atomic pid_t process; /* that opened a device, or a forked child of it */
static void (*at_fork)(void);

void um_guard_enter(struct um_guard *guard) {
    if (um_guard_depth == 0) {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &guard->signals);
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &guard->cancel_state);
    }
    um_guard_depth++;
}

void um_guard_leave(const struct um_guard *guard) {
    if (--um_guard_depth)
        return;
    pthread_setcancelstate(guard->cancel_state, NULL);
    pthread_sigmask(SIG_SETMASK, &guard->signals, NULL);
}

bool um_guard_is_inside(void) {
    return um_guard_depth != 0;
}

static void in_child(void) {
    atomic_store(&process, (pid_t)syscall(SYS_getpid));
    um_guard_depth = 0;
    at_fork();
}

void um_process_is_known(void (*in_forked_child)(void)) {
    if (atomic_load(&process))
        return;
    at_fork = in_forked_child;
    pthread_atfork(NULL, NULL, in_child);
    atomic_store(&process, (pid_t)syscall(SYS_getpid));
}

/* A child with memory of its own that was made past fork's handlers finds a page wiped, and becomes a forked one. */
bool um_is_vfork_child(void) {
    if (atomic_load(&process) == 0 || atomic_load(&process) == (pid_t)syscall(SYS_getpid))
        return false;
    if (!um_monitor.page || atomic_load(&um_monitor.page->life))
        return true;
    in_child();
    return false;
}
