/*
 * register REGIONS: usermm_register + usermm_unregister of one page while REGIONS others are registered. Each round prints
 * "new again bare_new bare_again" in ns a pair: pages never watched before, the same pages once more, and what the kernel
 * alone takes for UFFDIO_REGISTER of a page of each kind (there is no counterpart of the unregistering).
 */
#include "bench.h"

#include "bare.h"
#include "usermm.h"

#define SPREAD 4 /* one page in so many, so that no two regions touch */

static usermm_device *device;
static int uffd;

static size_t random_below(size_t limit) {
    static uint64_t state = 88172645463325252u; /* xorshift64 */
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (size_t)(state % limit);
}

/* `count` page addresses inside one new mapping, SPREAD apart, shuffled. The mapping is the last element. */
static char **scatter(size_t count) {
    char **pages = malloc((count + 1) * sizeof *pages);
    need(pages != NULL, "malloc");
    pages[count] = map_pages(count * SPREAD);
    for (size_t i = 0; i < count; i++)
        pages[i] = pages[count] + (i * SPREAD + 1) * PAGE_BYTES;
    for (size_t i = count; i > 1; i--) {
        size_t j = random_below(i);
        char *page = pages[i - 1];
        pages[i - 1] = pages[j];
        pages[j] = page;
    }
    return pages;
}

static void discard(char **pages, size_t count) {
    munmap(pages[count], count * SPREAD * PAGE_BYTES);
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
    return (double)(now_ns() - start_ns) / (double)count;
}

static double bare_ns(char **pages, size_t count) {
    uint64_t start_ns = now_ns();
    for (size_t i = 0; i < count; i++)
        bare_watch(uffd, pages[i], PAGE_BYTES);
    return (double)(now_ns() - start_ns) / (double)count;
}

int main(int count, char **arguments) {
    size_t pairs, regions = count == 2 ? strtoul(arguments[1], NULL, 10) : 0;
    need(regions > 0, "one argument");
    need(usermm_open(USERMM_ABI_UMMUNOTIFY, 0, &device) == 0, "usermm_open");
    uffd = bare_start();
    char **others = scatter(regions);
    for (size_t i = 0; i < regions; i++)
        add(others[i], i);
    while ((pairs = next_round())) {
        char **pages = scatter(pairs), **bare_pages = scatter(pairs);
        double new_ns = pair_ns(pages, pairs), again_ns = pair_ns(pages, pairs);
        double bare_new_ns = bare_ns(bare_pages, pairs), bare_again_ns = bare_ns(bare_pages, pairs);
        printf("%.1f %.1f %.1f %.1f\n", new_ns, again_ns, bare_new_ns, bare_again_ns);
        fflush(stdout);
        discard(pages, pairs);
        discard(bare_pages, pairs);
    }
    return 0;
}
