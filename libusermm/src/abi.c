/* The ioctls of both versions. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/ioctl.h>

#include "abi.h"
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

/* UNREGISTER has the same argument in both versions. */
static enum um_request_kind parse_cookie(void *argument, struct um_request *ret_request) {
    uint64_t *cookie = &ret_request->cookie;
    return um_copy_in(cookie, argument, sizeof *cookie) ? UM_REQUEST_FAULTS : UM_REQUEST_UNREGISTER;
}

static enum um_request_kind parse_v1(unsigned long request, void *argument, struct um_request *ret_request) {
    struct register_v1 region;
    switch (request) {
    case V1_REGISTER_REGION:
        if (um_copy_in(&region, argument, sizeof region))
            return UM_REQUEST_FAULTS;
        *ret_request = (struct um_request){region.start, region.end, region.user_cookie, region.intf_version == 1};
        return UM_REQUEST_REGISTER;
    case V1_UNREGISTER_REGION:
        return parse_cookie(argument, ret_request);
    default:
        return UM_REQUEST_UNKNOWN;
    }
}

static enum um_request_kind parse_v2(unsigned long request, void *argument, struct um_request *ret_request) {
    struct register_v2 region;
    switch (request) {
    case V2_EXCHANGE_FEATURES:
        return UM_REQUEST_EXCHANGE;
    case V2_REGISTER_REGION:
        if (um_copy_in(&region, argument, sizeof region))
            return UM_REQUEST_FAULTS;
        *ret_request = (struct um_request){region.start, region.end, region.user_cookie, true};
        return UM_REQUEST_REGISTER;
    case V2_UNREGISTER_REGION:
        return parse_cookie(argument, ret_request);
    default:
        return UM_REQUEST_UNKNOWN;
    }
}

enum um_request_kind um_abi_parse(int abi, unsigned long request, void *argument, struct um_request *ret_request) {
    return (abi == USERMM_ABI_UMMUNOT ? parse_v1 : parse_v2)(request, argument, ret_request);
}

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

int usermm_ioctl(usermm_device *device, unsigned long request, void *argument) {
    struct um_request parsed;
    int state = um_device_state(device);
    if (state)
        return state;
    switch (um_abi_parse(device->abi, request, argument, &parsed)) {
    case UM_REQUEST_FAULTS:
        return -EFAULT;
    case UM_REQUEST_EXCHANGE:
        return exchange_features(device, argument);
    case UM_REQUEST_REGISTER:
        return parsed.is_known_version ? usermm_register(device, parsed.start, parsed.end, parsed.cookie, 0) : -EINVAL;
    case UM_REQUEST_UNREGISTER:
        return usermm_unregister(device, parsed.cookie);
    default:
        return -ENOTTY;
    }
}
