/* The two headers of the ABI, included together and with ours: their numbers and layouts are those that programs have
 * compiled in. What can be told by the compiler is; the rest is asked of a device. */
#include <linux/ummunot.h>
#include <linux/ummunotify.h>

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

#include "test.h"

#define IS(expression, value) _Static_assert((expression) == (value), #expression)
#define AT(type, member, offset) IS(offsetof(struct type, member), offset)

IS(UMMUNOTIFY_EXCHANGE_FEATURES, 0xC0045501);
IS(UMMUNOTIFY_REGISTER_REGION, 0x40205502);
IS(UMMUNOTIFY_UNREGISTER_REGION, 0x40085503);
IS(UMMUNOT_REGISTER_REGION, 0xC0205501);
IS(UMMUNOT_UNREGISTER_REGION, 0x40085502);
IS(UMMUNOT_INTF_VERSION, 1);

IS(sizeof(struct ummunotify_register_ioctl), 32);
AT(ummunotify_register_ioctl, start, 0);
AT(ummunotify_register_ioctl, end, 8);
AT(ummunotify_register_ioctl, user_cookie, 16);
AT(ummunotify_register_ioctl, flags, 24);
AT(ummunotify_register_ioctl, reserved, 28);

IS(sizeof(struct ummunot_register_ioctl), 32);
AT(ummunot_register_ioctl, intf_version, 0);
AT(ummunot_register_ioctl, reserved, 4);
AT(ummunot_register_ioctl, start, 8);
AT(ummunot_register_ioctl, end, 16);
AT(ummunot_register_ioctl, user_cookie, 24);

#define EVENT_IS_AS_EVER(name)                                                                                         \
    IS(sizeof(struct name), sizeof(struct usermm_event));                                                              \
    AT(name, type, offsetof(struct usermm_event, type));                                                               \
    AT(name, flags, offsetof(struct usermm_event, flags));                                                             \
    AT(name, hint_start, offsetof(struct usermm_event, hint_start));                                                   \
    AT(name, hint_end, offsetof(struct usermm_event, hint_end));                                                       \
    AT(name, user_cookie_counter, offsetof(struct usermm_event, user_cookie_counter))
EVENT_IS_AS_EVER(ummunotify_event);
EVENT_IS_AS_EVER(ummunot_event);

IS(UMMUNOTIFY_EVENT_TYPE_INVAL, USERMM_EVENT_INVAL);
IS(UMMUNOTIFY_EVENT_TYPE_LAST, USERMM_EVENT_LAST);
IS(UMMUNOTIFY_EVENT_FLAG_HINT, USERMM_EVENT_FLAG_HINT);
IS(UMMUNOT_EVENT_TYPE_INVAL, USERMM_EVENT_INVAL);
IS(UMMUNOT_EVENT_TYPE_LAST, USERMM_EVENT_LAST);
IS(UMMUNOT_EVENT_FLAG_HINT, USERMM_EVENT_FLAG_HINT);

static void version_2_by_its_header(void) {
    usermm_device *device = test_open(USERMM_ABI_UMMUNOTIFY, O_RDONLY);
    uint64_t memory = (uintptr_t)test_map(1);
    __u32 features = ~0u;
    CALL(usermm_ioctl(device, UMMUNOTIFY_EXCHANGE_FEATURES, &features));
    CHECK(features == 0);
    struct ummunotify_register_ioctl region = {.start = memory, .end = memory + PAGE, .user_cookie = 7, .flags = ~0u};
    CALL(usermm_ioctl(device, UMMUNOTIFY_REGISTER_REGION, &region));
    munmap((void *)(uintptr_t)memory, PAGE);
    struct ummunotify_event events[3];
    CHECK(CALL(usermm_read(device, events, sizeof events)) == 2 * (long)sizeof *events);
    CHECK(events[0].type == UMMUNOTIFY_EVENT_TYPE_INVAL && events[0].flags == UMMUNOTIFY_EVENT_FLAG_HINT);
    CHECK(events[0].hint_start == memory && events[0].hint_end == memory + PAGE && events[0].user_cookie_counter == 7);
    CHECK(events[1].type == UMMUNOTIFY_EVENT_TYPE_LAST && events[1].user_cookie_counter == 1);
    CALL(usermm_ioctl(device, UMMUNOTIFY_UNREGISTER_REGION, &region.user_cookie));
}

static void version_1_by_its_header(void) {
    usermm_device *device = test_open(USERMM_ABI_UMMUNOT, O_RDONLY);
    uint64_t memory = (uintptr_t)test_map(1);
    struct ummunot_register_ioctl region = {
        .intf_version = UMMUNOT_INTF_VERSION, .start = memory, .end = memory + PAGE, .user_cookie = 7};
    CALL(usermm_ioctl(device, UMMUNOT_REGISTER_REGION, &region));
    munmap((void *)(uintptr_t)memory, PAGE);
    struct ummunot_event events[3];
    CHECK(CALL(usermm_read(device, events, sizeof events)) == 2 * (long)sizeof *events);
    CHECK(events[0].type == UMMUNOT_EVENT_TYPE_INVAL && events[0].user_cookie_counter == 7);
    CHECK(events[1].type == UMMUNOT_EVENT_TYPE_LAST && events[1].user_cookie_counter == 1);
    CALL(usermm_ioctl(device, UMMUNOT_UNREGISTER_REGION, &region.user_cookie));
}

static void the_versions_do_not_share_a_number(void) {
    usermm_device *older = test_open(USERMM_ABI_UMMUNOT, O_RDONLY);
    usermm_device *newer = test_open(USERMM_ABI_UMMUNOTIFY, O_RDONLY);
    char argument[32];
    memset(argument, 0, sizeof argument);
    CHECK(usermm_ioctl(older, UMMUNOTIFY_EXCHANGE_FEATURES, argument) == -ENOTTY);
    CHECK(usermm_ioctl(older, UMMUNOTIFY_REGISTER_REGION, argument) == -ENOTTY);
    CHECK(usermm_ioctl(older, UMMUNOTIFY_UNREGISTER_REGION, argument) == -ENOTTY);
    CHECK(usermm_ioctl(newer, UMMUNOT_REGISTER_REGION, argument) == -ENOTTY);
    CHECK(usermm_ioctl(newer, UMMUNOT_UNREGISTER_REGION, argument) == -ENOTTY);
}

int main(void) {
    static const struct test tests[] = {
        TEST(version_2_by_its_header),
        TEST(version_1_by_its_header),
        TEST(the_versions_do_not_share_a_number),
    };
    return test_main(tests, sizeof tests / sizeof *tests);
}
