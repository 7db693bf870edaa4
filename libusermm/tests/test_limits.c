/* Many regions: within vm.max_map_count, and small. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "test.h"

#ifdef USERMM_FAULT_INJECTION
enum { SCATTERED = 400, INSIDE = 1000 };
#else
enum { SCATTERED = 100000, INSIDE = 1000000 };
#endif

static size_t count_mappings(void) {
    size_t lines = 0;
    int c;
    FILE *maps = fopen("/proc/self/maps", "re");
    while ((c = getc(maps)) != EOF)
        lines += c == '\n';
    fclose(maps);
    return lines;
}

static size_t max_map_count(void) {
    unsigned long limit = 65530;
    FILE *file = fopen("/proc/sys/vm/max_map_count", "re");
    CHECK(file && fscanf(file, "%lu", &limit) == 1);
    fclose(file);
    return limit;
}

/* Every other page: watched one by one they would need 200 000 mappings. */
static void scattered_regions_leave_mappings_for_others(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    char *memory = test_map(2ul * SCATTERED);
    for (size_t i = 0; i < SCATTERED; i++)
        test_register(device, memory + 2 * i * PAGE, PAGE, i);
    CHECK(count_mappings() < max_map_count() * 3 / 4);
    uint64_t generation = 0;
    for (size_t i = 0; i < SCATTERED; i += SCATTERED / 100) {
        munmap(memory + (2 * i + 1) * PAGE, PAGE); /* a page between regions hits none */
        CHECK(test_generation(device) == generation);
        munmap(memory + 2 * i * PAGE, PAGE);
        CHECK(test_generation(device) == ++generation);
    }
}

static void a_million_inside_one_mapping(void) {
    usermm_device *device = test_open(2, O_RDONLY);
    struct usermm_event events[128];
    char *memory = test_map(16);
    size_t before = mallinfo2().uordblks, mappings = count_mappings();
    for (size_t i = 0; i < INSIDE; i++) {
        uint64_t start = (uintptr_t)memory + i % (16 * PAGE - 64);
        CALL(usermm_register(device, start, start + 64, i, 0));
    }
    size_t bytes = (mallinfo2().uordblks - before) / INSIDE;
#ifdef USERMM_COUNTS_BYTES /* sanitizers have their own malloc */
    CHECK(bytes > 0 && bytes <= 256);
#endif
    CHECK(count_mappings() < mappings + 64);
    munmap(memory, 16 * PAGE);
    CHECK(test_generation(device) == 1);
    size_t count, seen = 0;
    while ((count = test_read(device, events, 128)) > 0)
        for (size_t i = 0; i < count; i++)
            seen += events[i].type == USERMM_EVENT_INVAL;
    CHECK(seen == INSIDE);
    printf("# %zu bytes a region\n", bytes);
}

int main(void) {
    static const struct test tests[] = {
        TEST(scattered_regions_leave_mappings_for_others),
        TEST(a_million_inside_one_mapping),
    };
    return test_main(tests, sizeof tests / sizeof *tests);
}
