/* What a library has to mind that works inside calls of a program that knows nothing of it. */
#ifndef UM_GUARD_H
#define UM_GUARD_H

#include <signal.h>
#include <stdbool.h>

/* Around what takes locks: no signal's handler runs in between, and no cancellation. They nest. */
struct um_guard {
    sigset_t signals;
    int cancel_state;
};
void um_guard_enter(struct um_guard *guard);
void um_guard_leave(const struct um_guard *guard);
/* Whether this thread is between the two: whatever is called then is our own doing, and goes the native way. */
bool um_guard_is_inside(void);

/* Before a device is opened: which process it is. */
void um_process_is_known(void);

/* A child made by vfork shares this memory, but its descriptors are its own. */
bool um_is_vfork_child(void);

#endif
