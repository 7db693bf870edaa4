/* What can be done to a descriptor: copied, closed, closed behind the library, its number given to something else. */
#include <dirent.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include "../abi.h"
#include "../raw.h"

#define TEXT "somebody else's"

static char directory[] = "/tmp/usermm-descriptors-XXXXXX";
static char path[64];

/* A file with known text; its reads must be its own. */
static int open_file(void) {
    int file = open(path, O_RDWR);
    must(file >= 0, "open a file");
    return file;
}

static void expect_untouched(int file) {
    char text[64] = {0};
    expect(lseek(file, 0, SEEK_CUR) == 0);
    expect(pread(file, text, sizeof text, 0) == (ssize_t)strlen(TEXT) && strcmp(text, TEXT) == 0);
    expect(read(file, text, sizeof text) == (ssize_t)strlen(TEXT));
    expect_errno(ENOTTY, ioctl(file, REGISTER, text));
    void *mapped = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    expect(mapped != MAP_FAILED && memcmp(mapped, TEXT, strlen(TEXT)) == 0);
    munmap(mapped, 2 * PAGE);
}

static void begin(void) {
    must(mkdtemp(directory) != NULL, "mkdtemp");
    snprintf(path, sizeof path, "%s/file", directory);
    int file = open(path, O_CREAT | O_RDWR, 0600);
    must(file >= 0 && write(file, TEXT, strlen(TEXT)) == (ssize_t)strlen(TEXT), "write a file");
    close(file);
}

static void end(void) {
    unlink(path);
    rmdir(directory);
}

/* Registers by one descriptor, reads by another one of the same device. */
static void works(int device, int copy) {
    struct event events[2];
    const volatile uint64_t *generation = map_generation(copy);
    uint64_t before = *generation;
    char *page = map_pages(1);
    expect(register_range(device, page, PAGE, 8) == 0);
    expect_errno(EINVAL, register_range(copy, page, PAGE, 8));
    expect(munmap(page, PAGE) == 0);
    expect(*generation == before + 1);
    expect(read(copy, events, sizeof events) == sizeof events && events[0].value == 8);
    expect(unregister(copy, 8) == 0);
    munmap((void *)(uintptr_t)generation, PAGE);
}

static int threads(void) {
    DIR *tasks = opendir("/proc/self/task");
    int count = -2;
    while (readdir(tasks))
        count++;
    closedir(tasks);
    return count;
}

/* The monitor's thread ends with the last device. */
static void expect_ended(void) {
    for (int i = 0; i < 2000 && threads() > 1; i++)
        usleep(1000);
    expect(threads() == 1);
}

static int by_dup(int device) {
    return dup(device);
}
static int by_dup2(int device) {
    return dup2(device, 100);
}
static int by_dup3(int device) {
    return dup3(device, 101, O_CLOEXEC);
}
static int by_fcntl(int device) {
    return fcntl(device, F_DUPFD, 50);
}
static int by_fcntl_cloexec(int device) {
    return fcntl(device, F_DUPFD_CLOEXEC, 50);
}
static int by_raw_dup(int device) {
    return (int)RAW(dup, device, 0, 0, 0, 0, 0);
}
static int by_pidfd(int device) {
    int process = (int)RAW(pidfd_open, getpid(), 0, 0, 0, 0, 0);
    int copy = (int)RAW(pidfd_getfd, process, device, 0, 0, 0, 0);
    close(process);
    return copy;
}
static int by_message(int device) {
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {{CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS}};
    char byte = 1;
    struct iovec vector = {&byte, 1};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control};
    message.msg_controllen = sizeof control;
    int pair[2], copy;
    must(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0, "socketpair");
    memcpy(CMSG_DATA(&control.header), &device, sizeof device);
    must(sendmsg(pair[0], &message, 0) == 1 && recvmsg(pair[1], &message, 0) == 1, "sendmsg, recvmsg");
    memcpy(&copy, CMSG_DATA(&control.header), sizeof copy);
    close(pair[0]);
    close(pair[1]);
    return copy;
}

