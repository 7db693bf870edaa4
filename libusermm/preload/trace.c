#define _GNU_SOURCE
#include "trace.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "abi.h"
#include "client.h"
#include "copy.h"
#include "device.h"
#include "monitor.h"
#include "native.h"

#define LINE_BYTES 16384      /* 128 events of some 80 bytes, and the rest */
#define OUT_OF_THE_WAY_FD 200 /* programs count on low numbers */

atomic_bool um_tracing;
static char file_name[PATH_MAX];
static _Atomic int file_fd = -1;
static dev_t file_device;
static ino_t file_inode;

struct line {
    size_t size;
    char text[LINE_BYTES];
};

__attribute__((format(printf, 2, 3))) static void add(struct line *line, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int added = vsnprintf(line->text + line->size, sizeof line->text - line->size, format, arguments);
    va_end(arguments);
    if (added > 0 && line->size + (size_t)added < sizeof line->text)
        line->size += (size_t)added;
}

static void begin(struct line *line, const char *call) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    line->size = 0;
    add(line, "{\"t\":%" PRIu64 ",\"pid\":%ld,\"tid\":%ld,\"call\":\"%s\"",
        (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec, syscall(SYS_getpid), syscall(SYS_gettid), call);
}

/* JSON's quotes, backslashes and control characters. */
static void add_text(struct line *line, const char *key, const char *text, const char *after) {
    add(line, ",\"%s\":\"", key);
    for (; *text; text++)
        add(line, *text == '"' || *text == '\\' ? "\\%c" : (unsigned char)*text < ' ' ? "\\u%04x" : "%c", *text);
    add(line, "%s\"", after);
}

static void add_site(struct line *line, void *site) {
    Dl_info found;
    char offset[256];
    if (!dladdr(site, &found) || !found.dli_fname)
        return;
    const char *slash = strrchr(found.dli_fname, '/');
    snprintf(offset, sizeof offset, "+0x%" PRIxPTR "%s%.200s%s", (uintptr_t)site - (uintptr_t)found.dli_fbase,
             found.dli_sname ? " (" : "", found.dli_sname ? found.dli_sname : "", found.dli_sname ? ")" : "");
    add_text(line, "site", slash ? slash + 1 : found.dli_fname, offset);
}

/* The program may have closed our descriptor, and have another file in its number. */
static bool is_open(void) {
    struct stat found;
    int fd = atomic_load(&file_fd);
    return fd >= 0 && fstat(fd, &found) == 0 && found.st_dev == file_device && found.st_ino == file_inode;
}

static void open_file(void) {
    struct stat found;
    int low = UM_NATIVE(open)(file_name, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    int fd = low < 0 ? -1 : fcntl(low, F_DUPFD_CLOEXEC, OUT_OF_THE_WAY_FD);
    if (fd < 0)
        fd = low;
    else
        UM_NATIVE(close)(low);
    if (fd < 0 || fstat(fd, &found))
        return;
    file_device = found.st_dev;
    file_inode = found.st_ino;
    atomic_store(&file_fd, fd);
}

/* One write a line, so that those of several threads and processes do not mix. */
static void end(struct line *line) {
    int number = errno;
    add(line, "}\n");
    if (!is_open())
        open_file();
    if (is_open() && write(atomic_load(&file_fd), line->text, line->size) < 0)
        atomic_store(&um_tracing, false); /* a full disk: the program goes on */
    errno = number;
}

static void trace_notification(const usermm_device *device, uint64_t start, uint64_t end_, enum usermm_cause cause) {
    static const char *const causes[] = {"unmap", "remap", "discard"};
    struct line line;
    begin(&line, "notify");
    add(&line, ",\"device\":%u,\"start\":%" PRIu64 ",\"end\":%" PRIu64 ",\"cause\":\"%s\",\"generation\":%" PRIu64,
        device->number, start, end_, causes[cause], atomic_load(&device->generation));
    end(&line);
}

void um_trace_start(void) {
    const char *name = getenv("USERMM_TRACE");
    if (um_trace_is_on() || !name || !*name || strlen(name) >= sizeof file_name)
        return;
    strcpy(file_name, name);
    um_monitor.trace = trace_notification;
    atomic_store(&um_tracing, true);
}

void um_trace_open(const char *path, int abi, int flags, int result, void *site) {
    struct line line;
    struct um_client *client = result >= 0 ? um_client_hold(result) : NULL;
    begin(&line, "open");
    add_text(&line, "path", path, "");
    add(&line, ",\"abi\":%d,\"flags\":%d,\"result\":%d", abi, flags, result < 0 ? result : 0);
    if (client) {
        add(&line, ",\"fd\":%d,\"device\":%u", result, client->device->number);
        um_client_drop(client);
    }
    add_site(&line, site);
    end(&line);
}

static void begin_device(struct line *line, const char *call, const usermm_device *device) {
    begin(line, call);
    add(line, ",\"device\":%u", device->number);
}

static void end_result(struct line *line, long result, void *site) {
    add(line, ",\"result\":%ld", result);
    add_site(line, site);
    end(line);
}

void um_trace_ioctl(usermm_device *device, unsigned long request, void *argument, int result, void *site) {
    struct line line;
    struct um_request parsed;
    switch (um_abi_parse(device->abi, request, argument, &parsed)) {
    case UM_REQUEST_EXCHANGE:
        begin_device(&line, "exchange", device);
        break;
    case UM_REQUEST_REGISTER:
        begin_device(&line, "register", device);
        add(&line, ",\"start\":%" PRIu64 ",\"end\":%" PRIu64 ",\"cookie\":%" PRIu64, parsed.start, parsed.end,
            parsed.cookie);
        break;
    case UM_REQUEST_UNREGISTER:
        begin_device(&line, "unregister", device);
        add(&line, ",\"cookie\":%" PRIu64, parsed.cookie);
        break;
    default:
        begin_device(&line, "ioctl", device);
        add(&line, ",\"request\":%lu", request);
    }
    end_result(&line, result, site);
}

void um_trace_read(usermm_device *device, size_t size, ssize_t result, const struct usermm_event *events, void *site) {
    struct line line;
    begin_device(&line, "read", device);
    add(&line, ",\"size\":%zu,\"events\":[", size);
    for (ssize_t i = 0; i < result / (ssize_t)sizeof *events; i++) {
        const struct usermm_event *event = &events[i];
        const char *comma = i ? "," : "";
        if (event->type == USERMM_EVENT_LAST)
            add(&line, "%s[\"last\",%" PRIu64 "]", comma, event->user_cookie_counter);
        else
            add(&line, "%s[\"inval\",%" PRIu64 ",%" PRIu64 ",%" PRIu64 ",%u]", comma, event->user_cookie_counter,
                event->hint_start, event->hint_end, event->flags & USERMM_EVENT_FLAG_HINT);
    }
    add(&line, "]");
    end_result(&line, result, site);
}

void um_trace_mmap(usermm_device *device, size_t length, int result, void *address, void *site) {
    struct line line;
    begin_device(&line, "mmap", device);
    add(&line, ",\"length\":%zu,\"address\":%" PRIuPTR, length, result ? 0 : (uintptr_t)address);
    end_result(&line, result, site);
}

void um_trace_close(usermm_device *device) {
    struct line line;
    if (!um_trace_is_on())
        return;
    begin_device(&line, "close", device);
    add(&line, ",\"result\":0");
    end(&line);
}
