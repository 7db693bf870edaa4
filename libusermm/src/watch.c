/* Which addresses the userfaultfd is told to watch, and what memory is refused. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "device.h"
#include "kernel.h"
#include "monitor.h"
#include "page.h"
#include "sys.h"

#define RECOUNT_COARSE 65536
#define DEFAULT_MAX_MAP_COUNT 65530

struct mapping {
    uint64_t start, end;
    bool has_inode; /* the number itself may be 0: the first System V segment's is */
    char name[64];  /* filled only then; empty when it does not fit */
};

/* Before 6.11 the text is all there is; "the next mapping" costs a walk from the first one. */
static int mapping_from_text(uint64_t address, struct mapping *ret_mapping) {
    char line[512];
    int result = -ENOENT;
    FILE *maps = fopen("/proc/self/maps", "re");
    if (!maps)
        return -EOPNOTSUPP; /* no /proc: what is there cannot be told */
    while (result == -ENOENT && fgets(line, sizeof line, maps)) {
        struct mapping found = {0};
        unsigned long inode;
        unsigned major, minor;
        int fields = sscanf(line, "%lx-%lx %*s %*s %x:%x %lu %63[^\n]", &found.start, &found.end, &major, &minor,
                            &inode, found.name);
        if (fields < 5 || found.end <= address)
            continue;
        found.has_inode = inode || major || minor;
        *ret_mapping = found;
        result = 0;
    }
    fclose(maps);
    return result;
}

/* The mapping that holds `address` or the next one above. -ENOENT: none. */
static int mapping_at(uint64_t address, struct mapping *ret_mapping) {
    struct um_procmap_query query = {
        .size = sizeof query, .query_flags = UM_PROCMAP_COVERING_OR_NEXT, .query_addr = address};
    if (ioctl(um_monitor.maps_fd, UM_PROCMAP_QUERY, &query))
        return errno == ENOENT ? -ENOENT : mapping_from_text(address, ret_mapping);
    *ret_mapping =
        (struct mapping){query.vma_start, query.vma_end, query.inode || query.dev_major || query.dev_minor, ""};
    if (ret_mapping->has_inode) { /* names cost a path look-up: only files are asked for theirs */
        query.query_addr = query.vma_start;
        query.vma_name_addr = (uint64_t)(uintptr_t)ret_mapping->name;
        query.vma_name_size = sizeof ret_mapping->name;
        ioctl(um_monitor.maps_fd, UM_PROCMAP_QUERY, &query);
    }
    return 0;
}

/* Shared anonymous memory and huge pages have an inode, but no descriptor by which somebody could truncate it. */
static bool is_file(const struct mapping *mapping) {
    return mapping->has_inode && strcmp(mapping->name, "/dev/zero (deleted)") != 0 &&
           strcmp(mapping->name, "/anon_hugepage (deleted)") != 0;
}

/* shmdt(2) tells no userfaultfd, although since 6.7 the segment can be registered with one. */
static bool is_sysv(const struct mapping *mapping) {
    return mapping->has_inode && strncmp(mapping->name, "/SYSV", 5) == 0;
}

/* Guarded by the other userfaultfd, and nothing that a device is given. */
static bool is_generation(const struct mapping *mapping) {
    return mapping->has_inode && strncmp(mapping->name, "/memfd:" UM_PAGE_NAME, sizeof "/memfd:" UM_PAGE_NAME - 1) == 0;
}

bool um_page_is_at(uint64_t address) {
    struct mapping mapping;
    return mapping_at(address, &mapping) == 0 && mapping.start <= address && is_generation(&mapping);
}

static int watch_range(uint64_t start, uint64_t end) {
    struct uffdio_register request = {.range = {start, end - start}, .mode = UFFDIO_REGISTER_MODE_WP};
    return um_sys_ioctl(um_monitor.uffd, UFFDIO_REGISTER, &request) ? -errno : 0;
}

void um_unwatch(uint64_t start, uint64_t end) {
    struct uffdio_range range = {start, end - start};
    um_sys_ioctl(um_monitor.uffd, UFFDIO_UNREGISTER, &range); /* that fails: then there is an event */
}

/* The part of one mapping; the whole of it where a part will not do: huge pages, or no mapping left for a split. */
static int watch_mapping(const struct mapping *mapping, uint64_t start, uint64_t end, bool coarse) {
    int result = coarse ? -ENOMEM : watch_range(start, end);
    if (result == -ENOMEM || result == -EINVAL)
        result = watch_range(mapping->start, mapping->end);
    return result == -EINVAL || result == -EPERM ? -EOPNOTSUPP : result;
}

