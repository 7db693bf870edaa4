#define _GNU_SOURCE
#include "guard.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "client.h"
#include "monitor.h"
#include "sys.h"

#define OUT_OF_THE_WAY 512 /* or half of what the program may have */

_Thread_local unsigned um_guard_depth;
static _Atomic pid_t process; /* that opened a device, or a forked child of it */

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
    um_guard_depth = 0;
    if (atomic_load(&process) == 0)
        return;
    atomic_store(&process, (pid_t)syscall(SYS_getpid));
    um_client_in_child();
}

/* Before the program's own handlers are there: those that run for a fork may open and close devices. */
__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, in_child);
    um_watch_forks(); /* second: it lets signals' handlers run again in the child */
}

void um_process_is_known(void) {
    if (atomic_load(&process) == 0)
        atomic_store(&process, (pid_t)syscall(SYS_getpid));
}

/* The first thread stays to be seen until the process ends, as a zombie. */
bool um_sys_is_alone(void) {
    struct stat tasks;
    char path[64], text[128] = "";
    if (stat("/proc/self/task", &tasks) || tasks.st_nlink != 2 + 2)
        return false;
    snprintf(path, sizeof path, "/proc/self/task/%ld/stat", syscall(SYS_getpid));
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    const char *name_end = size > 0 ? strrchr(text, ')') : NULL; /* "pid (name) state" */
    return name_end && name_end[1] == ' ' && name_end[2] == 'Z';
}

int um_sys_out_of_the_way(int fd) {
    struct rlimit limit;
    int lowest = OUT_OF_THE_WAY;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur / 2 < OUT_OF_THE_WAY)
        lowest = (int)(limit.rlim_cur / 2);
    int moved = fcntl(fd, F_DUPFD_CLOEXEC, lowest);
    if (moved < 0)
        return fd;
    close(fd);
    return moved;
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
