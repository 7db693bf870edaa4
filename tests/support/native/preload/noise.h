/* A thread that keeps the monitor busy, on a device of its own. */
#ifndef NOISE_H
#define NOISE_H

#include "../abi.h"
#include "../raw.h"

static volatile bool stop;

static void *make_noise(void *unused) {
    int own = open_device(O_RDONLY);
    for (uint64_t i = 0; !stop; i++) {
        char *mine = map_pages(1);
        expect(register_range(own, mine, PAGE, i) == 0);
        expect(RAW(munmap, mine, PAGE, 0, 0, 0, 0) == 0);
        expect(unregister(own, i) == 0);
    }
    close(own);
    return unused;
}

#endif
