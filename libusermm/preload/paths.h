/* Which paths are the devices'. */
#ifndef UM_PATHS_H
#define UM_PATHS_H

#include <stdbool.h>

/* The version of the ABI behind a path that native calls did not find (ENOENT), or 0. Keeps errno. */
int um_path_abi(int directory, const char *path);

/* Whether it is a device's path, with no node there: a native open that creates would make a file of the device's name.
 * Then errno is ENOENT, else what it was. */
bool um_path_is_missing(int directory, const char *path);

#endif
