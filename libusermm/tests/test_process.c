/* Threads, forks, signals and exits around a device. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "test.h"

/* A child tells by its exit status, since CALL may only jump in the test's own thread and process. */
static int child_sees_a_foreign_device(usermm_device *device, char *memory) {
    uint64_t generation;
    int mistakes = usermm_generation(device, &generation) != -ECHILD;
    mistakes |= usermm_check(device, 0, USERMM_PROBE_WAIT) != -ECHILD;
    mistakes |= usermm_register(device, 0, PAGE, 9, 0) != -ECHILD;
    mistakes |= usermm_fileno(device) != -ECHILD;
    munmap(memory, PAGE); /* not watched here: it must neither wait nor reach the parent */
    usermm_close(device);
    return mistakes;
}

static int child_opens_its_own(char *memory) {
    usermm_device *device;
    uint64_t start = (uintptr_t)memory, generation = 0;
    if (!test_children_can_start_threads)
        return 0;
    int result = usermm_open(2, O_RDONLY, &device);
    if (result)
        return result == -EMFILE || result == -ENOMEM ? 0 : 2; /* an injected fault may have struck here */
    result = usermm_register(device, start, start + PAGE, 1, 0);
    munmap(memory, PAGE);
    int seen = usermm_generation(device, &generation);
    usermm_close(device);
    return result || seen || generation == 1 ? 0 : 4;
}

static void check_child(pid_t child) {
    int status;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void a_forked_child_starts_anew(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    char *memory = test_map(4);
    test_register(device, memory, 4 * PAGE, 1);
    pid_t child = fork();
    if (child == 0)
        _exit(child_sees_a_foreign_device(device, memory) | child_opens_its_own(memory + 2 * PAGE));
    check_child(child);
    CHECK(test_generation(device) == 0);
    munmap(memory, PAGE);
    CHECK(test_generation(device) == 1);
}

/* Other run times make children by the bare system call, past all of fork()'s handlers. */
static void a_bare_clone_is_told_apart(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    char *memory = test_map(1);
    test_register(device, memory, PAGE, 1);
    pid_t child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (child == 0) {
        uint64_t generation;
        _exit(usermm_generation(device, &generation) != -ECHILD);
    }
    check_child(child);
    CHECK(test_generation(device) == 0);
}

/* A copy of the userfaultfd in the child would make the parent wait for a reader that is not there. */
static void a_living_child_does_not_hold_up_the_close(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    char *memory = test_map(1);
    int gate[2];
    test_register(device, memory, PAGE, 1);
    CHECK(pipe2(gate, O_CLOEXEC) == 0);
    pid_t child = fork();
    if (child == 0) {
        char byte;
        close(gate[1]);
        _exit(read(gate[0], &byte, 1) != 0);
    }
    close(gate[0]);
    usermm_shutdown(device);
    munmap(memory, PAGE);
    close(gate[1]);
    check_child(child);
}

static char *volatile handler_memory;

static void free_twice(int signal_number) {
    (void)signal_number;
    munmap(handler_memory, PAGE);
    munmap(handler_memory + 2 * PAGE, PAGE);
}

static void *send_signals(void *argument) {
    pthread_t target = *(pthread_t *)argument;
    pthread_kill(target, SIGUSR1);
    return NULL;
}

/* Two frees in one handler: the second waits for a reader that waits for the lock, if the handler could run under it.
 */
static void a_handler_that_frees_does_not_deadlock(void) {
    struct sigaction action = {.sa_handler = free_twice}, old;
    usermm_device *device = test_open(2, O_RDONLY);
    pthread_t self = pthread_self(), sender;
    char *other = test_map(1);
    sigaction(SIGUSR1, &action, &old);
    for (int round = 0; round < 300; round++) {
        handler_memory = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        test_register(device, handler_memory, 3 * PAGE, 1);
        uint64_t before = test_generation(device);
        CHECK(pthread_create(&sender, NULL, send_signals, &self) == 0);
        int result = 0;
        for (int i = 0; i < 50 && result == 0; i++) {
            uint64_t start = (uintptr_t)other;
            result = usermm_register(device, start, start + PAGE, 2, 0);
            if (result == 0)
                result = usermm_unregister(device, 2);
        }
        pthread_join(sender, NULL);
        CALL(result);
        CHECK(test_generation(device) == before + 2);
        CALL(usermm_unregister(device, 1));
        munmap(handler_memory + PAGE, PAGE);
    }
    sigaction(SIGUSR1, &old, NULL);
}

static void *wait_for_events(void *argument) {
    return (void *)(intptr_t)usermm_wait(argument, -1);
}

static void *call_until_refused(void *argument) {
    uint64_t generation;
    int result;
    while ((result = usermm_generation(argument, &generation)) == 0)
        ;
    return (void *)(intptr_t)result;
}

static cpu_set_t cores_before;

static void run_on_all_cores(void) {
    sched_setaffinity(0, sizeof cores_before, &cores_before);
}

/*
 * The monitor's epoch ends with its last device, be it between the two loads of a call's look at them; that is no
 * failure. On one core the sleeper's end interrupts the caller anywhere.
 */
static void a_call_during_the_last_shutdown_is_refused_as_closed(void) {
    cpu_set_t one;
    sched_getaffinity(0, sizeof cores_before, &cores_before);
    test_at_end(run_on_all_cores);
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    sched_setaffinity(0, sizeof one, &one);
    for (int round = 0; round < 100; round++) {
        usermm_device *device;
        pthread_t caller;
        void *result;
        CALL(usermm_open(2, O_RDONLY, &device));
        CHECK(pthread_create(&caller, NULL, call_until_refused, device) == 0);
        usleep(100);
        usermm_shutdown(device);
        pthread_join(caller, &result);
        usermm_close(device);
        CHECK((intptr_t)result == -EBADF || test_fault_fired());
    }
}

static void shutting_down_wakes_who_waits(void) {
    usermm_device *device = test_open(2, O_RDONLY), *stays = test_open(2, O_RDONLY);
    pthread_t waiters[3];
    for (int i = 0; i < 3; i++)
        CHECK(pthread_create(&waiters[i], NULL, wait_for_events, device) == 0);
    usleep(20000);
    usermm_shutdown(device);
    for (int i = 0; i < 3; i++) {
        void *result;
        pthread_join(waiters[i], &result);
        CHECK((intptr_t)result == -EBADF || (intptr_t)result == -ENOMEM || (intptr_t)result == -EIO);
    }
    CHECK(usermm_wait(device, 0) == -EBADF);
    CALL(usermm_wait(stays, 0));
}

/* SIGIO as the device sends it: once for each notification that hit, by the descriptor's own O_ASYNC. */
static void notifications_raise_sigio(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    char *memory = test_map(4);
    sigset_t usr2;
    struct timespec soon = {.tv_sec = 5}, now = {0};
    sigemptyset(&usr2);
    sigaddset(&usr2, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &usr2, NULL);
    int fd = (int)CALL(usermm_fileno(device));
    CHECK(fcntl(fd, F_SETSIG, SIGUSR2) == 0 && fcntl(fd, F_SETOWN, getpid()) == 0);
    CHECK(fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_ASYNC) == 0);
    test_register(device, memory, PAGE, 1);
    munmap(memory + PAGE, PAGE);
    for (int i = 0; i < 2; i++) {
        madvise(memory, PAGE, MADV_DONTNEED);
        uint64_t generation = test_generation(device); /* jumps away when a fault keeps the signal from coming */
        CHECK(generation == (uint64_t)i + 1);
        CHECK(sigtimedwait(&usr2, NULL, &soon) == SIGUSR2);
    }
    CHECK(sigtimedwait(&usr2, NULL, &now) < 0);
}

