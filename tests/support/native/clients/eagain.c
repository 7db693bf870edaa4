/*
 * In the manner of libfabric's zhpe provider: before each look-up it reads one event at a time until EAGAIN, and skips
 * each LAST. Ends are inclusive, so a one-byte region is empty to the device: it is hit by what covers the byte and the
 * one before it. Such stand for single pages here, in their middle.
 */
#include "../churn.h"

#define MOST 4096
#define MIDDLE 100

static struct registration {
    uint64_t start, end, truth;
    bool used;
} registrations[MOST];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int device;

static void drain(void) {
    struct event event;
    ssize_t size;
    while ((size = read(device, &event, sizeof event)) == sizeof event) {
        if (event.type == LAST)
            continue;
        must(event.value < MOST && registrations[event.value].used, "an event of what is registered");
        must(unregister(device, event.value) == 0, "unregister");
        registrations[event.value].used = false;
    }
    must(size == -1 && errno == EAGAIN, "read");
}

static void client_open(void) {
    device = open_device(O_RDONLY | O_NONBLOCK | O_CLOEXEC);
}

static void watch(uint64_t cookie, uint64_t start, uint64_t end) {
    bool one_byte = end - start == PAGE;
    uint64_t first = one_byte ? start + MIDDLE : start, last = one_byte ? first : end - 1;
    must(register_range(device, (void *)first, last - first, cookie) == 0, "register");
}

static uint64_t client_find(uint64_t start, uint64_t end, uint64_t truth, bool *ret_new) {
    struct registration *found = NULL, *unused = NULL;
    pthread_mutex_lock(&lock);
    drain();
    for (struct registration *each = registrations; each < registrations + MOST && !found; each++)
        if (!each->used)
            unused = each;
        else if (each->start == start && each->end == end)
            found = each;
    *ret_new = !found;
    if (!found) {
        must((found = unused) != NULL, "a free registration");
        *found = (struct registration){start, end, truth, true};
        watch((uint64_t)(found - registrations), start, end);
    }
    truth = found->truth;
    pthread_mutex_unlock(&lock);
    return truth;
}

static void client_close(void) {
    drain();
    close(device);
}
