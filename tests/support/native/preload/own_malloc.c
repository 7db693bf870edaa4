/*
 * A program that brings its own malloc, which uses the device itself: each large block is a mapping that is registered,
 * and each free of one is counted by the generation. Whatever the library allocates, it allocates here.
 */
#include <pthread.h>

#include "../abi.h"

#define POOL (64ul << 20)
#define LARGE (64ul << 10)
#define HEADER 64ul

struct header {
    size_t length, mapped;
    uint64_t cookie; /* 0: not registered */
};

static char *pool;
static size_t used;
static int device = -1;
static const volatile uint64_t *generation;
static __thread bool inside;
static unsigned long last_cookie, counted;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void start_device(void) {
    device = -2; /* what open itself allocates comes from the pool */
    device = open(DEVICE_2, O_RDONLY | O_NONBLOCK);
    if (device >= 0)
        generation = map_generation(device);
}

static void *from_pool(size_t length) {
    pthread_mutex_lock(&lock);
    if (!pool)
        pool = map_at(NULL, POOL, MAP_NORESERVE);
    char *block = pool + used + HEADER;
    used += HEADER + ((length + 63) & ~63ul);
    must(used <= POOL, "the pool's size");
    pthread_mutex_unlock(&lock);
    *(struct header *)(block - HEADER) = (struct header){length, 0, 0};
    return block;
}

static void *mapped(size_t length) {
    size_t whole = (length + HEADER + PAGE - 1) & ~(PAGE - 1);
    char *block = map_at(NULL, whole, 0);
    struct header *header = (struct header *)block;
    *header = (struct header){length, whole, 0};
    if (device == -1)
        start_device();
    if (device >= 0) {
        header->cookie = __atomic_add_fetch(&last_cookie, 1, __ATOMIC_RELAXED);
        expect(register_range(device, block, whole, header->cookie) == 0);
    }
    return block + HEADER;
}

/* Not malloc itself, since gcc makes a calloc of malloc and memset. */
static void *allocate(size_t length) {
    if (inside || length < LARGE)
        return from_pool(length);
    inside = true;
    void *block = mapped(length);
    inside = false;
    return block;
}

void *malloc(size_t length) {
    return allocate(length);
}

void free(void *block) {
    struct header *header = block ? (struct header *)((char *)block - HEADER) : NULL;
    if (!header || !header->mapped)
        return;
    uint64_t cookie = header->cookie, before = cookie ? *generation : 0;
    munmap(header, header->mapped);
    if (!cookie)
        return;
    expect(*generation > before);
    expect(unregister(device, cookie) == 0);
    __atomic_fetch_add(&counted, 1, __ATOMIC_RELAXED);
}

void *calloc(size_t count, size_t size) {
    void *block = allocate(count * size);
    return memset(block, 0, count * size);
}

void *realloc(void *block, size_t length) {
    void *fresh = allocate(length);
    if (block) {
        size_t old = ((struct header *)((char *)block - HEADER))->length;
        memcpy(fresh, block, old < length ? old : length);
        free(block);
    }
    return fresh;
}

void *aligned_alloc(size_t alignment, size_t length) {
    char *block = from_pool(length + alignment + HEADER);
    char *aligned = (char *)(((uintptr_t)block + HEADER + alignment - 1) & ~(alignment - 1));
    *(struct header *)(aligned - HEADER) = (struct header){length, 0, 0};
    return aligned;
}

int posix_memalign(void **ret_block, size_t alignment, size_t length) {
    *ret_block = aligned_alloc(alignment, length);
    return 0;
}

void *memalign(size_t alignment, size_t length) {
    return aligned_alloc(alignment, length);
}

static void *churn(void *unused) {
    for (int i = 0; i < 2000; i++) {
        char *block = malloc(LARGE + (size_t)(i % 7) * PAGE);
        block[0] = 1;
        free(block);
        free(calloc(1, 100));
    }
    return unused;
}

int main(void) {
    pthread_t threads[3];
    free(malloc(LARGE)); /* opens the device: while one thread does, the others would go without */
    for (int i = 0; i < 3; i++)
        must(pthread_create(&threads[i], NULL, churn, NULL) == 0, "pthread_create");
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    expect(device >= 0);
    expect(last_cookie >= 5000 && counted >= 5000);
    puts("ok");
    return 0;
}
