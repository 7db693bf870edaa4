/* Threads that wait in read, and what comes in between: close, cancellation, signals; signals for notifications. */
#include <pthread.h>
#include <signal.h>
#include <sys/time.h>

#include "../abi.h"

static int device;
static const volatile uint64_t *generation;
static char *page;
static volatile sig_atomic_t handled;

static void begin(int flags) {
    device = open_device(O_RDONLY | flags);
    generation = map_generation(device);
    page = map_pages(1);
    must(register_range(device, page, PAGE, 1) == 0, "register");
}

struct answer {
    ssize_t size;
    int number;
    struct event events[2];
};

static void *wait_in_read(void *argument) {
    struct answer *answer = argument;
    errno = 0;
    answer->size = read(device, answer->events, sizeof answer->events);
    answer->number = errno;
    return NULL;
}

static pthread_t start_waiting(struct answer *answer) {
    pthread_t thread;
    must(pthread_create(&thread, NULL, wait_in_read, answer) == 0, "pthread_create");
    usleep(100000);
    return thread;
}

static void discard(void) {
    must(madvise(page, PAGE, MADV_DONTNEED) == 0, "madvise");
}

static void a_blocking_read_is_woken(void) {
    struct answer answer = {0};
    begin(0);
    pthread_t thread = start_waiting(&answer);
    discard();
    expect(pthread_join(thread, NULL) == 0);
    expect(answer.size == 64 && answer.events[0].value == 1 && answer.events[1].type == LAST);
}

static void only_one_reader_gets_it(void) {
    struct answer answers[4] = {0};
    pthread_t readers[4];
    begin(0);
    for (int i = 0; i < 4; i++)
        readers[i] = start_waiting(&answers[i]);
    for (int i = 0; i < 4; i++) {
        discard();
        usleep(50000);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(readers[i], NULL);
        expect(answers[i].size == 64 && answers[i].events[0].type == INVAL && answers[i].events[1].type == LAST);
    }
    expect(*generation == 4);
}

/* The descriptor's end is the device's end; who waits gets EBADF, or the event if the kernel keeps its file alive. */
static void close_while_another_thread_reads(void) {
    struct answer answer = {0};
    begin(0);
    pthread_t thread = start_waiting(&answer);
    expect(close(device) == 0);
    usleep(50000);
    expect(munmap(page, PAGE) == 0);
    expect(pthread_join(thread, NULL) == 0);
    expect(answer.size == 64 || answer.size == 0 || (answer.size == -1 && answer.number == EBADF));
    begin(O_NONBLOCK);
    discard();
    expect(read(device, answer.events, sizeof answer.events) == 64);
}

static void cancelled_in_read(void) {
    struct answer answer = {0};
    void *result;
    begin(0);
    pthread_t thread = start_waiting(&answer);
    expect(pthread_cancel(thread) == 0);
    expect(pthread_join(thread, &result) == 0 && result == PTHREAD_CANCELED);
    discard(); /* no lock was left behind */
    expect(*generation == 1);
    expect(read(device, answer.events, sizeof answer.events) == 64);
    expect(unregister(device, 1) == 0);
}

static void count_it(int number) {
    (void)number;
    handled++;
}

static void handle(int number, int flags) {
    struct sigaction action = {.sa_handler = count_it, .sa_flags = flags};
    sigaction(number, &action, NULL);
}

static void restarted(void) {
    struct answer answer = {0};
    begin(0);
    handle(SIGUSR1, SA_RESTART);
    pthread_t thread = start_waiting(&answer);
    for (int i = 0; i < 5; i++) {
        pthread_kill(thread, SIGUSR1);
        usleep(20000);
    }
    expect(handled == 5);
    discard();
    pthread_join(thread, NULL);
    expect(answer.size == 64);
}

static void interrupted(void) {
    struct answer answer = {0};
    begin(0);
    handle(SIGUSR1, 0);
    pthread_t thread = start_waiting(&answer);
    pthread_kill(thread, SIGUSR1);
    pthread_join(thread, NULL);
    expect(handled == 1 && answer.size == -1 && answer.number == EINTR);
    discard();
    expect(read(device, answer.events, sizeof answer.events) == 64);
}

static void wanted_signals(int number, sigset_t *ret_set) {
    sigemptyset(ret_set);
    sigaddset(ret_set, number ? number : SIGIO);
    must(pthread_sigmask(SIG_BLOCK, ret_set, NULL) == 0, "sigmask");
}

static int signals_that_wait(const sigset_t *set, int *ret_descriptor) {
    struct timespec patience = {0, 200000000};
    siginfo_t info;
    int count = 0;
    while (sigtimedwait(set, &info, &patience) > 0) {
        *ret_descriptor = info.si_fd;
        count++;
    }
    return count;
}

