/* The floor: a userfaultfd in the mode that usermm uses, and a thread with nothing but poll and read. */
#ifndef BARE_H
#define BARE_H

#include <stddef.h>

/* Opens it and starts the thread. Returns the descriptor. */
int bare_start(void);

/* Opens it without a thread: for calls on the descriptor alone. */
int bare_open(void);

void bare_watch(int uffd, void *start, size_t length_bytes);

#endif
