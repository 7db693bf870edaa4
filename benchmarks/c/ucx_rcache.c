/* Offsets, sizes and flags below: DWARF of libucs.so 1.22.0 (the wheel libucx-cu12), tried out by `layout_differs`. */
#include <dlfcn.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "ucx_rcache.h"

#define EXPORT __attribute__((visibility("default")))
#define WANTED_MAJOR 1
#define WANTED_MINOR 22

#define VM_UNMAPPED 0x20000 /* UCM_EVENT_VM_UNMAPPED */
#define NEED_LRU_LOCK 0x8   /* UCS_RCACHE_FLAG_NEED_LRU_LOCK. _NO_PFN_CHECK, 0x1, also ends all eviction in 1.22.0. */
#define IN_USE_FLAGS 0x3    /* UCS_RCACHE_REGION_FLAG_REGISTERED, _PGTABLE */
#define EVENT_PRIORITY 1000
#define READ_WRITE (PROT_READ | PROT_WRITE)

typedef signed char ucs_status; /* an enum of one byte; 0 is success */

struct operations {
    ucs_status (*mem_reg)(void *context, void *rcache, void *argument, void *region, uint16_t flags);
    void (*mem_dereg)(void *context, void *rcache, void *region);
    void (*merge)(void *context, void *rcache, void *argument, void *region);
    void (*dump_region)(void *context, void *rcache, void *region, char *text, size_t size);
};

struct parameters {
    size_t region_struct_size;
    int ucm_events, ucm_event_priority;
    const struct operations *operations;
    void *context;
    int flags;
    unsigned long max_regions;
    size_t max_size, max_unreleased;
};

/* What `theirs` in struct ucx_region holds. */
struct region {
    uint64_t start, end;
    void *lists[6];
    size_t alignment;
    volatile uint32_t references; /* one more than its holders while it is in the look-up */
    ucs_status status;
    uint8_t protection, flags, lru_flags;
    uint64_t private;
};

_Static_assert(sizeof(struct parameters) == 64 && sizeof(struct region) == 88, "sizes in libucs 1.22");
_Static_assert(offsetof(struct region, references) == 72 && offsetof(struct region, flags) == 78,
               "offsets in libucs 1.22");
_Static_assert(offsetof(struct ucx_region, handle) == sizeof(struct region), "what we add comes after theirs");

struct ucx_cache {
    void *rcache;
    uint64_t alignment;
    _Atomic uint64_t registrations, deregistrations;
};

static struct {
    ucs_status (*create)(const struct parameters *parameters, const char *name, void *statistics, void **ret_rcache);
    void (*destroy)(void *rcache);
    ucs_status (*get)(void *rcache, void *address, size_t length, size_t alignment, int protection, void *argument,
                      struct ucx_region **ret_region);
    void (*put)(void *rcache, struct ucx_region *region);
    void (*set_external_event)(int events);
    void (*vm_munmap)(void *address, size_t length);
} ucx;

static char problem[512];

static ucs_status count_registration(void *context, void *rcache, void *argument, void *region, uint16_t flags) {
    struct ucx_cache *cache = context;
    (void)rcache, (void)argument, (void)flags;
    ((struct ucx_region *)region)->handle =
        atomic_fetch_add_explicit(&cache->registrations, 1, memory_order_relaxed) + 1;
    return 0;
}

static void count_deregistration(void *context, void *rcache, void *region) {
    struct ucx_cache *cache = context;
    (void)rcache, (void)region;
    atomic_fetch_add_explicit(&cache->deregistrations, 1, memory_order_relaxed);
}

static void ignore_merge(void *context, void *rcache, void *argument, void *region) {
    (void)context, (void)rcache, (void)argument, (void)region;
}

static void describe(void *context, void *rcache, void *region, char *text, size_t size) {
    (void)context, (void)rcache;
    snprintf(text, size, "handle %llu", (unsigned long long)((struct ucx_region *)region)->handle);
}

static const struct operations operations = {count_registration, count_deregistration, ignore_merge, describe};

static bool find(void *library, const char *name, void *ret_function) {
    void *found = dlsym(library, name);
    memcpy(ret_function, &found, sizeof found);
    if (!found)
        snprintf(problem, sizeof problem, "%s is not in it: UCX %d.%d is needed", name, WANTED_MAJOR, WANTED_MINOR);
    return found != NULL;
}

/* libucs does not tell its version; libucp does, and comes from the same build. */
static bool check_version(const char *library) {
    unsigned major, minor, release;
    void (*version)(unsigned *major, unsigned *minor, unsigned *release);
    const char *slash = strrchr(library, '/');
    char path[4096];
    snprintf(path, sizeof path, "%.*slibucp.so", slash ? (int)(slash - library + 1) : 0, library);
    void *libucp = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!libucp) {
        snprintf(problem, sizeof problem, "the version of %s is unknown: %s", library, dlerror());
        return false;
    }
    if (!find(libucp, "ucp_get_version", &version))
        return false;
    version(&major, &minor, &release);
    if (major == WANTED_MAJOR && minor == WANTED_MINOR)
        return true;
    snprintf(problem, sizeof problem,
             "%s is UCX %u.%u.%u, whose cache is laid out otherwise: pip install libucx-cu12==1.22.0", library, major,
             minor, release);
    return false;
}

