/* The device's whole use, once; for callers in odd places. Says where it failed by ending the process. */
#ifndef ONCE_H
#define ONCE_H

#include "../abi.h"

static void use_it_once(void) {
    struct event events[2];
    int device = open_device(O_RDONLY | O_NONBLOCK);
    const volatile uint64_t *generation = map_generation(device);
    char *page = map_at(NULL, PAGE, 0);
    expect(register_range(device, page, PAGE, 6) == 0);
    expect(munmap(page, PAGE) == 0);
    expect(*generation >= 1); /* more when another thread was given the address and unmapped it, too */
    expect(read(device, events, sizeof events) == 64 && events[0].value == 6 && events[1].value >= 1);
    expect(unregister(device, 6) == 0);
    expect(munmap((void *)(uintptr_t)generation, 8) == 0);
    expect(close(device) == 0);
}

#endif
