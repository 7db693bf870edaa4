/* The ioctls of both versions. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/ioctl.h>

#include "copy.h"
#include "device.h"
#include "monitor.h"
#include "sys.h"

struct register_v2 {
    uint64_t start, end, user_cookie;
    uint32_t flags, reserved;
};
struct register_v1 {
    uint32_t intf_version, reserved;
    uint64_t start, end, user_cookie;
};

#define V2_EXCHANGE_FEATURES _IOWR('U', 1, uint32_t)
#define V2_REGISTER_REGION _IOW('U', 2, struct register_v2)
#define V2_UNREGISTER_REGION _IOW('U', 3, uint64_t)
#define V1_REGISTER_REGION _IOWR('U', 1, struct register_v1)
#define V1_UNREGISTER_REGION _IOW('U', 2, uint64_t)

/* Allowed once, as the first use; the attempt counts. No feature is defined, so the answer is none of them. */
static int exchange_features(usermm_device *device, void *argument) {
    uint32_t features;
    if (atomic_exchange(&device->used, true))
        return -EINVAL;
    if (um_copy_in(&features, argument, sizeof features))
        return -EFAULT;
    features = 0;
    return um_copy_out(argument, &features, sizeof features);
}

static int register_v2(usermm_device *device, void *argument) {
    struct register_v2 request;
    if (um_copy_in(&request, argument, sizeof request))
        return -EFAULT;
    return usermm_register(device, request.start, request.end, request.user_cookie, 0);
}

static int register_v1(usermm_device *device, void *argument) {
    struct register_v1 request;
    if (um_copy_in(&request, argument, sizeof request))
        return -EFAULT;
    if (request.intf_version != 1)
        return -EINVAL;
    return usermm_register(device, request.start, request.end, request.user_cookie, 0);
}

static int unregister(usermm_device *device, void *argument) {
    uint64_t cookie;
    if (um_copy_in(&cookie, argument, sizeof cookie))
        return -EFAULT;
    return usermm_unregister(device, cookie);
}

static int ioctl_v1(usermm_device *device, unsigned long request, void *argument) {
    switch (request) {
    case V1_REGISTER_REGION:
        return register_v1(device, argument);
    case V1_UNREGISTER_REGION:
        return unregister(device, argument);
    default:
        return -ENOTTY;
    }
}

static int ioctl_v2(usermm_device *device, unsigned long request, void *argument) {
    switch (request) {
    case V2_EXCHANGE_FEATURES:
        return exchange_features(device, argument);
    case V2_REGISTER_REGION:
        return register_v2(device, argument);
    case V2_UNREGISTER_REGION:
        return unregister(device, argument);
    default:
        return -ENOTTY;
    }
}

int usermm_ioctl(usermm_device *device, unsigned long request, void *argument) {
    int state = um_device_state(device);
    if (state)
        return state;
    return device->abi == USERMM_ABI_UMMUNOT ? ioctl_v1(device, request, argument)
                                             : ioctl_v2(device, request, argument);
}
