/*
 * A client of the devices that does what it is told: one request on a socket, one call, one reply. The conformance list
 * runs it under the preload library. Each channel has a thread of its own, and each forked child one.
 *
 *     abi_driver libc|raw DESCRIPTOR      raw: memory calls by the instruction itself, and readv for read
 *
 * Every reply tells what a plain load of the mapped generation gave right after the call, with nothing in between.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/poll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "abi.h"
#include "raw.h"

#define ROOM (1u << 21)
#define WAIT_NS 10000000000u
#define QUIET_US 20000

struct request {
    uint32_t what, length;
    uint64_t page; /* what to load afterwards, or 0 */
    uint64_t a[5];
};

struct reply {
    int64_t result; /* -errno where the call failed */
    uint64_t loaded;
    uint32_t length, unused;
};

struct channel {
    int socket, passed; /* `passed` came with this request, or is -1 */
    struct request request;
    char *room; /* what came with it, and what goes with the reply */
    uint32_t reply_length;
};

static bool raw;
static atomic_int signals;

static int64_t errno_of(int64_t result) {
    return result == -1 ? -errno : result;
}

static int serve(struct channel *channel);

/* The device */

static int64_t do_open(struct channel *channel) {
    const uint64_t *a = channel->request.a;
    return errno_of(open(a[0] == 1 ? DEVICE_1 : DEVICE_2, (int)a[1]));
}

static int64_t do_close(struct channel *channel) {
    return errno_of(close((int)channel->request.a[0]));
}

static int64_t do_ioctl_buffer(struct channel *channel) {
    const uint64_t *a = channel->request.a;
    channel->reply_length = channel->request.length;
    return errno_of(ioctl((int)a[0], (unsigned long)a[1], channel->room));
}

static int64_t do_ioctl_address(struct channel *channel) {
    const uint64_t *a = channel->request.a;
    return errno_of(ioctl((int)a[0], (unsigned long)a[1], (void *)a[2]));
}

static int64_t read_device(int device, void *buffer, size_t count) {
    struct iovec vector[2] = {{buffer, count}, {buffer, 0}};
    return errno_of(raw ? readv(device, vector, 2) : read(device, buffer, count));
}

static int64_t do_read(struct channel *channel) {
    const uint64_t *a = channel->request.a;
    int64_t done = read_device((int)a[0], channel->room, (size_t)a[1]);
    channel->reply_length = done > 0 ? (uint32_t)done : 0;
    return done;
}

static int64_t do_read_to(struct channel *channel) {
    const uint64_t *a = channel->request.a;
    return read_device((int)a[0], (void *)a[1], (size_t)a[2]);
}

static int64_t do_write(struct channel *channel) {
    return errno_of(write((int)channel->request.a[0], "x", 1));
}

static int64_t do_map_device(struct channel *channel) {
    const uint64_t *a = channel->request.a;
    return errno_of((int64_t)mmap(NULL, a[1], (int)a[2], (int)a[3], (int)a[0], (off_t)a[4]));
}

static int64_t do_peek(struct channel *channel) {
    const uint64_t *a = channel->request.a;
    memcpy(channel->room, (const void *)a[0], a[1]);
    channel->reply_length = (uint32_t)a[1];
    return 0;
}

static int64_t words(bool readable, bool writable, bool other) {
    return (readable ? 1 : 0) | (writable ? 2 : 0) | (other ? 4 : 0);
}

static int64_t words_of(unsigned events) {
    return words(events & POLLIN, events & POLLOUT, events & ~(unsigned)(POLLIN | POLLOUT));
}

static int64_t do_poll(struct channel *channel) {
    struct pollfd entry = {(int)channel->request.a[0], POLLIN | POLLOUT | POLLPRI, 0};
    return poll(&entry, 1, 0) < 0 ? -errno : words_of((unsigned)entry.revents);
}