static void copies(void) {
    int (*const ways[])(int) = {by_dup, by_dup2, by_dup3, by_fcntl, by_fcntl_cloexec, by_raw_dup, by_pidfd, by_message};
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        int device = open_device(O_RDONLY | O_NONBLOCK), copy = ways[i](device);
        must(copy >= 0 && copy != device, "a copy");
        works(device, copy);
        works(copy, device);
        expect(close(device) == 0);
        works(copy, copy); /* it lives until the last one is closed */
        expect_errno(EBADF, register_range(device, path, 1, 1));
        expect(close(copy) == 0);
        expect_errno(EBADF, close(copy));
        expect_ended();
    }
}

static void copies_share_their_flags(void) {
    int device = open_device(O_RDONLY), copy = dup(device);
    char byte[64];
    expect(fcntl(copy, F_SETFL, O_NONBLOCK) == 0);
    expect_errno(EAGAIN, read(device, byte, sizeof byte));
    expect((fcntl(device, F_GETFL) & O_ACCMODE) == O_RDONLY);
}

static void a_copy_over_a_device_ends_it(void) {
    int first = open_device(O_RDONLY | O_NONBLOCK), second = open_device(O_RDONLY | O_NONBLOCK), file = open_file();
    char *page = map_pages(1);
    expect(register_range(second, page, PAGE, 1) == 0);
    expect(dup2(first, second) == second);
    expect(munmap(page, PAGE) == 0); /* the second one had registered it */
    works(first, second);
    expect(dup2(file, second) == second);
    expect(dup2(file, first) == first);
    expect_untouched(first);
    expect(close(second) == 0);
    expect(close(open_device(O_RDONLY)) == 0); /* what went past the library is found by the next open */
    expect_ended();
}

static void reused_numbers(void) {
    for (int raw = 0; raw < 2; raw++) {
        int device = open_device(O_RDONLY | O_NONBLOCK);
        const volatile uint64_t *generation = map_generation(device);
        char *page = map_pages(1);
        expect(register_range(device, page, PAGE, 1) == 0);
        expect((raw ? RAW(close, device, 0, 0, 0, 0, 0) : close(device)) == 0);
        int file = open_file();
        expect(file == device);
        expect_untouched(file);
        expect(munmap(page, PAGE) == 0);
        expect(*generation <= 1);
        expect(lseek(file, 0, SEEK_SET) == 0);
        expect_untouched(file);
        expect(close(file) == 0);
        int again = open_device(O_RDONLY | O_NONBLOCK);
        works(again, again);
        expect(close(again) == 0);
    }
}

static void open_and_close(void) {
    int keeps_the_monitor = open_device(O_RDONLY);
    for (int i = 0; i < 100000; i++) {
        int device = open_device(O_RDONLY | O_NONBLOCK);
        if (i % 5000 == 0)
            works(device, device);
        expect(close(device) == 0);
    }
    close(keeps_the_monitor);
    expect_ended();
}

/* The limit is RLIMIT_NOFILE: at it EMFILE, as for any file, and what is open goes on. USERMM_OPENS: how many. */
static void many_opens(void) {
    const char *wanted = getenv("USERMM_OPENS");
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    rlim_t target = wanted ? strtoul(wanted, NULL, 10) : 300;
    limit.rlim_cur = limit.rlim_max < target ? limit.rlim_max : target;
    setrlimit(RLIMIT_NOFILE, &limit);
    int first = open_device(O_RDONLY | O_NONBLOCK), last = first, opened = 1;
    works(first, first); /* its page is there from now on: making it takes a descriptor */
    for (int device; (device = open(DEVICE_2, O_RDONLY | O_NONBLOCK)) >= 0; opened++)
        last = device;
    expect(errno == EMFILE);
    works(first, first);
    expect_errno(EMFILE, open(DEVICE_2, O_RDONLY));
    expect(close(last) == 0);
    last = open(DEVICE_2, O_RDONLY | O_NONBLOCK);
    expect(last >= 0);
    expect(close(first) == 0);
    works(last, last);
    printf("%d opens with a limit of %lu\n", opened, (unsigned long)limit.rlim_cur);
}

static int strangers[64][2];

/* Files with a byte in each get the numbers; a read by the wrong one would take it. */
static void take_the_numbers(void) {
    for (int i = 0; i < 64; i++)
        must(pipe(strangers[i]) == 0 && write(strangers[i][1], "x", 1) == 1, "pipe");
}

static void strangers_are_untouched(void) {
    char bytes[64];
    for (int i = 0; i < 64; i++) {
        expect(fcntl(strangers[i][0], F_SETFL, O_NONBLOCK) == 0);
        expect(read(strangers[i][0], bytes, sizeof bytes) == 1 && bytes[0] == 'x');
    }
}

