/* The page that clients map, beyond usermm_map. All with um_lifecycle_lock held, except what is said. */
#ifndef UM_PAGE_H
#define UM_PAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "usermm.h"

#define UM_PAGE_NAME "usermm generation" /* of the memfd */

/* As usermm_map, at an address if `flags` have MAP_FIXED. Takes the lock itself. */
int um_page_map(usermm_device *device, void *address, size_t length, int prot, int flags, int64_t offset,
                void **ret_address);

/* Whether the mapping at this address is one of a device's page. Needs no lock. */
bool um_page_is_at(uint64_t address);

/* In a forked child: maps what shows the parent's generation where the parent has the page mapped. */
void um_page_inherit(usermm_device *device);

/* Gives the device's own mapping back. Needs no lock. */
void um_page_free(usermm_device *device);

/* The page is about to stop changing: children may inherit it as it is. */
void um_page_rest(usermm_device *device);

#endif
