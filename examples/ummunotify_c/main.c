/* Sends a buffer twice, exchanges the memory at its address, and sends it again. */
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/mman.h>

#include "cache.h"
#include "watch.h"

#define LENGTH ((size_t)65536)

uint64_t card_pin(uint64_t start, uint64_t end) {
    static uint64_t last_key;
    printf("card: pin %llu bytes, key %llu\n", (unsigned long long)(end - start), (unsigned long long)++last_key);
    return last_key;
}

void card_unpin(uint64_t key) {
    printf("card: unpin key %llu\n", (unsigned long long)key);
}

static int send(char *buffer, size_t length) {
    uint64_t key = cache_get(buffer, length);
    if (!key) {
        perror("cache_get");
        return 1;
    }
    printf("send by key %llu\n", (unsigned long long)key);
    return 0;
}

/* By chance mmap gives an address again that was just unmapped; here it has to. */
static char *map_at(char *address) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | (address ? MAP_FIXED : 0);
    void *memory = mmap(address, LENGTH, PROT_READ | PROT_WRITE, flags, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

int main(void) {
    char *buffer = map_at(NULL), *other = map_at(NULL);
    if (!buffer || !other || watch_open())
        return 1;
    int failed = send(buffer, LENGTH) || send(other, LENGTH) || send(buffer, LENGTH);
    puts("other memory at the first address");
    munmap(buffer, LENGTH);
    buffer = map_at(buffer);
    failed = failed || !buffer || send(buffer, LENGTH) || send(other, LENGTH);
    cache_close();
    watch_close();
    return failed;
}
