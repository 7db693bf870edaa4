/* Children of every kind, while a device is open in the parent, which must not notice. */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "../abi.h"
#include "../raw.h"
#include "noise.h"

extern char **environ;
static const char *self;
static int device;
static const volatile uint64_t *generation;
static char *page;

static void begin(int flags) {
    device = open_device(O_RDONLY | O_NONBLOCK | flags);
    generation = map_generation(device);
    page = map_pages(1);
    must(register_range(device, page, PAGE, 1) == 0, "register");
    must(madvise(page, PAGE, MADV_DONTNEED) == 0, "madvise");
    expect(*generation == 1);
}

/* What the parent had is as if there had been no child. */
static void goes_on(void) {
    struct event events[2];
    expect(*generation == 1);
    expect(read(device, events, sizeof events) == 64 && events[1].value == 1);
    expect(munmap(page, PAGE) == 0);
    expect(*generation == 2);
    expect(read(device, events, sizeof events) == 64 && events[0].value == 1 && events[1].value == 2);
    expect(unregister(device, 1) == 0);
}

static void expect_success(pid_t child) {
    int status = -1;
    must(child > 0 && waitpid(child, &status, 0) == child, "a child");
    if (WIFSIGNALED(status))
        fprintf(stderr, "the child ended with signal %d\n", WTERMSIG(status));
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void own_device_works(void) {
    struct event events[2];
    alarm(20);
    int own = open_device(O_RDONLY | O_NONBLOCK);
    const volatile uint64_t *count = map_generation(own);
    char *mine = map_pages(1);
    expect(*count == 0);
    expect(register_range(own, mine, PAGE, 5) == 0);
    expect(munmap(mine, PAGE) == 0);
    expect(*count == 1);
    expect(read(own, events, sizeof events) == 64 && events[0].value == 5);
    expect(close(own) == 0);
}

static void as_a_child(void) {
    struct event events[2];
    uint64_t cookie = 1;
    alarm(20);
    expect(*generation == 1);
    expect_errno(ECHILD, register_range(device, page, PAGE, 2));
    expect_errno(ECHILD, ioctl(device, UNREGISTER, &cookie));
    expect_errno(ECHILD, read(device, events, sizeof events));
    expect(munmap(page, PAGE) == 0); /* nobody waits for it, nobody reports it */
    expect(*generation == 1);
    own_device_works();
    expect(close(device) == 0);
    own_device_works();
    expect(*generation == 1);
}

static void forked(void) {
    begin(0);
    pid_t child = fork();
    if (child == 0) {
        as_a_child();
        _exit(0);
    }
    expect_success(child);
    goes_on();
}

/* No handler of fork's runs, whatever lock the monitor holds in that moment. (Its mapped page it must not load.) */
static void forked_by_the_system_call(void) {
    pthread_t noise;
    begin(0);
    must(pthread_create(&noise, NULL, make_noise, NULL) == 0, "pthread_create");
    for (int i = 0; i < 200; i++) {
        pid_t child = (pid_t)RAW(clone, SIGCHLD, 0, 0, 0, 0, 0);
        if (child == 0) {
            struct event events[2];
            prctl(PR_SET_PDEATHSIG, SIGKILL); /* it can hang with all signals blocked */
            expect_errno(ECHILD, register_range(device, page, PAGE, 2));
            expect_errno(ECHILD, read(device, events, sizeof events));
            expect_errno(ECHILD, unregister(device, 1));
            _exit(0);
        }
        expect_success(child);
    }
    stop = true;
    pthread_join(noise, NULL);
    goes_on();
}

static void *outlive(void *unused) {
    usleep(50000);
    return unused;
}

/* A process ends with its last thread; the monitor's is none of the program's. */
static void last_thread_ends(void) {
    begin(0);
    pid_t child = fork();
    if (child == 0) {
        pthread_t other;
        alarm(20);
        int own = open_device(O_RDONLY | O_NONBLOCK);
        expect(register_range(own, page, PAGE, 1) == 0);
        must(pthread_create(&other, NULL, outlive, NULL) == 0, "pthread_create");
        pthread_exit(NULL);
    }
    expect_success(child);
    goes_on();
}

/* A child of a child, as daemons are made; the first one ends at once. */
static void forked_twice(void) {
    int ready[2];
    char byte = 0;
    begin(0);
    must(pipe(ready) == 0, "pipe");
    pid_t child = fork();
    if (child == 0) {
        setsid();
        if (fork())
            _exit(0);
        as_a_child();
        _exit(write(ready[1], "x", 1) != 1);
    }
    expect_success(child);
    close(ready[1]);
    expect(read(ready[0], &byte, 1) == 1 && byte == 'x');
    goes_on();
}

static void *fork_often(void *unused) {
    for (int i = 0; i < 50; i++) {
        pid_t child = fork();
        if (child == 0) {
            own_device_works();
            _exit(0);
        }
        expect_success(child);
    }
    return unused;
}

/* Forks while other threads are in the middle of every call. */
static void forked_under_load(void) {
    pthread_t forker;
    volatile bool done = false;
    begin(0);
    must(pthread_create(&forker, NULL, fork_often, NULL) == 0, "pthread_create");
    for (uint64_t i = 2; !done; i++) {
        struct event events[4];
        char *mine = map_pages(1);
        int second = open_device(O_RDONLY);
        expect(register_range(device, mine, PAGE, i) == 0);
        uint64_t before = *generation;
        expect(munmap(mine, PAGE) == 0);
        expect(*generation == before + 1);
        (void)!read(device, events, sizeof events);
        expect(unregister(device, i) == 0);
        expect(close(second) == 0);
        done = pthread_tryjoin_np(forker, NULL) == 0;
    }
}

static void vforked(void) {
    begin(0);
    pid_t child = vfork();
    if (child == 0) {
        execl("/bin/true", "true", (char *)NULL);
        _exit(1);
    }
    expect_success(child);
    goes_on();
}

static void vforked_and_ends(void) {
    begin(0);
    pid_t child = vfork();
    if (child == 0)
        _exit(0);
    expect_success(child);
    goes_on();
}

static void spawned(void) {
    posix_spawn_file_actions_t actions;
    char *const arguments[] = {"true", NULL};
    pid_t child = 0;
    begin(0);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, device, 0);
    posix_spawn_file_actions_addclose(&actions, device);
    posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
    for (int i = 0; i < 20; i++) {
        must(posix_spawn(&child, "/bin/true", &actions, NULL, arguments, environ) == 0, "posix_spawn");
        expect_success(child);
    }
    posix_spawn_file_actions_destroy(&actions);
    goes_on();
}

