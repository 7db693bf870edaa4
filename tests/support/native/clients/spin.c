/*
 * In the manner of Portals 4: a thread of its own sleeps in epoll on the descriptor, reads, marks what was hit and then
 * publishes the LAST's generation. A look-up spins until the mapped generation equals that, so a generation that moves
 * without a LAST to follow hangs it.
 *
 * UNREGISTER drops a waiting event and the LAST with it. So a hit region is taken off by a later look-up in its block,
 * which holds the block's lock: after the spin nothing of that block can be waiting. (Not so where memory is handed
 * over past libc's mmap: there the giver's change may come after the spin, and this client, like its model, can hang.)
 */
#include "../churn.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>

#define MOST 4096

static struct registration {
    uint64_t start, end, truth;
    atomic_bool hit;
    bool used;
} registrations[MOST];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_t watcher;
static int device, farewell;
static const volatile uint64_t *generation;
static atomic_ulong last;

static void apply(const struct event *event) {
    if (event->type == LAST)
        atomic_store(&last, event->value);
    else
        atomic_store(&registrations[event->value].hit, true);
}

static void *watch(void *unused) {
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event wanted = {.events = EPOLLIN, .data.fd = device}, ready;
    must(epoll_ctl(epoll, EPOLL_CTL_ADD, device, &wanted) == 0, "epoll_ctl");
    wanted.data.fd = farewell;
    must(epoll_ctl(epoll, EPOLL_CTL_ADD, farewell, &wanted) == 0, "epoll_ctl");
    for (;;) {
        struct event events[16];
        must(epoll_wait(epoll, &ready, 1, -1) == 1, "epoll_wait");
        must(ready.events == EPOLLIN, "epoll: readable and nothing else");
        if (ready.data.fd == farewell)
            break;
        ssize_t size = read(device, events, sizeof events);
        if (size < 0 && errno == EAGAIN)
            continue; /* what was waiting has been unregistered */
        must(size > 0 && size % (ssize_t)sizeof *events == 0, "read of events");
        for (size_t i = 0; i < (size_t)size / sizeof *events; i++)
            apply(&events[i]);
    }
    close(epoll);
    return unused;
}

static void spin(void) {
    while (*generation != atomic_load(&last))
        sched_yield();
}

static void client_open(void) {
    device = open_device(O_RDONLY | O_NONBLOCK);
    generation = map_generation(device);
    farewell = eventfd(0, EFD_CLOEXEC);
    must(pthread_create(&watcher, NULL, watch, NULL) == 0, "pthread_create");
}

static void take_off(struct registration *registration) {
    must(unregister(device, (uint64_t)(registration - registrations)) == 0, "unregister");
    registration->used = false;
}

static struct registration *find(uint64_t start, uint64_t end) {
    struct registration *found = NULL;
    for (struct registration *each = registrations; each < registrations + MOST; each++) {
        if (each->used && each->start / STRIDE == start / STRIDE && atomic_load(&each->hit))
            take_off(each);
        if (each->used && each->start == start && each->end == end)
            found = each;
    }
    return found;
}

static struct registration *make(uint64_t start, uint64_t end, uint64_t truth) {
    struct registration *made = registrations;
    while (made->used)
        must(++made < registrations + MOST, "a free registration");
    made->start = start;
    made->end = end;
    made->truth = truth;
    atomic_store(&made->hit, false);
    made->used = true;
    must(register_range(device, (void *)start, end - start, (uint64_t)(made - registrations)) == 0, "register");
    return made;
}

static uint64_t client_find(uint64_t start, uint64_t end, uint64_t truth, bool *ret_new) {
    spin();
    pthread_mutex_lock(&lock);
    struct registration *found = find(start, end);
    *ret_new = !found;
    truth = (found ? found : make(start, end, truth))->truth;
    pthread_mutex_unlock(&lock);
    return truth;
}

static void client_close(void) {
    uint64_t one = 1;
    spin();
    must(write(farewell, &one, sizeof one) == sizeof one, "write");
    pthread_join(watcher, NULL);
    close(farewell);
    close(device);
}
