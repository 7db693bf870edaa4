/* A client that does what there is to do once, and ends while the device is open. "ok" when all was right. */
#include "abi.h"

int main(void) {
    int device = open_device(O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    const volatile uint64_t *generation = map_generation(device);
    char *pages = map_pages(4);
    struct event events[3];
    expect(*generation == 0);
    expect(register_range(device, pages, 4 * PAGE, 42) == 0);
    expect(*generation == 0);
    expect_errno(EAGAIN, read(device, events, sizeof events));
    expect(munmap(pages + PAGE, PAGE) == 0);
    expect(*generation == 1);
    expect(read(device, events, sizeof events) == 2 * sizeof *events);
    expect(events[0].type == INVAL && events[0].flags == HINT && events[0].value == 42);
    expect(events[0].start == (uintptr_t)pages + PAGE && events[0].end == (uintptr_t)pages + 2 * PAGE);
    expect(events[1].type == LAST && events[1].value == 1);
    puts("ok");
    return 0;
}
