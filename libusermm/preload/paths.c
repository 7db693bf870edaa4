#define _GNU_SOURCE
#include "paths.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "native.h"
#include "usermm.h"

static bool is_dev(int directory, const char *path, size_t length) {
    struct stat found, dev;
    char text[PATH_MAX];
    if (length >= sizeof text)
        return false;
    memcpy(text, path, length);
    strcpy(text + length, length ? "" : ".");
    return UM_NATIVE(fstatat)(directory, text, &found, 0) == 0 && UM_NATIVE(fstatat)(AT_FDCWD, "/dev", &dev, 0) == 0 &&
           found.st_dev == dev.st_dev && found.st_ino == dev.st_ino;
}

/* "//dev/ummunotify", "../dev/ummunotify" and openat in /dev are the device, too: the name first, then the directory.
 */
int um_path_abi(int directory, const char *path) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    int abi = strcmp(name, "ummunotify") == 0 ? USERMM_ABI_UMMUNOTIFY
              : strcmp(name, "ummunot") == 0  ? USERMM_ABI_UMMUNOT
                                              : 0;
    if (!abi || (name - path == 5 && strncmp(path, "/dev/", 5) == 0))
        return abi;
    int number = errno;
    bool found = is_dev(directory, path, (size_t)(name - path));
    errno = number;
    return found ? abi : 0;
}

bool um_path_is_missing(int directory, const char *path) {
    int number = errno;
    /* The kernel first: it knows whether the path can be read at all. */
    if (UM_NATIVE(faccessat)(directory, path, F_OK, 0) && errno == ENOENT && um_path_abi(directory, path))
        return true;
    errno = number;
    return false;
}
