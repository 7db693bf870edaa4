#ifndef UM_COPY_H
#define UM_COPY_H

#include <stddef.h>

/* 0, or -EFAULT where a plain copy would crash. */
int um_copy_in(void *mine, void *theirs, size_t size);
int um_copy_out(void *theirs, const void *mine, size_t size);

#endif