/* For the library's constructor, which else patches munmap, mmap, brk and others in libc, and handles SIGHUP. */
static void set_environment(void) {
    setenv("UCX_MEM_MMAP_HOOK_MODE", "none", 1);
    setenv("UCX_MEM_MALLOC_HOOKS", "n", 1);
    setenv("UCX_DEBUG_SIGNO", "0", 1);
    setenv("UCX_VFS_ENABLE", "n", 1);
}

static bool load(const char *library) {
    set_environment();
    void *libucs = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!libucs) {
        snprintf(problem, sizeof problem, "%s: pip install libucx-cu12==1.22.0", dlerror());
        return false;
    }
    if (!check_version(library) || !find(libucs, "ucs_rcache_create", &ucx.create) ||
        !find(libucs, "ucs_rcache_destroy", &ucx.destroy) || !find(libucs, "ucs_rcache_get", &ucx.get) ||
        !find(libucs, "ucs_rcache_region_put", &ucx.put) || !find(libucs, "ucm_vm_munmap", &ucx.vm_munmap) ||
        !find(libucs, "ucm_set_external_event", &ucx.set_external_event))
        return false;
    ucx.set_external_event(VM_UNMAPPED); /* we shall tell; install nothing */
    return true;
}

static bool create(struct ucx_cache *cache, const struct ucx_limits *limits) {
    struct parameters parameters = {
        .region_struct_size = sizeof(struct ucx_region),
        .ucm_events = VM_UNMAPPED,
        .ucm_event_priority = EVENT_PRIORITY,
        .operations = &operations,
        .context = cache,
        .flags = limits->unlocked ? 0 : NEED_LRU_LOCK,
        .max_regions = limits->max_regions ? limits->max_regions : ULONG_MAX,
        .max_size = limits->max_bytes ? limits->max_bytes : SIZE_MAX,
        .max_unreleased = SIZE_MAX, /* no clean-up by a thread of UCX's in the middle of a measurement */
    };
    cache->alignment = limits->alignment;
    ucs_status status = ucx.create(&parameters, "usermm-benchmark", NULL, &cache->rcache);
    if (status)
        snprintf(problem, sizeof problem, "ucs_rcache_create answered %d", status);
    return status == 0;
}

/* A build with other options could still have other layouts. */
static bool layout_differs(void) {
    const struct ucx_limits limits = {.alignment = 4096};
    const uint64_t page = 0x100000;
    struct ucx_cache cache = {0};
    bool expected = false;
    if (!create(&cache, &limits))
        return true;
    const struct ucx_region *ours = ucx_get(&cache, page + 16, 32);
    if (ours) {
        const struct region *theirs = (const void *)ours;
        expected = theirs->start == page && theirs->end == page + 4096 && theirs->alignment == 4096 &&
                   theirs->references == 2 && theirs->status == 0 && theirs->protection == READ_WRITE &&
                   theirs->flags == IN_USE_FLAGS && ours->handle == 1;
        ucx_put(&cache, ours);
        expected = expected && theirs->references == 1;
    }
    ucx.destroy(cache.rcache);
    expected = expected && ucx_live(&cache) == 0;
    if (!expected)
        snprintf(problem, sizeof problem,
                 "this build of UCX lays its regions out otherwise: pip install libucx-cu12==1.22.0");
    return !expected;
}

EXPORT const char *ucx_open(const char *library, const struct ucx_limits *limits, struct ucx_cache **ret_cache) {
    if (limits->alignment < 16 || (limits->alignment & (limits->alignment - 1)))
        return "the alignment must be a power of two, at least 16";
    if (!ucx.set_external_event && (!load(library) || layout_differs())) {
        ucx.set_external_event = NULL;
        return problem;
    }
    struct ucx_cache *cache = calloc(1, sizeof *cache);
    if (!cache)
        return "no memory for the cache";
    if (!create(cache, limits)) {
        free(cache);
        return problem;
    }
    *ret_cache = cache;
    return NULL;
}

EXPORT const struct ucx_region *ucx_get(struct ucx_cache *cache, uint64_t address, uint64_t length) {
    struct ucx_region *region = NULL;
    void *start = (void *)(uintptr_t)address;
    return ucx.get(cache->rcache, start, length, cache->alignment, READ_WRITE, NULL, &region) == 0 ? region : NULL;
}

EXPORT void ucx_put(struct ucx_cache *cache, const struct ucx_region *region) {
    ucx.put(cache->rcache, (struct ucx_region *)region);
}

EXPORT void ucx_invalidate(struct ucx_cache *cache, uint64_t address, uint64_t length) {
    (void)cache;
    ucx.vm_munmap((void *)(uintptr_t)address, length);
}

EXPORT uint64_t ucx_registrations(const struct ucx_cache *cache) {
    return atomic_load_explicit(&cache->registrations, memory_order_relaxed);
}

EXPORT uint64_t ucx_live(const struct ucx_cache *cache) {
    return ucx_registrations(cache) - atomic_load_explicit(&cache->deregistrations, memory_order_relaxed);
}

EXPORT void ucx_close(struct ucx_cache *cache) {
    ucx.destroy(cache->rcache);
    free(cache);
}
