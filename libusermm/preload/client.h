/*
 * The devices that the program has open, by its descriptors.
 *
 * A client's descriptor is a description of its own of the device's pipe, with a shared flock(2) on it. So the kernel
 * counts its copies, whoever makes and closes them (dup, fork, SCM_RIGHTS, exec), and the device ends when an exclusive
 * lock can be had. Whether a number is a device's is asked of the kernel, too: the pipe's inode. The table only says
 * where it is worth asking before a read.
 */
#ifndef UM_CLIENT_H
#define UM_CLIENT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "usermm.h"

#define UM_CLIENT_LIVE (UINT64_C(1) << 63)

struct um_client {
    _Atomic uint64_t holders; /* calls in progress, and UM_CLIENT_LIVE */
    _Atomic uint64_t inode;   /* of the pipe */
    usermm_device *device;
    uint32_t slot;
    atomic_bool doubtful; /* a descriptor was closed: perhaps the last */
};

#define UM_TABLE_SIZE (1u << 20) /* descriptors; those above are found all the same, a little later */
extern _Atomic uint32_t um_table[UM_TABLE_SIZE];

extern _Atomic uint32_t um_clients; /* that live; 0: nothing here is a device's */

/* Whether this number was a device's when we last knew. */
static inline bool um_client_is_known(int fd) {
    return (unsigned)fd < UM_TABLE_SIZE && atomic_load_explicit(&um_table[fd], memory_order_relaxed) != 0;
}

/* Opens a device for the program: a descriptor, or -errno. */
int um_client_open(int abi, int flags);

/* The client behind a descriptor, or NULL: it is something else. For as long as it is held it does not end. Keeps
 * errno. */
struct um_client *um_client_hold(int fd);
void um_client_drop(struct um_client *client);

/* Whether the number still is a descriptor of the client's. */
bool um_client_has(const struct um_client *client, int fd);

/* close(2) of what may be a descriptor of a client. */
int um_client_close(int fd);

/* After fork, in the child. */
void um_client_in_child(void);

#endif
