/* A small registration cache for one thread: memory is pinned by the card once, and found again while it is there. */
#ifndef CACHE_H
#define CACHE_H

#include <stddef.h>
#include <stdint.h>

/* The card's key for memory that covers [address, address + length); 0 if there is none: errno says why. */
uint64_t cache_get(void *address, size_t length);

void cache_close(void);

/* The card's library, here one that only prints. */
uint64_t card_pin(uint64_t start, uint64_t end);
void card_unpin(uint64_t key);

#endif