static int watch_each(uint64_t start, uint64_t end, bool coarse) {
    struct mapping mapping, again;
    for (uint64_t at = start; at < end; at = mapping.end) {
        int result = mapping_at(at, &mapping);
        if (result == -ENOENT || (result == 0 && mapping.start >= end))
            return 0;
        if (result)
            return result;
        if (is_generation(&mapping))
            continue;
        result = watch_mapping(&mapping, mapping.start > start ? mapping.start : start,
                               mapping.end < end ? mapping.end : end, coarse);
        /* A mapping that went away meanwhile is a hole, not a refusal. */
        if (result == -EOPNOTSUPP &&
            (mapping_at(at, &again) || again.start != mapping.start || again.end != mapping.end))
            continue;
        if (result)
            return result;
    }
    return 0;
}

/* Inside `counting` only: what registers may be a signal's handler on a small stack. */
static uint64_t count_mappings(void) {
    static char text[16384];
    uint64_t lines = 0;
    ssize_t size;
    int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    while (fd >= 0 && (size = read(fd, text, sizeof text)) > 0)
        for (ssize_t i = 0; i < size; i++)
            lines += text[i] == '\n';
    if (fd >= 0)
        close(fd);
    return lines;
}

static uint64_t max_map_count(void) {
    char text[32] = "";
    int fd = open("/proc/sys/vm/max_map_count", O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    unsigned long limit = size > 0 ? strtoul(text, NULL, 10) : 0;
    return limit ? limit : DEFAULT_MAX_MAP_COUNT;
}

/*
 * Watching a part of a mapping splits it: two mappings more, of the vm.max_map_count that the whole process shares. So
 * parts are watched until half of that is in use, and whole mappings, which need no split, from then on: the region
 * tree tells the difference. The count, some milliseconds' work, is measured again after as many parts as could have
 * used up half of the rest, and at least enough to make it cheap: that overshoots the half by an eighth at most.
 */
static bool must_be_coarse(void) {
    static _Atomic int64_t until_recount = 0;
    static atomic_bool coarse = false;
    static atomic_flag counting = ATOMIC_FLAG_INIT;
    if (atomic_fetch_sub_explicit(&until_recount, 1, memory_order_relaxed) > 0 || atomic_flag_test_and_set(&counting))
        return atomic_load_explicit(&coarse, memory_order_relaxed);
    uint64_t count = count_mappings(), budget = max_map_count() / 2;
    bool now_coarse = count >= budget;
    int64_t room = now_coarse ? RECOUNT_COARSE : (int64_t)(budget - count) / 4;
    int64_t least = (int64_t)budget / 8;
    atomic_store_explicit(&coarse, now_coarse, memory_order_relaxed);
    atomic_store_explicit(&until_recount, room > least ? room : least, memory_order_relaxed);
    atomic_flag_clear(&counting);
    return now_coarse;
}

/* What nobody may register, and what USERMM_REFUSE_* asks. Once the memory is watched, a change after this look is
 * reported. */
int um_refuse(uint64_t start, uint64_t end, unsigned flags) {
    struct mapping mapping;
    for (uint64_t at = start; at < end; at = mapping.end) {
        int result = mapping_at(at, &mapping);
        if (result && result != -ENOENT)
            return result;
        if (flags & USERMM_REFUSE_HOLES && (result || mapping.start > at))
            return -EFAULT;
        if (result || mapping.start >= end)
            return 0;
        if (is_sysv(&mapping) || (flags & USERMM_REFUSE_FILES && is_file(&mapping)))
            return -EOPNOTSUPP;
    }
    return 0;
}

static int watch_pages(uint64_t start, uint64_t end) {
    uint64_t page_size = um_page_size();
    uint64_t top = UINT64_MAX / 2 + 1 - page_size; /* above it no user mapping exists, and rounding cannot overflow */
    if (start >= top)
        return 0;
    start &= ~(page_size - 1);
    end = end > top ? top : (end + page_size - 1) & ~(page_size - 1);
    bool coarse = must_be_coarse();
    int result = coarse ? -ENOMEM : watch_range(start, end);
    if (result == -EINVAL || result == -ENOMEM || result == -EPERM || result == -EBUSY)
        result = watch_each(start, end, coarse);
    return result;
}

/* An empty or reversed region is hit only by what covers its byte `start` and the byte before its `end`: watch those.
 */
static int watch_inside_out(uint64_t start, uint64_t end) {
    int result = end ? watch_pages(end - 1, end) : 0;
    return result || !end ? result : watch_pages(start, start + 1);
}

int um_watch(uint64_t start, uint64_t end, unsigned flags) {
    if (end <= start)
        return flags & USERMM_REFUSE_HOLES ? -EFAULT : watch_inside_out(start, end);
    int result = watch_pages(start, end);
    return result ? result : um_refuse(start, end, flags);
}
