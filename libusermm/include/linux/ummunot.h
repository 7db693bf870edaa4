/* SPDX-License-Identifier: MIT */
/*
 * The ABI of /dev/ummunot (version 1, 2009), the older form of <linux/ummunotify.h>: both can be included.
 *
 * There is no EXCHANGE_FEATURES, and the flag HINT of an event toggles with each further hit. See ummunot(4).
 */
#ifndef _LINUX_UMMUNOT_H
#define _LINUX_UMMUNOT_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define UMMUNOT_INTF_VERSION 1

/* REGISTER_REGION's argument: watch [start, end); events name the region by user_cookie. */
struct ummunot_register_ioctl {
    __u32 intf_version; /* UMMUNOT_INTF_VERSION */
    __u32 reserved;
    __u64 start;
    __u64 end;
    __u64 user_cookie;
};

/* What read() gives, up to 128 of them. INVAL: a region lost memory. LAST: the queue has been drained. */
struct ummunot_event {
    __u32 type;
    __u32 flags;
    __u64 hint_start; /* with the flag HINT the part that was hit, else the region */
    __u64 hint_end;
    __u64 user_cookie_counter; /* INVAL: the region's cookie; LAST: the generation */
};

enum { UMMUNOT_EVENT_TYPE_INVAL = 0, UMMUNOT_EVENT_TYPE_LAST = 1 };

enum { UMMUNOT_EVENT_FLAG_HINT = 1 };

#define UMMUNOT_REGISTER_REGION _IOWR('U', 1, struct ummunot_register_ioctl)

/* The argument points at the cookie. */
#define UMMUNOT_UNREGISTER_REGION _IOW('U', 2, __u64)

#endif
