/* Who tells the cache what memory is lost: by_device.c or by_library.c. Calls return 0 or a negative errno. */
#ifndef WATCH_H
#define WATCH_H

#include <stdbool.h>
#include <stdint.h>

int watch_open(void);
void watch_close(void);

/* Watches [start, end); `cookie` names the range in `lost`. */
int watch_add(uint64_t start, uint64_t end, uint64_t cookie);
void watch_remove(uint64_t cookie);

/* Whether any range lost memory since watch_drain. To be asked before a registration is believed, so it is cheap. */
bool watch_changed(void);

/* Calls lost() for each range that lost memory. An error: nothing that is registered can be believed any more. */
int watch_drain(void (*lost)(uint64_t cookie));

#endif