static int64_t do_select(struct channel *channel) {
    int device = (int)channel->request.a[0];
    fd_set sets[3];
    struct timeval now = {0, 0};
    for (int i = 0; i < 3; i++) {
        FD_ZERO(&sets[i]);
        FD_SET(device, &sets[i]);
    }
    if (select(device + 1, &sets[0], &sets[1], &sets[2], &now) < 0)
        return -errno;
    return words(FD_ISSET(device, &sets[0]), FD_ISSET(device, &sets[1]), FD_ISSET(device, &sets[2]));
}

static int64_t do_epoll(struct channel *channel) {
    struct epoll_event wanted = {.events = EPOLLIN | EPOLLOUT | EPOLLPRI}, found = {.events = 0};
    int poller = epoll_create1(EPOLL_CLOEXEC);
    int64_t result = errno_of(epoll_ctl(poller, EPOLL_CTL_ADD, (int)channel->request.a[0], &wanted));
    if (result == 0)
        result = errno_of(epoll_wait(poller, &found, 1, 0));
    close(poller);
    return result < 0 ? result : words_of(found.events);
}

/* Signals */

static void count_signal(int number) {
    (void)number;
    atomic_fetch_add(&signals, 1);
}

static int64_t do_signals_on(struct channel *channel) {
    const uint64_t *a = channel->request.a;
    struct sigaction action = {.sa_handler = count_signal, .sa_flags = SA_RESTART};
    int device = (int)a[0], number = (int)a[1];
    atomic_store(&signals, 0);
    sigaction(number ? number : SIGIO, &action, NULL);
    if (fcntl(device, F_SETOWN, getpid()) || fcntl(device, F_SETSIG, number))
        return -errno;
    return errno_of(fcntl(device, F_SETFL, fcntl(device, F_GETFL) | O_ASYNC));
}

/* Waits until so many came, and then for one too many. */
static int64_t do_signals_count(struct channel *channel) {
    uint64_t deadline = now_ns() + WAIT_NS;
    while (atomic_load(&signals) < (int)channel->request.a[0] && now_ns() < deadline)
        usleep(1000);
    usleep(QUIET_US);
    return atomic_load(&signals);
}

static int64_t do_signals_off(struct channel *channel) {
    int device = (int)channel->request.a[0];
    return errno_of(fcntl(device, F_SETFL, fcntl(device, F_GETFL) & ~O_ASYNC));
}

/* The memory */

static int64_t do_mmap(struct channel *channel) {
    const uint64_t *a = channel->request.a;
    int flags = MAP_ANONYMOUS | MAP_FIXED | (a[2] ? MAP_SHARED : MAP_PRIVATE), prot = PROT_READ | PROT_WRITE;
    return raw ? RAW(mmap, a[0], a[1], prot, flags, -1, 0)
               : errno_of((int64_t)mmap((void *)a[0], a[1], prot, flags, -1, 0));
}

static int64_t do_munmap(struct channel *channel) {
    const uint64_t *a = channel->request.a;
    return raw ? RAW(munmap, a[0], a[1], 0, 0, 0, 0) : errno_of(munmap((void *)a[0], a[1]));
}

static int64_t do_mremap(struct channel *channel) {
    const uint64_t *a = channel->request.a;
    return raw ? RAW(mremap, a[0], a[1], a[2], a[3], a[4], 0)
               : errno_of((int64_t)mremap((void *)a[0], a[1], a[2], (int)a[3], (void *)a[4]));
}

static int64_t do_madvise(struct channel *channel) {
    const uint64_t *a = channel->request.a;
    return raw ? RAW(madvise, a[0], a[1], a[2], 0, 0, 0) : errno_of(madvise((void *)a[0], a[1], (int)a[2]));
}

static int64_t do_mprotect(struct channel *channel) {
    const uint64_t *a = channel->request.a;
    return raw ? RAW(mprotect, a[0], a[1], a[2], 0, 0, 0) : errno_of(mprotect((void *)a[0], a[1], (int)a[2]));
}

