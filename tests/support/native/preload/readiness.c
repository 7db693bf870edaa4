/* Every way to wait for the descriptor, which is one for the kernel, too. With -DWITH_LIBEV libev as well. */
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/select.h>

#ifdef WITH_LIBEV
#include <ev.h>
#endif

#include "../abi.h"

static int device;
static const volatile uint64_t *generation;
static char *page;

static void begin(void) {
    device = open_device(O_RDONLY | O_NONBLOCK);
    generation = map_generation(device);
    page = map_pages(1);
    must(register_range(device, page, PAGE, 1) == 0, "register");
}

static void discard(void) {
    uint64_t before = *generation;
    must(madvise(page, PAGE, MADV_DONTNEED) == 0, "madvise");
    expect(*generation == before + 1);
}

static void drain(void) {
    struct event events[4];
    while (read(device, events, sizeof events) > 0)
        ;
}

static int by_poll(void) {
    struct pollfd asked = {device, POLLIN | POLLOUT | POLLPRI | POLLRDHUP, 0};
    int count = poll(&asked, 1, 0);
    expect(count == 0 || asked.revents == POLLIN);
    return count;
}
static int by_ppoll(void) {
    struct timespec none = {0, 0};
    struct pollfd asked = {device, POLLIN | POLLRDNORM | POLLOUT | POLLWRBAND, 0};
    int count = ppoll(&asked, 1, &none, NULL);
    expect(count == 0 || asked.revents == (POLLIN | POLLRDNORM));
    return count;
}
static int by_select(void) {
    struct timeval none = {0, 0};
    fd_set sets[3];
    for (int i = 0; i < 3; i++) {
        FD_ZERO(&sets[i]);
        FD_SET(device, &sets[i]);
    }
    int count = select(device + 1, &sets[0], &sets[1], &sets[2], &none);
    expect(!FD_ISSET(device, &sets[1]) && !FD_ISSET(device, &sets[2]));
    return count;
}
static int by_pselect(void) {
    struct timespec none = {0, 0};
    fd_set set;
    FD_ZERO(&set);
    FD_SET(device, &set);
    return pselect(device + 1, &set, NULL, NULL, &none, NULL);
}
static int by_epoll(void) {
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event wanted = {.events = EPOLLIN | EPOLLOUT | EPOLLPRI | EPOLLRDHUP}, ready;
    must(epoll_ctl(epoll, EPOLL_CTL_ADD, device, &wanted) == 0, "epoll_ctl");
    int count = epoll_wait(epoll, &ready, 1, 0);
    expect(count == 0 || ready.events == EPOLLIN);
    close(epoll);
    return count;
}

static int (*const ways[])(void) = {by_poll, by_ppoll, by_select, by_pselect, by_epoll};

static void level(void) {
    begin();
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        struct event event;
        expect(ways[i]() == 0);
        discard();
        expect(ways[i]() == 1);
        discard();
        expect(ways[i]() == 1);
        expect(read(device, &event, sizeof event) == sizeof event && event.type == INVAL);
        expect(ways[i]() == 1); /* LAST is owed */
        expect(read(device, &event, sizeof event) == sizeof event && event.type == LAST);
        expect(ways[i]() == 0);
        discard();
        expect(unregister(device, 1) == 0);
        expect(ways[i]() == 0); /* its event is dropped */
        expect(register_range(device, page, PAGE, 1) == 0);
    }
}

/* Edge-triggered: once for what comes after the queue was empty, by the original's wake-ups for each notification. */
static void edge(void) {
    begin();
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event wanted = {.events = EPOLLIN | EPOLLET}, ready;
    must(epoll_ctl(epoll, EPOLL_CTL_ADD, device, &wanted) == 0, "epoll_ctl");
    expect(epoll_wait(epoll, &ready, 1, 0) == 0);
    for (int i = 0; i < 100; i++) {
        discard();
        expect(epoll_wait(epoll, &ready, 1, 1000) == 1);
        expect(epoll_wait(epoll, &ready, 1, 0) == 0);
        if (i % 2)
            drain();
    }
}

static void oneshot(void) {
    begin();
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event wanted = {.events = EPOLLIN | EPOLLONESHOT}, ready;
    must(epoll_ctl(epoll, EPOLL_CTL_ADD, device, &wanted) == 0, "epoll_ctl");
    for (int i = 0; i < 10; i++) {
        discard();
        expect(epoll_wait(epoll, &ready, 1, 1000) == 1);
        discard();
        expect(epoll_wait(epoll, &ready, 1, 0) == 0);
        drain();
        must(epoll_ctl(epoll, EPOLL_CTL_MOD, device, &wanted) == 0, "epoll_ctl");
    }
}

/* An epoll that has a copy goes on after the number was closed, as the kernel has it. */
static void epoll_of_a_copy(void) {
    begin();
    int epoll = epoll_create1(EPOLL_CLOEXEC), copy = dup(device);
    struct epoll_event wanted = {.events = EPOLLIN}, ready;
    must(epoll_ctl(epoll, EPOLL_CTL_ADD, copy, &wanted) == 0, "epoll_ctl");
    discard();
    expect(epoll_wait(epoll, &ready, 1, 1000) == 1);
    close(copy);
    expect(epoll_wait(epoll, &ready, 1, 0) == 1);
    drain();
    expect(epoll_wait(epoll, &ready, 1, 0) == 0);
}

#ifdef WITH_LIBEV
static int woken;

static void on_readable(struct ev_loop *loop, ev_io *watcher, int events) {
    expect(events == EV_READ && watcher->fd == device);
    drain();
    if (++woken == 10)
        ev_break(loop, EVBREAK_ALL);
    else
        discard();
}

static void run_libev(unsigned backend) {
    struct ev_loop *loop = ev_loop_new(backend);
    ev_io watcher;
    must(loop != NULL, "ev_loop_new");
    woken = 0;
    ev_io_init(&watcher, on_readable, device, EV_READ);
    ev_io_start(loop, &watcher);
    discard();
    ev_run(loop, 0);
    expect(woken == 10);
    ev_io_stop(loop, &watcher);
    ev_loop_destroy(loop);
}

static void libev(void) {
    begin();
    run_libev(EVBACKEND_EPOLL);
    run_libev(EVBACKEND_POLL);
    run_libev(EVBACKEND_SELECT);
}
#endif

static const struct test_case cases[] = {
    {"level", level}, {"edge", edge}, {"oneshot", oneshot}, {"epoll_of_a_copy", epoll_of_a_copy},
#ifdef WITH_LIBEV
    {"libev", libev},
#endif
};

int main(int argc, char **argv) {
    return run_case(cases, sizeof cases / sizeof *cases, argc, argv);
}
