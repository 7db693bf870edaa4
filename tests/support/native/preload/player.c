/*
 * Plays a script of ABI calls and changes of memory, and writes what each gave: property/preload_script.py makes the
 * one and judges the other. Usage: player SCRIPT RESULTS.
 *
 * A result is an int64 (-errno when the call failed), the bytes that a read gave or the argument that an ioctl left,
 * and for each open device, in the order of the slots, the loaded generation and the mask that poll gives (two uint64).
 */
#include <poll.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include "../abi.h"
#include "../raw.h"

#define SLOTS 4

enum { OPEN, CLOSE, COPY, IOCTL, IOCTL_BAD, READ, READV, PREAD, READ_BAD, MMAP, MUNMAP, MADVISE, MPROTECT, MREMAP };

struct step {
    uint32_t code, slot;
    uint64_t a, b, c, d, e;
};

static struct slot {
    int descriptor;
    const volatile uint64_t *generation;
} slots[SLOTS];

static char given[1 << 14];
static char results[1 << 20];
static size_t waiting;
static int output;

static void flush(void) {
    must(write(output, results, waiting) == (ssize_t)waiting, "write of results");
    waiting = 0;
}

static void put(const void *bytes, size_t length) {
    if (waiting + length > sizeof results)
        flush();
    memcpy(results + waiting, bytes, length);
    waiting += length;
}

static void put_number(uint64_t number) {
    put(&number, sizeof number);
}

static int64_t open_slot(struct slot *slot, uint64_t abi, uint64_t flags) {
    slot->descriptor = open(abi == 2 ? DEVICE_2 : DEVICE_1, (int)flags);
    if (slot->descriptor < 0)
        return -1;
    slot->generation = map_generation(slot->descriptor);
    return 0;
}

static int64_t close_slot(struct slot *slot) {
    munmap((void *)(uintptr_t)slot->generation, PAGE);
    return close(slot->descriptor);
}

/* Goes on with a copy; every other one was made past the library. */
static int64_t copy_slot(struct slot *slot) {
    static unsigned count;
    int copy = ++count % 2 ? dup(slot->descriptor) : (int)RAW(dup, slot->descriptor, 0, 0, 0, 0, 0);
    must(copy >= 0 && close(slot->descriptor) == 0, "dup, close");
    slot->descriptor = copy;
    return 0;
}

static int64_t read_in_parts(int descriptor, size_t count) {
    struct iovec vector[] = {{given, count}};
    return readv(descriptor, vector, 1);
}

static int64_t as_result(int64_t result) {
    return result == -1 ? -errno : result;
}

static int64_t device_step(const struct step *step) {
    struct slot *slot = &slots[step->slot];
    switch (step->code) {
    case OPEN:
        return open_slot(slot, step->a, step->b);
    case CLOSE:
        slot->descriptor = (int)(close_slot(slot) - 1); /* -1 when that went well */
        return slot->descriptor + 1;
    case COPY:
        return copy_slot(slot);
    case IOCTL:
        memcpy(given, &step->b, 32);
        return ioctl(slot->descriptor, step->a, given);
    case IOCTL_BAD:
        return ioctl(slot->descriptor, step->a, (void *)step->b);
    case READ:
        return read(slot->descriptor, given, step->a);
    case READV:
        return read_in_parts(slot->descriptor, step->a);
    case PREAD:
        return pread(slot->descriptor, given, step->a, (off_t)step->b);
    default:
        return read(slot->descriptor, (void *)step->b, step->a);
    }
}

static int64_t memory_step(const struct step *step) {
    void *address = (void *)step->a, *result = address;
    switch (step->code) {
    case MMAP:
        result = mmap(address, step->b, PROT_READ | PROT_WRITE,
                      (step->c ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        break;
    case MUNMAP:
        return munmap(address, step->b);
    case MADVISE:
        return madvise(address, step->b, (int)step->c);
    case MPROTECT:
        return mprotect(address, step->b, (int)step->c);
    default:
        result = mremap(address, step->b, step->c, (int)step->d, (void *)step->e);
    }
    return result == MAP_FAILED ? -1 : (int64_t)(uintptr_t)result;
}

static void play(const struct step *step) {
    errno = 0;
    int64_t result = as_result(step->code < MMAP ? device_step(step) : memory_step(step));
    put_number((uint64_t)result);
    if (step->code == IOCTL)
        put(given, 32);
    if (step->code >= READ && step->code <= PREAD && result > 0)
        put(given, (size_t)result);
    for (const struct slot *slot = slots; slot < slots + SLOTS; slot++) {
        if (slot->descriptor < 0)
            continue;
        struct pollfd asked = {slot->descriptor, POLLIN | POLLOUT | POLLPRI | POLLRDHUP, 0};
        put_number(*slot->generation); /* first: a load waits for a notification that is under way, poll may not */
        must(poll(&asked, 1, 0) >= 0, "poll");
        put_number((uint64_t)asked.revents);
    }
}

int main(int argc, char **argv) {
    struct stat about;
    must(argc == 3, "arguments: SCRIPT RESULTS");
    int script = open(argv[1], O_RDONLY), keeps_the_watches = open_device(O_RDONLY);
    output = open(argv[2], O_WRONLY | O_CREAT | O_TRUNC, 0600);
    must(script >= 0 && output >= 0 && fstat(script, &about) == 0, "open of the files");
    const struct step *steps = mmap(NULL, (size_t)about.st_size + 1, PROT_READ, MAP_PRIVATE, script, 0);
    must(steps != MAP_FAILED, "mmap of the script");
    for (int i = 0; i < SLOTS; i++)
        slots[i].descriptor = -1;
    for (size_t i = 0; i < (size_t)about.st_size / sizeof *steps; i++)
        play(&steps[i]);
    flush();
    close(keeps_the_watches);
    return 0;
}