/* Fails closed: the generation moves, calls on what is left give errors, nobody waits, no stranger's file is touched.
 */
static void after_all_was_closed(const volatile uint64_t *generation, uint64_t before, char *pages, int device) {
    take_the_numbers();
    expect(munmap(pages, PAGE) == 0);
    for (int i = 0; i < 5000 && *generation == before; i++)
        usleep(1000);
    expect(*generation > before);
    if (device >= 0)
        expect_errno(EIO, register_range(device, pages, PAGE, 77));
    expect(munmap(pages + PAGE, PAGE) == 0);
    int again = open(DEVICE_2, O_RDONLY | O_NONBLOCK);
    if (again >= 0 && register_range(again, pages + 2 * PAGE, PAGE, 1) == 0)
        works(again, again);
    expect(munmap(pages + 2 * PAGE, PAGE) == 0);
    strangers_are_untouched();
}

static void close_all(int how) {
    int device = open_device(O_RDONLY | O_NONBLOCK);
    const volatile uint64_t *generation = map_generation(device);
    char *pages = map_pages(4);
    expect(register_range(device, pages, 4 * PAGE, 1) == 0);
    uint64_t before = *generation;
    for (int i = 3; how < 2 && i < 1024; i++)
        if (how == 0 || i != device)
            RAW(close, i, 0, 0, 0, 0, 0);
    if (how == 2)
        expect(close_range(3, ~0u, 0) == 0);
    if (how == 3)
        closefrom(3);
    after_all_was_closed(generation, before, pages, how == 1 ? device : -1);
}
static void close_all_raw(void) {
    close_all(0);
}
static void close_all_others_raw(void) {
    close_all(1);
}
static void close_all_by_range(void) {
    close_all(2);
}
static void close_all_by_closefrom(void) {
    close_all(3);
}

/* The usual loop of a daemon, by libc: this one the library sees, and the device's own end is a proper one. */
static void close_all_by_libc(void) {
    int device = open_device(O_RDONLY | O_NONBLOCK);
    char *pages = map_pages(4);
    expect(register_range(device, pages, 4 * PAGE, 1) == 0);
    for (int i = 3; i < 1024; i++)
        close(i);
    take_the_numbers();
    expect(munmap(pages, 4 * PAGE) == 0);
    strangers_are_untouched();
    int again = open(DEVICE_2, O_RDONLY | O_NONBLOCK);
    if (again >= 0)
        works(again, again);
}

static void forbid_userfaultfd(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 24), /* the second argument's low half */
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0xAA00, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {sizeof code / sizeof *code, code};
    must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS");
    must(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0, "PR_SET_SECCOMP");
}

static void forbidden_after_the_start(void) {
    int device = open_device(O_RDONLY | O_NONBLOCK);
    forbid_userfaultfd();
    works(device, device);
    int second = open(DEVICE_2, O_RDONLY | O_NONBLOCK);
    expect(second >= 0); /* they share one monitor */
    works(second, second);
}

static void forbidden_from_the_start(void) {
    forbid_userfaultfd();
    expect(access(DEVICE_2, F_OK) == 0);
    for (int i = 0; i < 3; i++)
        expect_errno(EPERM, open(DEVICE_2, O_RDONLY));
    int file = open_file(); /* the first free number: nothing is left over */
    expect(file == 3);
    expect_untouched(file);
}

static const struct test_case cases[] = {
    {"copies", copies},
    {"copies_share_their_flags", copies_share_their_flags},
    {"a_copy_over_a_device_ends_it", a_copy_over_a_device_ends_it},
    {"reused_numbers", reused_numbers},
    {"open_and_close", open_and_close},
    {"many_opens", many_opens},
    {"close_all_raw", close_all_raw},
    {"close_all_others_raw", close_all_others_raw},
    {"close_all_by_range", close_all_by_range},
    {"close_all_by_closefrom", close_all_by_closefrom},
    {"close_all_by_libc", close_all_by_libc},
    {"forbidden_after_the_start", forbidden_after_the_start},
    {"forbidden_from_the_start", forbidden_from_the_start},
};

int main(int argc, char **argv) {
    begin();
    atexit(end);
    return run_case(cases, sizeof cases / sizeof *cases, argc, argv);
}
