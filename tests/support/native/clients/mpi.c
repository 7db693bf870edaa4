/*
 * In the manner of the MPI component: asks access() first, opens O_RDONLY|O_NONBLOCK, maps 8 bytes, and loads them
 * before each look-up. When they moved it reads one event at a time until a LAST equals them, or EAGAIN. The hint's
 * range, not the cookie (a pointer), says what to release; releasing takes off regions whose events wait, and comes
 * back to the device from inside: a release can free watched memory, and looks whether the generation moved.
 */
#include "../churn.h"

#define SCRATCH_EVERY 64

struct registration {
    uint64_t start, end, truth;
    struct registration *next;
};

static pthread_mutex_t lock;
static int device;
static const volatile uint64_t *generation;
static uint64_t last;
static struct registration *registrations;
static char *scratch; /* memory of the client's own, which a release frees now and then */
static unsigned releases;

static void process(void);

static void replace_scratch(void) {
    munmap(scratch, PAGE);
    must(unregister(device, (uintptr_t)&scratch) == 0, "unregister the scratch page");
    scratch = map_pages(1);
    must(register_range(device, scratch, PAGE, (uintptr_t)&scratch) == 0, "register the scratch page");
}

static void release(struct registration *registration) {
    if (++releases % SCRATCH_EVERY == 0)
        replace_scratch();
    process();
    must(unregister(device, (uintptr_t)registration) == 0, "unregister");
    free(registration);
}

static bool release_one(uint64_t start, uint64_t end) {
    for (struct registration **link = &registrations; *link; link = &(*link)->next) {
        struct registration *found = *link;
        if (found->start >= end || found->end <= start)
            continue;
        *link = found->next;
        release(found);
        return true;
    }
    return false;
}

static void process(void) {
    while (last != *generation) {
        struct event event;
        ssize_t size = read(device, &event, sizeof event);
        if (size < 0 && errno == EAGAIN)
            return;
        must(size == sizeof event, "read of one event");
        if (event.type == LAST)
            last = event.value;
        else
            while (release_one(event.start, event.end))
                ; /* from the beginning again: what was done inside may have changed the list */
    }
}

static void client_open(void) {
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&lock, &recursive);
    must(access(DEVICE_2, F_OK) == 0, "access");
    device = open_device(O_RDONLY | O_NONBLOCK);
    generation = map_generation(device);
    scratch = map_pages(1);
    must(register_range(device, scratch, PAGE, (uintptr_t)&scratch) == 0, "register the scratch page");
}

static uint64_t client_find(uint64_t start, uint64_t end, uint64_t truth, bool *ret_new) {
    pthread_mutex_lock(&lock);
    process();
    struct registration *found = registrations;
    while (found && (found->start != start || found->end != end))
        found = found->next;
    *ret_new = !found;
    if (!found) {
        must((found = malloc(sizeof *found)) != NULL, "malloc");
        *found = (struct registration){start, end, truth, registrations};
        registrations = found;
        must(register_range(device, (void *)start, end - start, (uintptr_t)found) == 0, "register");
    }
    truth = found->truth;
    pthread_mutex_unlock(&lock);
    return truth;
}

static void client_close(void) {
    while (release_one(0, UINT64_MAX))
        ;
    close(device);
}
