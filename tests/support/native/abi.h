/*
 * The two devices' ABI as their clients know it, in numbers that do not come from our own headers, and what every test
 * program does with a device. Compiled with -D_GNU_SOURCE.
 */
#ifndef ABI_H
#define ABI_H

#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "program.h"

#define DEVICE_2 "/dev/ummunotify"
#define DEVICE_1 "/dev/ummunot"

#define EXCHANGE 0xC0045501ul
#define REGISTER 0x40205502ul
#define UNREGISTER 0x40085503ul
#define REGISTER_1 0xC0205501ul
#define UNREGISTER_1 0x40085502ul

#define INVAL 0u
#define LAST 1u
#define HINT 1u
#define READ_LIMIT 4096ul

struct region {
    uint64_t start, end, cookie;
    uint32_t flags, reserved;
};

struct region_1 {
    uint32_t version, reserved;
    uint64_t start, end, cookie;
};

struct event {
    uint32_t type, flags;
    uint64_t start, end, value; /* value: the cookie; of a LAST the generation */
};

_Static_assert(sizeof(struct region) == 32 && sizeof(struct region_1) == 32 && sizeof(struct event) == 32, "layouts");

static inline int open_device(int flags) {
    int device = open(DEVICE_2, flags);
    must(device >= 0, "open " DEVICE_2);
    return device;
}

/* The generation as clients read it: the first 8 bytes of the mapped page, one load. */
static inline const volatile uint64_t *map_generation(int device) {
    void *page = mmap(NULL, 8, PROT_READ, MAP_SHARED, device, 0);
    must(page != MAP_FAILED, "mmap " DEVICE_2);
    return page;
}

/* As real clients do: flags are whatever was on the stack. */
static inline int register_range(int device, const void *start, size_t length, uint64_t cookie) {
    struct region region = {(uintptr_t)start, (uintptr_t)start + length, cookie, 0xdeadbeef, 0x5aa5};
    return ioctl(device, REGISTER, &region);
}

static inline int unregister(int device, uint64_t cookie) {
    return ioctl(device, UNREGISTER, &cookie);
}

#endif
