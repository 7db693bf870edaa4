/* Every way to the two paths, and what the ways answer. */
#include <dirent.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "../abi.h"
#include "../raw.h"

static const char *const paths[] = {DEVICE_2, DEVICE_1};

static void is_device(int device, int abi) {
    char *page = map_pages(1);
    struct region region = {(uintptr_t)page, (uintptr_t)page + PAGE, 3, 1, 1};
    struct region_1 region_1 = {1, 0, (uintptr_t)page, (uintptr_t)page + PAGE, 3};
    must(device >= 0, "open");
    expect(ioctl(device, abi == 2 ? REGISTER : REGISTER_1, abi == 2 ? (void *)&region : (void *)&region_1) == 0);
    expect_errno(ENOTTY, ioctl(device, abi == 2 ? REGISTER_1 : REGISTER, &region));
    expect((fcntl(device, F_GETFL) & O_ACCMODE) == O_RDONLY);
    expect(close(device) == 0);
}

static void by_open(void) {
    for (int i = 0; i < 2; i++) {
        int abi = 2 - i;
        volatile int flags = O_RDONLY | O_NONBLOCK; /* not known to the compiler: __open_2 and friends when fortified */
        is_device(open(paths[i], O_RDONLY), abi);
        is_device(open64(paths[i], O_RDONLY), abi);
        is_device(openat(AT_FDCWD, paths[i], O_RDONLY), abi);
        is_device(openat64(-1, paths[i], O_RDONLY), abi); /* an absolute path: the directory does not matter */
        is_device(open(paths[i], flags), abi);
        is_device(open64(paths[i], flags), abi);
        is_device(openat(AT_FDCWD, paths[i], flags), abi);
        is_device(openat64(AT_FDCWD, paths[i], flags), abi);
        is_device(open(paths[i], O_RDONLY | O_NOCTTY | O_LARGEFILE | O_CLOEXEC | O_NOFOLLOW), abi);
    }
}

static void flags_are_kept(void) {
    int device = open_device(O_RDONLY | O_CLOEXEC | O_NONBLOCK), plain = open_device(O_RDONLY);
    expect(fcntl(device, F_GETFD) == FD_CLOEXEC && fcntl(plain, F_GETFD) == 0);
    expect((fcntl(device, F_GETFL) & O_NONBLOCK) && !(fcntl(plain, F_GETFL) & O_NONBLOCK));
    expect(plain == device + 1 || plain > device);
}

static void by_other_names(void) {
    int directory = open("/dev", O_RDONLY | O_DIRECTORY);
    is_device(open("//dev/ummunotify", O_RDONLY), 2);
    is_device(openat(directory, "ummunotify", O_RDONLY), 2);
    is_device(openat(directory, "ummunot", O_RDONLY), 1);
    must(chdir("/dev") == 0, "chdir");
    is_device(open("ummunotify", O_RDONLY), 2);
    must(chdir("/") == 0, "chdir");
    is_device(open("dev/ummunot", O_RDONLY), 1);
    close(directory);
}

static void names_that_are_others(void) {
    expect_errno(ENOENT, open("/dev/ummunotifyx", O_RDONLY));
    expect_errno(ENOENT, open("/dev/ummuno", O_RDONLY));
    expect_errno(ENOENT, open("/tmp/ummunotify", O_RDONLY));
    expect_errno(ENOENT, open("", O_RDONLY));
    expect_errno(ENOENT, access("/dev/ummunot2", F_OK));
    expect_errno(ENOENT, openat(AT_FDCWD, "ummunotify", O_RDONLY));
    char name[5000];
    memset(name, 'a', sizeof name);
    name[sizeof name - 1] = 0;
    expect_errno(ENAMETOOLONG, open(name, O_RDONLY));
}

static void for_writing(void) {
    for (int i = 0; i < 2; i++) {
        expect_errno(EINVAL, open(paths[i], O_WRONLY));
        expect_errno(EINVAL, open(paths[i], O_RDWR));
        expect_errno(EINVAL, openat(AT_FDCWD, paths[i], O_RDWR | O_NONBLOCK));
        expect_errno(EINVAL, open64(paths[i], O_WRONLY | O_CLOEXEC));
        expect(fopen(paths[i], "r+") == NULL && errno == EINVAL);
    }
}

/* Where there is no device the kernel would make a file of that name. */
static void creating(void) {
    for (int i = 0; i < 2; i++) {
        must(RAW(faccessat, AT_FDCWD, paths[i], F_OK, 0, 0, 0) == -ENOENT, "no such file");
        int device = open(paths[i], O_RDONLY | O_CREAT, 0600);
        FILE *stream = fopen(paths[i], "w+");
        bool made = RAW(unlinkat, AT_FDCWD, paths[i], 0, 0, 0, 0) == 0;
        expect(!made);
        expect(stream == NULL && errno == EINVAL);
        is_device(device, 2 - i);
        expect_errno(EEXIST, open(paths[i], O_RDONLY | O_CREAT | O_EXCL, 0600));
        expect(RAW(unlinkat, AT_FDCWD, paths[i], 0, 0, 0, 0) == -ENOENT);
    }
}

