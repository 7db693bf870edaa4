/* Pages of files at one address, and what can be done with them; knows no Python. */
#ifndef UM_PAGES_H
#define UM_PAGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct um_run {
    int fd;
    int64_t offset;
    size_t length;
};

/* How pages are mapped. `inherit` false: a forked child has nothing there. */
struct um_mode {
    int prot, flags;
    bool inherit;
};

/*
 * Maps the runs side by side, all or none; what `total` has more than they is kept for um_pages_fill. 0, or a negative
 * errno.
 */
int um_pages_map(const struct um_run *runs, size_t count, size_t total, struct um_mode mode, void **ret_address);

/* Maps the runs side by side in the place of what is at `address`. 0, or a negative errno, maybe after a part. */
int um_pages_fill(void *address, const struct um_run *runs, size_t count, struct um_mode mode);

/*
 * Puts a private mapping of the file `fd` with the same content in the place of [address, address + length). A page
 * that is gone, since its file was truncated, is zeros. 0, or a negative errno and nothing was changed.
 */
int um_pages_detach(void *address, size_t length, int prot, bool inherit, int fd);

/* A number of this process: getpid(), at the price of a load. */
pid_t um_pages_process(void);

/* Copies from (or to) memory of this process that may be gone. 0, or -EFAULT, maybe after a part. */
int um_pages_read(const void *from, void *buffer, size_t length);
int um_pages_write(void *to, const void *buffer, size_t length);

#endif
