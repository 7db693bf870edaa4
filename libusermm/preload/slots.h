/* Where clients are kept: never freed, so that whoever has a stale slot finds a client there, if not the one it meant.
 */
#ifndef UM_SLOTS_H
#define UM_SLOTS_H

#include "client.h"

struct um_client *um_slot_at(uint32_t slot);
/* Slots below it have been used. */
uint32_t um_slot_count(void);

/* A slot that no client lives in, for whoever makes clients, one thread at a time. NULL: no memory. */
struct um_client *um_slot_find(uint32_t *ret_slot);

#endif