static atomic_bool churning;

static void *churn(void *argument) {
    usermm_device *device = argument;
    while (atomic_load(&churning)) {
        char *memory = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        uint64_t start = (uintptr_t)memory;
        usermm_register(device, start, start + PAGE, start, 0);
        munmap(memory, PAGE);
        usermm_unregister(device, start);
    }
    return NULL;
}

static int exit_with_busy_threads(void) {
    usermm_device *device;
    pthread_t thread;
    if (usermm_open(2, O_RDONLY, &device))
        return 0;
    atomic_store(&churning, true);
    for (int i = 0; i < 4; i++)
        pthread_create(&thread, NULL, churn, device);
    usleep(20000);
    return 0;
}

static void exiting_with_busy_threads_does_not_hang(void) {
    for (int round = 0; test_children_can_start_threads && round < 10; round++) {
        pid_t child = fork();
        if (child == 0)
            _exit(exit_with_busy_threads());
        check_child(child);
    }
}

int main(void) {
    static const struct test tests[] = {
        TEST(a_forked_child_starts_anew),
        TEST(a_bare_clone_is_told_apart),
        TEST(a_living_child_does_not_hold_up_the_close),
        TEST(a_handler_that_frees_does_not_deadlock),
        TEST(a_call_during_the_last_shutdown_is_refused_as_closed),
        TEST(shutting_down_wakes_who_waits),
        TEST(notifications_raise_sigio),
        TEST(exiting_with_busy_threads_does_not_hang),
    };
    return test_main(tests, sizeof tests / sizeof *tests);
}