static void check_stat(const struct stat *about, int abi) {
    static dev_t numbers[3];
    expect(S_ISCHR(about->st_mode) && (about->st_mode & 07777) == 0666);
    expect(about->st_size == 0 && about->st_nlink == 1 && about->st_uid == 0);
    expect(major(about->st_rdev) == 10);
    expect(numbers[abi] == 0 || numbers[abi] == about->st_rdev);
    numbers[abi] = about->st_rdev;
}

static void by_stat(void) {
    int directory = open("/dev", O_RDONLY | O_DIRECTORY);
    for (int i = 0; i < 2; i++) {
        struct stat about;
        struct stat64 about64;
        struct statx aboutx;
        expect(stat(paths[i], &about) == 0);
        check_stat(&about, 2 - i);
        expect(lstat(paths[i], &about) == 0);
        check_stat(&about, 2 - i);
        expect(fstatat(AT_FDCWD, paths[i], &about, 0) == 0);
        check_stat(&about, 2 - i);
        expect(fstatat(directory, paths[i] + strlen("/dev/"), &about, AT_SYMLINK_NOFOLLOW) == 0);
        check_stat(&about, 2 - i);
        expect(stat64(paths[i], &about64) == 0 && S_ISCHR(about64.st_mode) && about64.st_rdev == about.st_rdev);
        expect(lstat64(paths[i], &about64) == 0 && S_ISCHR(about64.st_mode));
        expect(fstatat64(AT_FDCWD, paths[i], &about64, 0) == 0 && S_ISCHR(about64.st_mode));
        expect(statx(AT_FDCWD, paths[i], 0, STATX_BASIC_STATS, &aboutx) == 0);
        expect(S_ISCHR(aboutx.stx_mode) && aboutx.stx_rdev_major == 10);
        expect(makedev(aboutx.stx_rdev_major, aboutx.stx_rdev_minor) == about.st_rdev);
        expect((aboutx.stx_mask & STATX_TYPE) != 0);
    }
    close(directory);
}

static void by_access(void) {
    int directory = open("/dev", O_RDONLY | O_DIRECTORY);
    for (int i = 0; i < 2; i++) {
        expect(access(paths[i], F_OK) == 0);
        expect(access(paths[i], R_OK) == 0);
        expect(access(paths[i], R_OK | W_OK) == 0);
        expect_errno(EACCES, access(paths[i], X_OK));
        expect(faccessat(AT_FDCWD, paths[i], R_OK, 0) == 0);
        expect(faccessat(AT_FDCWD, paths[i], R_OK, AT_EACCESS) == 0);
        expect(faccessat(directory, paths[i] + strlen("/dev/"), F_OK, 0) == 0);
        expect_errno(EINVAL, access(paths[i], 8));
    }
    close(directory);
}

static void bad_pointers(void) {
    char *hole = map_pages(2) + PAGE;
    munmap(hole, PAGE);
    const char *volatile bad[] = {NULL, (char *)8, hole, hole - 1, (char *)0xffff800000000000ul};
    hole[-1] = '/';
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct stat about;
        expect_errno(EFAULT, open(bad[i], O_RDONLY));
        expect_errno(EFAULT, openat(AT_FDCWD, bad[i], O_RDONLY));
        expect_errno(EFAULT, access(bad[i], F_OK));
        expect_errno(EFAULT, faccessat(AT_FDCWD, bad[i], F_OK, 0));
        expect_errno(EFAULT, stat(bad[i], &about));
        expect_errno(EFAULT, lstat(bad[i], &about));
        if (bad[i] != hole - 1) { /* where the answer would go */
            expect_errno(EFAULT, stat(DEVICE_2, (struct stat *)bad[i]));
            expect_errno(EFAULT, lstat(DEVICE_2, (struct stat *)bad[i]));
            expect_errno(EFAULT, statx(AT_FDCWD, DEVICE_2, 0, STATX_BASIC_STATS, (struct statx *)bad[i]));
        }
    }
    memcpy(hole - strlen(DEVICE_2), DEVICE_2, strlen(DEVICE_2)); /* up to the very edge, and no end */
    expect_errno(EFAULT, open(hole - strlen(DEVICE_2), O_RDONLY));
    expect_errno(EFAULT, access(hole - strlen(DEVICE_2), F_OK));
    memcpy(hole - sizeof DEVICE_2, DEVICE_2, sizeof DEVICE_2); /* with its end at the edge */
    is_device(open(hole - sizeof DEVICE_2, O_RDONLY), 2);
}

