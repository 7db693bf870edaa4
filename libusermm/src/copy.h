#ifndef UM_COPY_H
#define UM_COPY_H

#include <stddef.h>
#include <stdint.h>

/* 0, or -EFAULT where a plain copy would crash. */
int um_copy_in(void *mine, void *theirs, size_t size);
int um_copy_out(void *theirs, const void *mine, size_t size);

/* The same by the kernel's own access alone, with nothing else seen there in between. */
int um_copy_word_out(uint64_t *theirs, uint64_t word);

#endif
