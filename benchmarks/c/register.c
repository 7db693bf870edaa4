/*
 * register REGIONS: usermm_register + usermm_unregister of one page while REGIONS others are registered. Each round prints
 * six times in ns a pair: for pages in use that were never watched before, for pages of a mapping that was never touched, and
 * for the pages of the first kind once more; then for the same three what the kernel alone takes for UFFDIO_REGISTER (there is
 * no counterpart of the unregistering: usermm leaves watched what is watched).
 */
#include <stdbool.h>

#include "bench.h"

#include "bare.h"
#include "usermm.h"

#define SPREAD 4 /* one page in so many, so that no two regions touch */
#define LARGEST_BATCH 1000

static usermm_device *device;
static int uffd;

static size_t random_below(size_t limit) {
    static uint64_t state = 88172645463325252u; /* xorshift64 */
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (size_t)(state % limit);
}

/* Between two inaccessible pages: it merges with no neighbour, whose history would be part of every split's price. */
static char *map_apart(size_t pages) {
    char *memory = map_pages(pages + 2);
    need(mprotect(memory, PAGE_BYTES, PROT_NONE) == 0, "mprotect");
    need(mprotect(memory + (pages + 1) * PAGE_BYTES, PAGE_BYTES, PROT_NONE) == 0, "mprotect");
    return memory + PAGE_BYTES;
}

/* `count` page addresses inside one new mapping, SPREAD apart, shuffled. The mapping is the last element. */
static char **scatter(size_t count, bool touched) {
    char **pages = malloc((count + 1) * sizeof *pages);
    need(pages != NULL, "malloc");
    pages[count] = map_apart(count * SPREAD);
    for (size_t i = 0; i < count; i++)
        pages[i] = pages[count] + (i * SPREAD + 1) * PAGE_BYTES;
    for (size_t i = 0; touched && i < count; i++)
        *(volatile char *)pages[i] = 1;
    for (size_t i = count; i > 1; i--) {
        size_t j = random_below(i);
        char *page = pages[i - 1];
        pages[i - 1] = pages[j];
        pages[j] = page;
    }
    return pages;
}

static void discard(char **pages, size_t count) {
    munmap(pages[count] - PAGE_BYTES, (count * SPREAD + 2) * PAGE_BYTES);
    free(pages);
}

static void add(char *page, uint64_t cookie) {
    uint64_t start = (uint64_t)(uintptr_t)page;
    need(usermm_register(device, start, start + PAGE_BYTES, cookie, USERMM_REFUSE_HOLES | USERMM_REFUSE_FILES) == 0,
         "usermm_register");
}

static double pair_ns(char **pages, size_t count) {
    uint64_t start_ns = now_ns();
    for (size_t i = 0; i < count; i++) {
        add(pages[i], UINT64_MAX - i);
        need(usermm_unregister(device, UINT64_MAX - i) == 0, "usermm_unregister");
    }
    return (double)(now_ns() - start_ns);
}

static double bare_ns(char **pages, size_t count) {
    uint64_t start_ns = now_ns();
    for (size_t i = 0; i < count; i++)
        bare_watch(uffd, pages[i], PAGE_BYTES);
    return (double)(now_ns() - start_ns);
}

/* In batches of many sizes, so that what usermm does once in some thousand registrations falls to each column in its turn. */
static void measure(size_t count, double (*time_ns)(char **pages, size_t count)) {
    double sums_ns[3] = {0, 0, 0};
    size_t batch;
    for (size_t left = count; left; left -= batch) {
        batch = LARGEST_BATCH / 2 + random_below(LARGEST_BATCH / 2);
        batch = batch < left ? batch : left;
        char **used = scatter(batch, true), **untouched = scatter(batch, false);
        sums_ns[0] += time_ns(used, batch);
        sums_ns[1] += time_ns(untouched, batch);
        sums_ns[2] += time_ns(used, batch);
        discard(used, batch);
        discard(untouched, batch);
    }
    for (size_t i = 0; i < 3; i++)
        printf("%.1f ", sums_ns[i] / (double)count);
}

int main(int count, char **arguments) {
    size_t pairs, regions = count == 2 ? strtoul(arguments[1], NULL, 10) : 0;
    need(regions > 0, "one argument");
    need(usermm_open(USERMM_ABI_UMMUNOTIFY, 0, &device) == 0, "usermm_open");
    uffd = bare_start();
    char **others = scatter(regions, false);
    for (size_t i = 0; i < regions; i++)
        add(others[i], i);
    while ((pairs = next_round())) {
        measure(pairs, pair_ns);
        measure(pairs, bare_ns);
        printf("\n");
        fflush(stdout);
    }
    return 0;
}
