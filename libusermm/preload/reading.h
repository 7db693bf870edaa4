#ifndef UM_READING_H
#define UM_READING_H

#include <stdbool.h>
#include <sys/types.h>
#include <sys/uio.h>

/*
 * read(2) of a device into `parts`, as the driver does it: blocking or not as the descriptor is, restarted after
 * signals with SA_RESTART, a cancellation point. `taken`: what a native read took from the pipe before it was known to
 * be one. false: the descriptor is no device's; then nothing was done, and errno is what it was.
 */
bool um_read_device(int fd, const struct iovec *parts, int count, ssize_t taken, ssize_t *ret_done, void *site);

#endif