static void by_stream(void) {
    for (int i = 0; i < 2; i++) {
        const char *const modes[] = {"r", "rb", "re"};
        for (int j = 0; j < 3; j++) {
            FILE *stream = j == 1 ? fopen64(paths[i], modes[j]) : fopen(paths[i], modes[j]);
            must(stream != NULL, "fopen");
            int device = fileno(stream);
            expect(device > 2);
            expect(fcntl(device, F_GETFD) == (j == 2 ? FD_CLOEXEC : 0));
            is_device(dup(device), 2 - i);
            expect(fclose(stream) == 0);
            expect_errno(EBADF, fcntl(device, F_GETFD));
        }
    }
}

/* By stdio's own buffer, which asks for more than there is. */
static void buffered_stream_reads(void) {
    struct event event;
    char *page = map_pages(1);
    FILE *stream = fopen(DEVICE_2, "r");
    must(stream != NULL, "fopen");
    expect(register_range(fileno(stream), page, PAGE, 9) == 0);
    expect(munmap(page, PAGE) == 0);
    expect(fread(&event, sizeof event, 1, stream) == 1 && event.value == 9);
    expect(fread(&event, sizeof event, 1, stream) == 1 && event.type == LAST);
    expect(fclose(stream) == 0);
}

/* Sizes that the compiler does not know: __read_chk when fortified. */
static void reads_of_any_size(void) {
    struct event events[2];
    volatile size_t size = sizeof events;
    char *page = map_pages(1);
    int device = open_device(O_RDONLY | O_NONBLOCK);
    expect(register_range(device, page, PAGE, 9) == 0);
    expect(munmap(page, PAGE) == 0);
    expect(read(device, events, size) == 64 && events[0].value == 9);
    expect_errno(EAGAIN, read(device, events, size));
}

/* What is not ours goes through: the same results, and errno as it was. */
static void errno_is_untouched(void) {
    int pair[2], device = open_device(O_RDONLY | O_NONBLOCK);
    const volatile uint64_t *generation = map_generation(device);
    char text[64], *page = map_pages(1);
    struct stat about;
    struct event events[2];
    must(pipe(pair) == 0, "pipe");
    errno = 12345;
#define UNTOUCHED(condition)                                                                                           \
    expect(condition);                                                                                                 \
    must(errno == 12345, "errno after " #condition)
    UNTOUCHED(write(pair[1], "text", 5) == 5);
    UNTOUCHED(read(pair[0], text, sizeof text) == 5);
    UNTOUCHED(access("/", F_OK) == 0);
    UNTOUCHED(stat("/", &about) == 0);
    UNTOUCHED(ioctl(pair[0], 0x541Bul, text) == 0);
    UNTOUCHED(fcntl(device, F_GETFD) == 0);
    int file = open("/", O_RDONLY);
    UNTOUCHED(file >= 0);
    UNTOUCHED(close(file) == 0);
    void *mapped = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    UNTOUCHED(mapped != MAP_FAILED);
    UNTOUCHED(munmap(mapped, PAGE) == 0);
    int second = open(DEVICE_1, O_RDONLY);
    UNTOUCHED(second >= 0);
    UNTOUCHED(close(second) == 0);
    UNTOUCHED(access(DEVICE_2, F_OK) == 0);
    UNTOUCHED(stat(DEVICE_2, &about) == 0);
    UNTOUCHED(register_range(device, page, PAGE, 1) == 0);
    UNTOUCHED(munmap(page, PAGE) == 0);
    UNTOUCHED(*generation == 1);
    UNTOUCHED(read(device, events, sizeof events) == 64);
    UNTOUCHED(unregister(device, 1) == 0);
    UNTOUCHED(mmap(NULL, 8, PROT_READ, MAP_SHARED, device, 0) != MAP_FAILED);
    expect_errno(EBADF, read(-1, text, 1));
    expect_errno(EBADF, close(-1));
    expect_errno(EBADF, ioctl(9999, REGISTER, text));
    expect_errno(EBADF, ioctl(-1, REGISTER, text));
    expect_errno(EBADF, mmap(NULL, 8, PROT_READ, MAP_SHARED, 9999, 0));
}

static const struct test_case cases[] = {
    {"by_open", by_open},
    {"flags_are_kept", flags_are_kept},
    {"by_other_names", by_other_names},
    {"names_that_are_others", names_that_are_others},
    {"for_writing", for_writing},
    {"creating", creating},
    {"by_stat", by_stat},
    {"by_access", by_access},
    {"bad_pointers", bad_pointers},
    {"by_stream", by_stream},
    {"buffered_stream_reads", buffered_stream_reads},
    {"reads_of_any_size", reads_of_any_size},
    {"errno_is_untouched", errno_is_untouched},
};

int main(int argc, char **argv) {
    return run_case(cases, sizeof cases / sizeof *cases, argc, argv);
}
