/* SPDX-License-Identifier: MIT */
/*
 * The ABI of /dev/ummunotify (version 2, 2010): a device whose reader learns which of its memory went away.
 *
 * For programs that speak to the device by themselves; `usermm run` gives it to them on a kernel that has none. The
 * man page ummunotify(4) says what each call does. <usermm.h> offers the same without a device node.
 */
#ifndef _LINUX_UMMUNOTIFY_H
#define _LINUX_UMMUNOTIFY_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* REGISTER_REGION's argument: watch [start, end); events name the region by user_cookie. */
struct ummunotify_register_ioctl {
    __u64 start;
    __u64 end;
    __u64 user_cookie;
    __u32 flags; /* ignored */
    __u32 reserved;
};

/* What read() gives, up to 128 of them. INVAL: a region lost memory. LAST: the queue has been drained. */
struct ummunotify_event {
    __u32 type;
    __u32 flags;
    __u64 hint_start; /* with the flag HINT the part that was hit, else the region */
    __u64 hint_end;
    __u64 user_cookie_counter; /* INVAL: the region's cookie; LAST: the generation */
};

enum { UMMUNOTIFY_EVENT_TYPE_INVAL = 0, UMMUNOTIFY_EVENT_TYPE_LAST = 1 };

enum { UMMUNOTIFY_EVENT_FLAG_HINT = 1 };

/* Optional, once, before everything else: asks for features. None is defined, so the answer is 0. */
#define UMMUNOTIFY_EXCHANGE_FEATURES _IOWR('U', 1, __u32)

#define UMMUNOTIFY_REGISTER_REGION _IOW('U', 2, struct ummunotify_register_ioctl)

/* The argument points at the cookie. */
#define UMMUNOTIFY_UNREGISTER_REGION _IOW('U', 3, __u64)

#endif