/* sbrk: where the heap ended before */
static int64_t do_move_break(struct channel *channel) {
    int64_t delta = (int64_t)channel->request.a[0];
    if (!raw)
        return errno_of((int64_t)sbrk(delta));
    int64_t before = RAW(brk, 0, 0, 0, 0, 0, 0);
    return RAW(brk, before + delta, 0, 0, 0, 0, 0) == before + delta ? before : -ENOMEM;
}

/* Threads and children */

static char *make_room(void) {
    char *room = mmap(NULL, ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(room != MAP_FAILED, "mmap");
    return room;
}

static void *serve_in_thread(void *socket) {
    struct channel channel = {.socket = (int)(intptr_t)socket, .room = make_room()};
    serve(&channel);
    munmap(channel.room, ROOM);
    close(channel.socket);
    return NULL;
}

static int64_t do_thread(struct channel *channel) {
    pthread_t thread;
    int result = pthread_create(&thread, NULL, serve_in_thread, (void *)(intptr_t)channel->passed);
    return result ? -result : -pthread_detach(thread);
}

static int64_t do_fork(struct channel *channel) {
    struct channel own = {.socket = channel->passed, .room = channel->room};
    pid_t child = fork();
    if (child == 0) {
        close(channel->socket);
        _exit(serve(&own));
    }
    close(channel->passed);
    return errno_of(child);
}

static int64_t do_reap(struct channel *channel) {
    int status;
    return waitpid((pid_t)channel->request.a[0], &status, 0) < 0 ? -errno : status;
}

static int64_t do_nothing(struct channel *channel) {
    (void)channel;
    return 0;
}

/* In the order of `Call` in implementation_preload.py. */
static int64_t (*const calls[])(struct channel *) = {
    do_nothing,     do_open,   do_close,   do_ioctl_buffer, do_ioctl_address, do_read,       do_read_to,
    do_write,       do_poll,   do_select,  do_epoll,        do_map_device,    do_peek,       do_mmap,
    do_munmap,      do_mremap, do_madvise, do_mprotect,     do_move_break,    do_signals_on, do_signals_count,
    do_signals_off, do_thread, do_fork,    do_reap,
};

static bool receive(struct channel *channel, void *target, size_t length) {
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    for (size_t done = 0; done < length;) {
        struct iovec vector = {(char *)target + done, length - done};
        struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};
        message.msg_control = &control;
        message.msg_controllen = sizeof control;
        ssize_t got = recvmsg(channel->socket, &message, MSG_CMSG_CLOEXEC);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return false;
        if (message.msg_controllen)
            memcpy(&channel->passed, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof channel->passed);
        done += (size_t)got;
    }
    return true;
}

static bool answer(const struct channel *channel, const void *source, size_t length) {
    for (size_t done = 0; done < length;) {
        ssize_t sent = send(channel->socket, (const char *)source + done, length - done, MSG_NOSIGNAL);
        if (sent < 0 && errno != EINTR)
            return false;
        done += sent > 0 ? (size_t)sent : 0;
    }
    return true;
}

static int serve(struct channel *channel) {
    struct request *request = &channel->request;
    for (;;) {
        channel->passed = -1;
        channel->reply_length = 0;
        if (!receive(channel, request, sizeof *request))
            return 0;
        must(request->what < sizeof calls / sizeof *calls && request->length <= ROOM, "the request");
        if (!receive(channel, channel->room, request->length))
            return 0;
        const volatile uint64_t *page = (const volatile uint64_t *)request->page;
        struct reply reply = {.result = calls[request->what](channel)};
        if (page)
            reply.loaded = *page;
        reply.length = channel->reply_length;
        if (!answer(channel, &reply, sizeof reply) || !answer(channel, channel->room, reply.length))
            return 0;
    }
}

int main(int argc, char **argv) {
    must(argc == 3, "usage: abi_driver libc|raw DESCRIPTOR");
    raw = strcmp(argv[1], "raw") == 0;
    free(malloc(1)); /* malloc takes its heap now: the tests move the break */
    struct channel channel = {.socket = atoi(argv[2]), .room = make_room()};
    return serve(&channel);
}