static void by_the_shell(void) {
    char text[16] = "";
    begin(0);
    expect(system("true") == 0);
    FILE *stream = popen("echo word", "r");
    expect(stream != NULL && fgets(text, sizeof text, stream) && strcmp(text, "word\n") == 0);
    expect(pclose(stream) == 0);
    goes_on();
}

/* The new program has the number, but no device behind it: nothing hangs, and what it opens is its own. */
static void after_exec(int inherited, bool closed) {
    char bytes[64];
    if (closed)
        expect_errno(EBADF, fcntl(inherited, F_GETFD));
    else {
        expect(register_range(inherited, bytes, 1, 1) == -1);
        for (int i = 0; i < 100 && read(inherited, bytes, sizeof bytes) > 0; i++)
            ; /* what the parent's library had in its pipe */
        expect(read(inherited, bytes, sizeof bytes) <= 0);
        expect(close(inherited) == 0);
    }
    own_device_works();
}

static void execed(int flags) {
    char number[16];
    begin(flags);
    snprintf(number, sizeof number, "%d", device);
    execl(self, self, flags & O_CLOEXEC ? "after_exec_closed" : "after_exec", number, (char *)NULL);
    _exit(3);
}
static void execed_without_cloexec(void) {
    execed(0);
}
static void execed_with_cloexec(void) {
    execed(O_CLOEXEC);
}

static void forked_and_execed(void) {
    char number[16];
    begin(0);
    snprintf(number, sizeof number, "%d", device);
    pid_t child = fork();
    if (child == 0) {
        execl(self, self, "after_exec", number, (char *)NULL);
        _exit(3);
    }
    expect_success(child);
    goes_on();
}

static const struct test_case cases[] = {
    {"forked", forked},
    {"forked_by_the_system_call", forked_by_the_system_call},
    {"last_thread_ends", last_thread_ends},
    {"forked_twice", forked_twice},
    {"forked_under_load", forked_under_load},
    {"vforked", vforked},
    {"vforked_and_ends", vforked_and_ends},
    {"spawned", spawned},
    {"by_the_shell", by_the_shell},
    {"execed_without_cloexec", execed_without_cloexec},
    {"execed_with_cloexec", execed_with_cloexec},
    {"forked_and_execed", forked_and_execed},
};

int main(int argc, char **argv) {
    self = argv[0];
    if (argc == 3) {
        after_exec(atoi(argv[2]), strcmp(argv[1], "after_exec_closed") == 0);
        return 0;
    }
    return run_case(cases, sizeof cases / sizeof *cases, argc, argv);
}
