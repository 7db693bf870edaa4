/* What makes a plain load of the mapped generation exact. */
#ifndef UM_GATE_H
#define UM_GATE_H

#include "device.h"

/* A client's mapping of a device's page. */
struct um_mapping {
    struct um_mapping *next;
    void *address;
    size_t length;
    int prot;
};

/* Before messages are read: from now on, loads of every device's page wait. 0 or -errno. With the lock held. */
int um_gate_shut(void);
/* After they were applied: loads go on, and see it. 0 or -errno: they do, but will not wait again. With the lock held.
 */
int um_gate_open(void);
/* The same for one device, which is about to leave. */
void um_gate_open_device(usermm_device *device);

/* Shows the generation in the page, or keeps it for um_gate_open. With the lock held. */
void um_gate_show(usermm_device *device, uint64_t generation);

/*
 * Looks after what waits in the gate's descriptor. A load that found no page can fall asleep just after everybody was
 * woken; and reading the message of a moved mapping lets the thread go that moved it. -EBADF: it is not ours any more.
 */
int um_gate_attend(void);

/* Makes loads from the page at `address`, a mapping of a device's page that nobody uses yet, wait. 0 or -errno. */
int um_gate_guard(void *address);

#endif