static void sigio(void) {
    sigset_t set;
    int descriptor = -1;
    wanted_signals(0, &set);
    begin(O_NONBLOCK);
    discard();
    expect(signals_that_wait(&set, &descriptor) == 0); /* nobody asked yet */
    expect(fcntl(device, F_SETOWN, getpid()) == 0);
    expect(fcntl(device, F_SETFL, O_ASYNC | O_NONBLOCK) == 0);
    for (int i = 0; i < 3; i++) { /* once each, coalesced or not */
        discard();
        expect(signals_that_wait(&set, &descriptor) == 1);
    }
    expect(fcntl(device, F_SETFL, O_NONBLOCK) == 0);
    discard();
    expect(signals_that_wait(&set, &descriptor) == 0);
}

/* Queued signals, which are not merged: as many as notifications that hit, with the descriptor's number. */
static void a_signal_of_ones_own(void) {
    struct event events[2];
    sigset_t set;
    int descriptor = -1, number = SIGRTMIN + 3;
    char *other = map_pages(1);
    wanted_signals(number, &set);
    begin(O_NONBLOCK);
    expect(fcntl(device, F_SETSIG, number) == 0);
    expect(fcntl(device, F_SETOWN, getpid()) == 0);
    expect(fcntl(device, F_SETFL, O_ASYNC | O_NONBLOCK) == 0);
    for (int i = 0; i < 10; i++)
        discard();
    munmap(other, PAGE);
    expect(signals_that_wait(&set, &descriptor) == 10 && descriptor == device);
    expect(read(device, events, sizeof events) == 64 && events[1].value == 10);
    expect(signals_that_wait(&set, &descriptor) == 0);
}

static void use_it_in_a_handler(int number) {
    static uint64_t cookie = 1000000;
    struct event event;
    int saved = errno;
    char *mine = map_at(NULL, PAGE, 0);
    (void)number;
    expect(register_range(device, mine, PAGE, ++cookie) == 0);
    uint64_t before = *generation;
    expect(munmap(mine, PAGE) == 0);
    expect(*generation > before);
    ssize_t size = read(device, &event, sizeof event);
    expect(size == 32 || (size == -1 && errno == EAGAIN));
    expect(unregister(device, cookie) == 0);
    handled++;
    errno = saved;
}

/* A handler that interrupts every call of ours, in any place. */
static void from_signal_handlers(void) {
    struct itimerval often = {{0, 300}, {0, 300}}, never = {{0, 0}, {0, 0}};
    begin(O_NONBLOCK);
    struct sigaction action = {.sa_handler = use_it_in_a_handler, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &often, NULL);
    for (uint64_t i = 1; i <= 20000; i++) {
        struct event events[2];
        char *mine = map_pages(1);
        expect(register_range(device, mine, PAGE, 1 + i) == 0);
        uint64_t before = *generation;
        expect(munmap(mine, PAGE) == 0);
        expect(*generation > before);
        (void)!read(device, events, sizeof events);
        expect(unregister(device, 1 + i) == 0);
        if (i % 100 == 0) {
            int second = open_device(O_RDONLY);
            expect(close(second) == 0);
        }
    }
    setitimer(ITIMER_REAL, &never, NULL);
    expect(handled > 10);
}

/* A stack of the usual size for handlers, with a page behind it that must stay untouched. */
static void from_a_handler_on_a_small_stack(void) {
    size_t size = 8192;
    char *memory = map_pages(1 + size / PAGE);
    must(mprotect(memory, PAGE, PROT_NONE) == 0, "mprotect");
    stack_t stack = {.ss_sp = memory + PAGE, .ss_size = size};
    must(sigaltstack(&stack, NULL) == 0, "sigaltstack");
    begin(O_NONBLOCK);
    struct sigaction action = {.sa_handler = use_it_in_a_handler, .sa_flags = SA_ONSTACK};
    sigaction(SIGUSR1, &action, NULL);
    for (int i = 0; i < 100; i++)
        raise(SIGUSR1);
    expect(handled == 100);
}

static const struct test_case cases[] = {
    {"a_blocking_read_is_woken", a_blocking_read_is_woken},
    {"only_one_reader_gets_it", only_one_reader_gets_it},
    {"close_while_another_thread_reads", close_while_another_thread_reads},
    {"cancelled_in_read", cancelled_in_read},
    {"restarted", restarted},
    {"interrupted", interrupted},
    {"sigio", sigio},
    {"a_signal_of_ones_own", a_signal_of_ones_own},
    {"from_signal_handlers", from_signal_handlers},
    {"from_a_handler_on_a_small_stack", from_a_handler_on_a_small_stack},
};

int main(int argc, char **argv) {
    return run_case(cases, sizeof cases / sizeof *cases, argc, argv);
}
